"""The red team's rows as Markdown tables, rates in percent; what was not measured is a dash."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.files import replacing
from pipelines.redteam_row import BY_GROUP, COLUMNS, DETECTION

AS_PERCENT = ("poison_rate", "ca", "asr", "excess_asr", "worst", "robust_accuracy", "ca_by_group", "asr_by_group")
SUMMED = ("ca", "asr", "excess_asr", "der", "suspects", "auroc", "tpr_at_1_percent_fpr", "seconds")


def render(rows: Sequence[dict[str, Any]]) -> str:
    """One line for every row."""
    grouped = BY_GROUP if any(row.get("num_groups") is not None for row in rows) else ()
    return table([*COLUMNS[:4], *COLUMNS[5:], *grouped, *DETECTION, "seconds"], rows)


def write_page(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """The page `out/redteam.md` with both tables."""
    page = out / "redteam.md"
    with replacing(page) as temporary:
        temporary.write_text(f"{medians(rows)}\n\n{render(rows)}\n")
    return page


def medians(rows: Sequence[dict[str, Any]]) -> str:
    """One line for every attack, poison rate and preset: how many seeds, the medians over them, and the worst excess ASR."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["attack"], row["poison_rate"], row["preset"]), []).append(row)
    lines = []
    for (attack, rate, preset), of in groups.items():
        known = {name: [row[name] for row in of if row[name] is not None] for name in SUMMED}
        line = {"attack": attack, "poison_rate": rate, "preset": preset, "seeds": len(of)}
        line |= {name: statistics.median(values) if values else None for name, values in known.items()}
        lines.append(line | {"worst": max(known["excess_asr"], default=None)})
    return table(["attack", "poison_rate", "preset", "seeds", "ca", "asr", "excess_asr", "worst", *SUMMED[3:]], lines)


def table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a column for each name, a line for each row."""
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(name, row.get(name)) for name in names) + " |" for row in rows)])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in AS_PERCENT:
        return f"{100 * value:.1f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
