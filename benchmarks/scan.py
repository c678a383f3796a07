"""Whether the scan for unknown triggers sees backdoors, on which model, and how often it sees one in a harmless model. Resumes.

    python benchmarks/scan.py --attacks clean,badnets,blend,trojan,wanet --seeds 3 --controls 20 --out scan.json
    python benchmarks/scan.py --runs FOLDER --out scan.json

On the demo's digits, a minute per attack and seed. Everything trained is kept beside OUT, in a folder of the same name without its ending;
rows that stand in OUT are kept. With --runs nothing is trained: the models that `cbd redteam` or `defence.py` left in the folder (presets
`none` and `cbd`) are scanned. The trigger of the class that stands out most is stamped whatever its p-value.
"""

import argparse
import datetime
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from defence import about, commit, machine

from cbd.bundle import CARD
from cbd.config import Gate, Params
from cbd.errors import CbdError
from cbd.files import write_json
from cbd.rates import rate
from components.scan import scan
from pipelines import steps
from pipelines.demo import TRAINING, write_demo_data
from pipelines.local import share_cores
from pipelines.options import ATTACKS, VARIANTS, load, split

ALWAYS = 0.9999
"""A p-value that everything has, so that every model's trigger is stamped."""
TARGET = 0
Trial = tuple[tuple[str, ...], tuple[str, ...], int]
"""Attacks and presets that are trained together, and their seed."""
FIRST_CONTROL = 100
"""Seed of the first control."""


def main() -> int:
    """0, or the exit code of the mistake that is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", default="clean,badnets,blend,trojan,wanet", help=f"some of {','.join(ATTACKS + VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--controls", type=int, default=20, help="so many more models without poison or defence")
    parser.add_argument("--runs", type=Path, help="folder of finished trials, to scan in place of digits")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    share_cores()
    place = arguments.runs or arguments.out.with_suffix("")
    rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    try:
        trials = _finished(place) if arguments.runs else _planned(arguments)
        for names, presets, seed in trials:
            wanted = [(attack, preset, seed) for attack in names for preset in presets]
            if missing := [key for key in wanted if key not in {(row["attack"], row["preset"], row["seed"]) for row in rows}]:
                if not arguments.runs:
                    _train(place, names, presets, seed)
                for key in missing:
                    rows += _rows(place, *key)
                    write_json(arguments.out, rows)
    except CbdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(rows))
    data = arguments.runs.name if arguments.runs else "digits"
    print(f"\n{datetime.date.today()}, commit {commit()}, {machine()}; {data}, medians (and all) over seeds\n\n{false_alarms(rows)}")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: for every attack and model what the scan said of each seed."""
    lines = [
        "| attack | model | statistic | p-value | target stands out | p <= 0.02 | turned at that norm | null |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for attack, model in dict.fromkeys((row["attack"], row["model"]) for row in rows):
        of = [row for row in rows if (row["attack"], row["model"]) == (attack, model)]
        hits = "" if attack == "clean" else f"{sum(row['top'] == TARGET for row in of)} of {len(of)}"
        found = f"{sum(row['p_value'] <= 0.02 for row in of)} of {len(of)}"
        told = (_spread([row[name] for row in of]) for name in ("statistic", "p_value", "rate", "null"))
        statistic, p, turned, null = told
        lines.append(f"| {attack} | {model} | {statistic} | {p} | {hits} | {found} | {turned} | {null} |")
    return "\n".join(lines)


def false_alarms(rows: list[dict[str, Any]]) -> str:
    """Of models trained without poison, how many the Monte-Carlo p-value flags, and for how many a transfer would be called shown."""
    lines = [
        "| model without poison | p <= 0.02 | p <= 0.05 | p <= 0.10 | transfer over max(20 %, null + 10 points) |",
        "|---|---|---|---|---|",
    ]
    policy = Gate(min_clean_accuracy=0)
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == model and row["attack"] == "clean"]
        cells = [f"{sum(row['p_value'] <= alpha for row in of)} of {len(of)}" for alpha in (0.02, 0.05, 0.10)]
        lows = [(rate(row["k"], row["n"])["low"] or 0.0, max(policy.block_excess_asr, row["null"] + policy.block_margin)) for row in of]
        lines.append(f"| {model} | {' | '.join(cells)} | {sum(low > limit for low, limit in lows)} of {len(of)} |")
    return "\n".join(lines)


def _train(place: Path, attacks: tuple[str, ...], presets: tuple[str, ...], seed: int) -> None:
    def params_of(*, preset: str, seed: int) -> Params:
        return load(**{**TRAINING, "params_path": None, "seed": seed, "poison__attack": "badnets", "preset": preset})

    if not (place / "digits").is_dir():
        write_demo_data(place / "digits", poisoned=False)
    data = (str(place / "digits" / "delivery"), str(place / "digits" / "trusted"), place)
    steps.redteam(*data, limit=0, params_of=params_of, attacks=attacks, presets=presets, seeds=(seed,))


def _planned(arguments: argparse.Namespace) -> list[Trial]:
    """The trials that are asked for, the controls last."""
    attacks = split(arguments.attacks, ATTACKS, "--attacks", more=VARIANTS)
    trials: list[Trial] = [(attacks, ("none", "cbd"), seed) for seed in range(arguments.seeds)]
    return trials + [(("clean",), ("none",), FIRST_CONTROL + number) for number in range(arguments.controls)]


def _finished(runs: Path) -> list[Trial]:
    """Every trial whose model is there, those without poison first."""
    names = (re.fullmatch(r"([a-z-]+)-(none|cbd)-seed(\d+)-[0-9a-f]+", folder.name) for folder in sorted(runs.iterdir()))
    found = [((name[1],), (name[2],), int(name[3])) for name in names if name and (runs / name[0] / "model" / CARD).is_file()]
    return sorted(found, key=lambda trial: (trial[0] != ("clean",), trial))


def _rows(place: Path, attack: str, preset: str, seed: int) -> Iterator[dict[str, Any]]:
    """One row per model of a trial."""
    (folder,) = place.glob(f"{attack}-{preset}-seed{seed}-*")
    (trusted,) = place.glob("taken-in-*/trusted_set")
    confounder = folder / "confounder" if preset == "cbd" else None
    with tempfile.TemporaryDirectory() as temporary:
        policy = Gate(min_clean_accuracy=0, scan_alpha=ALWAYS)
        scan(folder / "model", confounder, trusted, Path(temporary) / "scan", policy=policy, seed=seed)
        found = json.loads((Path(temporary) / "scan" / "scan.json").read_text())
    for source, model in (("candidate", "deconfounded" if confounder else "undefended"), ("confounder", "confounder")):
        if found[source] is None:
            continue
        entry = found[source]
        row = next((row for row in found["transfer"] if row["source"] == source), {"k": 0, "n": 0, "null": 0.0})
        told = {name: entry[name] for name in ("statistic", "p_value", "log_norms", "unreached")}
        counts = {name: row[name] for name in ("k", "n", "null")} | {"rate": row["k"] / row["n"] if row["n"] else None}
        top = entry["log_norms"].index(min(entry["log_norms"]))
        yield (
            {"attack": attack, "preset": preset, "model": model, "seed": seed, "top": top}
            | told
            | counts
            | {"seconds": found["seconds"]}
            | about()
        )


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2g} ({', '.join(f'{value:.2g}' for value in known[:3])})" if known else ""


if __name__ == "__main__":
    sys.exit(main())
