"""What validation found, as a section of the report and as a page of its own with the first images that each finding is about."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.dataset import read_info, read_samples
from components.pages import View, absent, render
from components.pages.delivery import picture
from components.pages.text import clip, count, number, of, percent
from components.summary import Run

PAGE = "validation.html.j2"
MOST = 60
"""Images on the page."""


def validation(run: Run) -> View:
    """What validation found: critical failures stop the run, warnings are only told."""
    outputs = run.outputs("validate")
    if not outputs:
        raise absent(run, "validate", "result")
    return _findings(outputs, run.artifact("validate", "validation", "validation.json"))


def page(written: dict[str, Any], dataset: Path) -> str:
    """The page about one validation, with nothing loaded from elsewhere.

    Args:
        written: what stands in `validation.json`.
        dataset: the data set that was validated; of an altered one no image is shown.
    """
    wanted = list(dict.fromkeys(sample for check in written["checks"] for sample in check["examples"]))[:MOST]
    about = read_info(dataset) if written["data_digest"] else None
    known = _images(dataset, wanted, about.class_names) if about else {}
    failed = [check for check in written["checks"] if not check["success"]]
    shown = [
        {
            "sentence": check["sentence"],
            "result": check["severity"],
            "style": _style(check),
            "images": [known[sample] for sample in check["examples"] if sample in known],
        }
        for check in failed
    ]
    facts = {"digest": written["data_digest"], "supplier": None, "num_images": None, "num_classes": None}
    if about:
        facts |= {"supplier": clip(about.supplier), "num_images": count(about.num_images), "num_classes": count(len(about.class_names))}
    return render({"validation": _findings(written, written), "failed": shown} | facts, PAGE)


def _images(dataset: Path, samples: list[str], names: Sequence[str]) -> dict[str, View]:
    """Picture, label and path of the named samples; they were decoded with limits when they were taken in."""
    found = {}
    for row in read_samples(dataset, samples, columns=["image", "sample_id", "label", "original_path", "source"]):
        label = row["label"]
        found[row["sample_id"]] = {
            "picture": picture(row["image"]["bytes"]),
            "label": clip(names[label] if label is not None and 0 <= label < len(names) else label, 28),
            "path": clip(row["original_path"], 60),
            "supplier": clip(row["source"], 28),
        }
    return found


def _findings(told: dict[str, Any], written: dict[str, Any]) -> View:
    found = {key: [_finding(item) for item in told.get(key) or []] for key in ("critical", "warnings")}
    patches = [
        {"class_name": clip(patch["class_name"], 60), "share": percent(patch["share"]), "elsewhere": percent(patch["elsewhere"])}
        | {"num_images": count(patch["num_images"]), "place": clip(patch["place"], 80)}
        for patch in written.get("patches") or []
    ]
    return {
        "passed": told.get("passed") is True,
        "checks": [_row(check) for check in written.get("checks") or []],
        "patches": patches,
    } | found


def _row(check: dict[str, Any]) -> View:
    found, total = check.get("unexpected_count"), check.get("num_images")
    observed = of(found, total) if found is not None else number(check.get("observed"))
    result = "passed" if check["success"] else check["severity"]
    kind = {"column": check["column"] or "the table", "kind": check["name"].replace("_", " "), "observed": observed}
    return kind | {"limit": number(check.get("limit")), "result": result, "style": _style(check)}


def _style(check: dict[str, Any]) -> str:
    return "pass" if check["success"] else "block" if check["severity"] == "critical" else "review"


def _finding(item: Any) -> str:
    told = item.get("sentence") if isinstance(item, dict) else item
    return clip(told if isinstance(told, str) else json.dumps(item, ensure_ascii=False, sort_keys=True), 300)
