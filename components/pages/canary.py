"""The canary: what was planted, what stage 1 saw of it and what stage 2 left of it."""

from typing import Any

from cbd.config import Gate
from cbd.errors import DataError
from cbd.gate.canary import covered
from cbd.measurements import CanaryResult, Planted, Share, read_canary
from cbd.rates import rate
from components.charts import axis, interval, nice
from components.pages import View, absent, judged_by
from components.pages.text import clip, count, of, percent
from components.summary import Run


def canary(run: Run) -> View:
    """One row per planted family; `trained` is false where the run has no canary."""
    outputs = run.outputs("canary")
    if not outputs:
        raise absent(run, "canary", "result")
    if outputs.get("canary_sha256") is None:
        return {"trained": False}
    found = run.artifact("canary", "canary", "canary.json")
    if not found:
        raise absent(run, "canary", "canary.json")
    told, policy = read_canary(found), judged_by(run)
    names = run.evaluation.get("class_names")
    highs = [rate(each.left.k, each.left.n, confidence=policy.confidence)["high"] or 0.0 for each in told.families]
    top = min(1.0, nice(1.05 * max(policy.max_canary_asr, *highs)))
    rows = [_family(planted, run, policy, names if isinstance(names, list) else [], top=top) for planted in told.families]
    sentence = run.check("A", "canary").get("sentence")
    shown = {"rows": rows, "axis": axis(top), "sentence": clip(sentence, 600) if sentence else None}
    return {"trained": True} | shown | _origin(told, run)


def _origin(told: CanaryResult, run: Run) -> View:
    """Which run and which data it is from."""
    data = run.outputs("ingest").get("digest")
    about = {"reused": bool(run.outputs("canary").get("reused")), "run_id": clip(told.run_id, 80), "steps": count(told.steps)}
    return about | {"num_images": count(told.num_images), "other_data": told.data_digest != data, "data": clip(told.data_digest[:12])}


def _family(planted: Planted, run: Run, policy: Gate, names: list[Any], *, top: float) -> View:
    check = run.check("A", f"canary: {planted.family}")
    left = rate(planted.left.k, planted.left.n, confidence=policy.confidence)
    result, style = str(check.get("result", "not judged")), str(check.get("result", "none")).lower()
    if result == "PASS" and not covered(planted, policy):
        result, style = "not covered", "none"
    drawn = ""
    if left["rate"] is not None and left["low"] is not None and left["high"] is not None:
        marks = [("limit", policy.max_canary_asr)]
        drawn = interval(left["low"], left["rate"], left["high"], top=top, style="deconfounded", marks=marks)
    settings = ", ".join(f"{name} {value}" for name, value in planted.trigger.items())
    return {
        "family": planted.family,
        "planted": f"{count(planted.num_poisoned)} images",
        "attack": clip(f"{planted.attack}{f': {settings}' if settings else ''}", 100),
        "target": clip(names[planted.target] if planted.target < len(names) else planted.target, 40),
        "found": _at_least(planted.found, policy),
        "learned": _at_least(planted.learned, policy),
        "left": of(left["k"], left["n"]),
        "high": percent(left["high"]),
        "limit": percent(policy.max_canary_asr),
        "svg": drawn,
        "result": clip(result, 20),
        "style": style if style in ("pass", "review", "block", "invalid", "inconclusive") else "none",
    }


def _at_least(share: Share, policy: Gate) -> View:
    if share.n == 0:
        raise DataError("canary.json: a share of no images")
    return {"of": of(share.k, share.n), "low": percent(rate(share.k, share.n, confidence=policy.confidence)["low"])}
