"""Unknown triggers: what was searched for on the models, how large it came out, and what it does to held-out images."""

import base64
import io
import math
from pathlib import Path
from typing import Any

from PIL import Image

from cbd.config import Gate
from cbd.images import Refused, decode, sniff
from cbd.rates import rate
from cbd.scan_record import Scan, ScannedModel, Transfer, read_scan, smallest
from components.charts import axis, interval, scatter
from components.pages import View, absent, judged_by
from components.pages.text import ABSENT, bounds, clip, count, number, of, percent
from components.summary import Run

MAX_BYTES, MAX_PIXELS = 8_000_000, 16_000_000
"""A larger picture of the triggers is not shown."""
MOST = 200
"""Classes in the chart."""
DECADES = (-3.0, 7.0)
"""Powers of ten in pixels beyond which a norm is drawn at the edge."""
STYLES = {"candidate": "deconfounded", "confounder": "confounder"}
METHODS = {"monte-carlo": "Monte-Carlo", "controls": "rank among harmless models", "not-applicable": "too few classes and controls to tell"}


def unknown(run: Run) -> View:
    """The norms per class, what stands out, the picture, and one row per trigger that was stamped on held-out images."""
    found = run.artifact("scan", "scanned", "scan.json")
    if not found:
        raise absent(run, "scan", "scan.json")
    scan, policy = read_scan(found), judged_by(run)
    listed = run.evaluation.get("class_names")
    names = [clip(name, 40) for name in listed] if isinstance(listed, list) else []
    models = {"candidate": scan.candidate} | ({"confounder": scan.confounder} if scan.confounder else {})
    told = {"models": [_model(source, model, names) for source, model in models.items()], "svg": _norms(models), "axis": axis(1.0)}
    told |= {"rows": [_transfer(row, run, policy, names) for row in scan.transfer], "alpha": number(policy.scan_alpha)}
    shown = {"picture": _picture(run.path("scan", "scanned", "triggers.png")), "more": max(0, scan.num_classes - MOST)}
    return told | shown | _about(scan)


def _about(scan: Scan) -> View:
    controls = count(scan.num_controls) if scan.num_controls else None
    return {
        "cal": count(scan.num_cal),
        "test": count(scan.num_test),
        "controls": controls,
        "scanned_confounder": scan.confounder is not None,
    }


def _model(source: str, model: ScannedModel, names: list[str]) -> View:
    target = smallest(model.log_norms)
    pixels = math.exp(min(model.log_norms[target], 50.0))
    about = {"name": source, "style": STYLES[source], "target": _name(target, names), "pixels": number(float(pixels))}
    found = {"statistic": number(model.statistic), "p_value": number(model.p_value), "method": METHODS[model.method]}
    return about | found | {"flagged": model.flagged is not None, "unreached": count(len(model.unreached)) if model.unreached else None}


def _norms(models: dict[str, ScannedModel]) -> Any:
    """A dot per class and model on a logarithmic scale of pixels."""
    logs = {
        name: [min(max(norm / math.log(10), DECADES[0]), DECADES[1]) for norm in model.log_norms[:MOST]] for name, model in models.items()
    }
    values = [value for series in logs.values() for value in series]
    low, high = math.floor(min(values)), max(math.ceil(max(values)), math.floor(min(values)) + 1)
    series = [(STYLES[name], [(value - low) / (high - low) for value in heights]) for name, heights in logs.items()]
    levels = [((place - low) / (high - low), f"{10.0**place:g}") for place in range(low, high + 1)]
    return scatter(series, levels=levels, label="size of the smallest trigger per class, in pixels")


def _transfer(row: Transfer, run: Run, policy: Gate, names: list[str]) -> View:
    check = run.check("C", f"trigger from the {row.source}")
    bound, limit, result = rate(row.k, row.n, confidence=policy.confidence), check.get("threshold"), str(check.get("result", "not judged"))
    drawn: Any = ""
    if bound["rate"] is not None and bound["low"] is not None and bound["high"] is not None:
        marks = [("null", row.null), *([("limit", float(limit))] if isinstance(limit, int | float) else [])]
        drawn = interval(bound["low"], bound["rate"], bound["high"], top=1.0, style=STYLES[row.source], marks=marks)
    style = result.lower() if result in ("PASS", "REVIEW", "BLOCK", "INCONCLUSIVE") else "none"
    told = {"source": row.source, "target": _name(row.target, names), "svg": drawn, "result": clip(result, 20), "style": style}
    told |= {"value": percent(bound["rate"]), "bounds": bounds(bound["low"], bound["high"]), "null": percent(row.null)}
    return told | {"of": of(row.k, row.n), "limit": percent(limit) if isinstance(limit, int | float) else ABSENT}


def _name(target: int, names: list[str]) -> str:
    return names[target] if target < len(names) else str(target)


def _picture(path: Path | None) -> str | None:
    """A data URI with the picture's pixels alone; None if it is no PNG of bounded size, or no file of its own."""
    if path is None or path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    data = path.read_bytes()
    try:
        if sniff(data) != "PNG":
            return None
        image = Image.fromarray(decode(data, max_pixels=MAX_PIXELS).pixels)
    except Refused:
        return None
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
