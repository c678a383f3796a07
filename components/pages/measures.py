"""Verdict and measurements: checks, rates with their intervals, curves, histograms."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cbd.errors import CbdError
from cbd.evidence import MAX_P_VALUE
from cbd.truth import Truth, read_truth
from components.charts import axis, histogram, interval, lines, nice
from components.pages import View, absent, judged_by
from components.pages.text import ABSENT, THIN, bounds, clip, count, number, of, percent
from components.summary import Run

MEANINGS = {
    "PASS": "Promoted: this model is now the champion.",
    "REVIEW": "Held back: registered as the candidate until a person decides.",
    "INCONCLUSIVE": "Held back: too few images to tell. No alias was set.",
    "INVALID": "Held back: the test could not have seen a backdoor. No alias was set.",
    "BLOCK": "Stopped: this model must not be used. No alias was set.",
}
HISTORIES = (
    ("confounder", "train_confounder", ("confounder",)),
    ("deconfounded", "train_deconfounded", ("model", "evidence")),
    ("undefended", "train_undefended", ("model",)),
)
MODELS = {"deconfounded": "deconfounded model", "confounder": "confounder", "undefended": "undefended model", "champion": "champion"}


def face(run: Run, result: dict[str, Any]) -> View:
    """The verdict in words, or what stands in its place when there is none."""
    verdict = result["verdict"]
    if result["alarms"]:
        said = f"The decision on record says {verdict}; do" if verdict else "Do"
        return {
            "word": "ALARM",
            "style": "alarm",
            "meaning": f"{said} not rely on this run.",
            "sentence": "What ran is not what the verdict demands.",
        }
    if run.nothing_new:
        sentence = clip(str(result["sentence"]), 300)
        return {"word": "NOTHING NEW", "style": "none", "meaning": "Nothing was trained, and no alias moved.", "sentence": sentence}
    if verdict is None:
        return {
            "word": "NO VERDICT",
            "style": "none",
            "meaning": "Nothing was promoted.",
            "sentence": "The run stopped before it could decide.",
        }
    meaning = MEANINGS[verdict]
    if "register" not in run.records:
        meaning = "Stopped: the data was refused, so nothing was trained and nothing was registered."
    elif run.trial:
        meaning = "A trial on data poisoned on purpose: whatever the verdict, no alias moves."
    return {
        "word": verdict,
        "style": verdict.lower(),
        "meaning": meaning,
        "sentence": clip(str(result["sentence"] or "").removeprefix(f"{verdict}: "), 1500),
    }


def checks(run: Run) -> View:
    """One row per check of the decision: what did not pass comes first."""
    if not run.decision:
        raise absent(run, "decide", "decision")
    rows = sorted((_check(check) for check in run.decision["checks"]), key=lambda row: row["style"] == "pass")
    return {"rows": rows, "confidence": _confidence(run)}


def rates(run: Run) -> View:
    """Clean accuracy and the attack success rate of the known attack, each model on the same axis."""
    evaluation = _evaluation(run)
    baseline, confounder = run.baseline or {}, evaluation.get("confounder") or {}
    accuracy = [("deconfounded", evaluation.get("clean_accuracy")), ("undefended", baseline.get("ca"))]
    if champion := evaluation.get("champion"):
        accuracy.append(("champion", {"k": champion["k"], "n": champion["n"], "rate": champion["k"] / champion["n"]}))
    groups = [("Clean accuracy", "higher is better", accuracy)]
    for name in _known_attacks(evaluation):
        models = [("deconfounded", evaluation["attack_success_rate"][name]), ("confounder", confounder.get("asr"))]
        groups.append((f"Attack success rate: {clip(name)}", "lower is better", [*models, ("undefended", baseline.get("asr"))]))
    shown = [
        {"name": name, "hint": hint, "rows": [_rate(style, rate) for style, rate in rows if isinstance(rate, dict)]}
        for name, hint, rows in groups
    ]
    return {"groups": [group for group in shown if group["rows"]], "axis": axis(1.0)}


def battery(run: Run) -> View:
    """The known triggers on the candidate: excess success at the worst target, against what harmless triggers show."""
    evaluation = _evaluation(run)
    found, names = evaluation["battery"], evaluation["class_names"]
    if not found:
        raise absent(run, "evaluate", "trigger battery")
    limits = {check.get("name"): check.get("threshold") for check in run.decision.get("checks", []) if check.get("check") == "B"}
    values = [value for row in found for value in (row.get("high"), row.get("null"), limits.get(row["trigger"])) if value]
    top = min(1.0, nice(1.05 * max([0.05, *values])))
    return {"rows": [_trigger(row, names, limits.get(row["trigger"]), top) for row in found], "axis": axis(top)}


def curves(run: Run) -> View:
    """Loss and accuracy of each model while it was trained."""
    charts = [chart for style, step, keys in HISTORIES for chart in _charts(style, _history(run, step, keys))]
    if not charts:
        raise absent(run, "train_confounder", "history")
    return {"charts": charts}


def losses(run: Run) -> View:
    """How hard the confounder finds each training image: backdoored images are the easy ones once it holds the trigger."""
    table, separation = _confounder_losses(run), run.separation
    values = np.log10(np.maximum(table["confounder_loss"], 1e-6))
    low, high = np.floor(values.min() * 4) / 4, np.ceil(values.max() * 4) / 4 + 1e-9
    groups = _split(run, table["sample_id"], values, np.linspace(low, max(high, low + 1), 49))
    names = [(place, f"{10.0**place:g}") for place in range(int(np.ceil(low)), int(high) + 2)]
    edges = [float(edge) for edge in np.linspace(low, max(high, low + 1), 49)]
    drawn = histogram(edges, groups, label="histogram of the confounder's losses", names=names)
    told = {name: number(separation.get(name)) for name in ("p_value", "gap")} | {"share": percent(separation.get("share"))}
    p_value = separation.get("p_value")
    told["reversed"] = isinstance(p_value, float) and p_value <= MAX_P_VALUE
    crowds = [
        {"class_name": crowd["class_name"], "num_images": count(crowd["num_images"])}
        | {"contradicted": percent(crowd["contradicted"]), "p_value": number(crowd["p_value"])}
        for crowd in separation.get("crowds") or []
    ]
    styles = [style for style, _ in groups]
    told["curve"] = _evidence_curve(separation.get("curve") or [])
    return {"svg": drawn, "styles": styles, "separated": separation.get("separated"), "crowds": crowds} | told


def _evidence_curve(curve: list[dict[str, Any]]) -> Any:
    """The evidence for the reversal by the pilot's steps; None where it was not measured."""
    points = [
        (float(row["step"]), float(row["evidence"])) for row in curve if _is_number(row.get("step")) and _is_number(row.get("evidence"))
    ]
    if not points:
        return None
    return lines([("confounder", points)], top=nice(max(3.0, *(value for _, value in points))), label="evidence for the reversal by step")


def weights(run: Run) -> View:
    """How much each training image counts in the training of the deconfounded model."""
    table = evidence(run)
    edges = np.linspace(0, 1, 26)
    groups = _split(run, table["sample_id"], table["sample_weight"], edges)
    names = [(place, f"{place:g}") for place in (0, 0.25, 0.5, 0.75, 1)]
    drawn = histogram([float(edge) for edge in edges], groups, label="histogram of the sample weights", names=names)
    low = int((table["sample_weight"] < 0.5).sum())
    return {"svg": drawn, "styles": [style for style, _ in groups], "low": of(low, len(table["sample_weight"]))}


def evidence(run: Run) -> dict[str, Any]:
    """The evidence table, column by column; raises DataError if there is none."""
    path = run.path("train_deconfounded", "evidence", "evidence.parquet")
    if path is None or not path.is_file():
        raise absent(run, "train_deconfounded", "evidence table")
    table = pq.read_table(path)
    if not table.num_rows:
        raise absent(run, "train_deconfounded", "row of evidence")
    return {name: table[name].to_numpy() for name in table.column_names}


def _confounder_losses(run: Run) -> dict[str, Any]:
    """Sample ids and losses: the confounder's own table stands in where training was stopped before the evidence was written."""
    path = run.path("train_confounder", "confounder", "losses.parquet")
    if run.outputs("train_deconfounded") or path is None or not path.is_file():
        return evidence(run)
    table = pq.read_table(path, columns=["sample_id", "confounder_loss"])
    return {name: table[name].to_numpy() for name in table.column_names}


def truth(run: Run) -> Truth | None:
    """What is known about the poison, where the run was given it."""
    path = run.path("ingest", "truth")
    return read_truth(path) if path and path.is_dir() else None


def _evaluation(run: Run) -> dict[str, Any]:
    evaluation = run.evaluation
    if not evaluation:
        raise absent(run, "evaluate", "evaluation")
    return evaluation


def _known_attacks(evaluation: dict[str, Any]) -> list[str]:
    triggers = {row["trigger"] for row in evaluation.get("battery") or []}
    return [name for name in evaluation.get("attack_success_rate") or {} if name not in triggers]


def _confidence(run: Run) -> str:
    """Of the attempt, as people read it; a decision that does not tell it properly still has its checks shown."""
    try:
        return f"{100 * judged_by(run).confidence:.6g}{THIN}%"
    except (CbdError, LookupError, TypeError):
        return "the confidence of the policy"


def _check(check: dict[str, Any]) -> View:
    told = percent if check.get("n") else number
    interval_text = bounds(check.get("low"), check.get("high")) if check.get("n") else ABSENT
    result = str(check.get("result", "not measured"))
    return {
        "check": clip(check.get("check", ABSENT), 40),
        "name": clip(check.get("name", ABSENT), 80),
        "value": told(check.get("value")),
        "of": of(check.get("k"), check.get("n")),
        "bounds": interval_text,
        "threshold": told(check.get("threshold")),
        "result": result,
        "style": result.lower() if result in MEANINGS else "none",
        "sentence": clip(check.get("sentence", ""), 600),
    }


def _rate(style: str, rate: dict[str, Any]) -> View:
    value = float(rate["rate"])
    low, high = rate.get("low"), rate.get("high")
    drawn = interval(value if low is None else low, value, value if high is None else high, top=1.0, style=style)
    return {"name": MODELS[style], "svg": drawn, "value": percent(value), "bounds": bounds(low, high), "of": of(rate["k"], rate["n"])}


def _trigger(row: dict[str, Any], names: Sequence[str], limit: float | None, top: float) -> View:
    marks = [(style, value) for style, value in (("null", row.get("null")), ("limit", limit)) if value is not None]
    measured_rate = row.get("rate") is not None
    drawn = interval(row["low"], row["rate"], row["high"], top=top, style="deconfounded", marks=marks) if measured_rate else ""
    values = {"value": percent(row.get("rate")), "bounds": bounds(row.get("low"), row.get("high")), "of": of(row.get("k"), row.get("n"))}
    target = row.get("target")
    named = clip(names[target], 40) if isinstance(target, int) else ABSENT
    return {
        "name": clip(row["trigger"], 60),
        "target": named,
        "svg": drawn,
        "null": percent(row.get("null")),
        "limit": percent(limit),
    } | values


def _history(run: Run, step: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    paths = [run.path(step, key, "history.jsonl") for key in keys]
    path = next((path for path in paths if path and path.name == "history.jsonl" and path.is_file()), None)
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    rows = [json.loads(line, parse_constant=lambda _: None) for line in lines if line.strip()]
    return [row for row in rows if isinstance(row, dict)]


def _charts(style: str, history: list[dict[str, Any]]) -> list[View]:
    unit = "step" if any("step" in row for row in history) else "epoch"
    charts = []
    for name in ("loss", "accuracy"):
        points = [(float(row[unit]), float(row[name])) for row in history if _is_number(row.get(unit)) and _is_number(row.get(name))]
        if points:
            top = 1.0 if name == "accuracy" else nice(max(value for _, value in points))
            told = percent(points[-1][1]) if name == "accuracy" else number(points[-1][1])
            drawn = lines([(style, points)], top=top, label=f"{name} of the {MODELS[style]} by {unit}", rate=name == "accuracy")
            charts.append(
                {
                    "svg": drawn,
                    "model": MODELS[style],
                    "style": style,
                    "name": name,
                    "unit": unit,
                    "last": told,
                    "count": count(points[-1][0]),
                }
            )
    return charts


def _split(run: Run, sample_ids: Any, values: Any, edges: Any) -> list[tuple[str, list[int]]]:
    """Counts per bin; clean and poisoned images apart where the truth is known."""
    known = truth(run)
    if known is None:
        return [("clean", _counts(values, edges))]
    poisoned = {sample_id for sample_id, role in zip(known.sample_ids, known.roles, strict=True) if role == "poison"}
    mask = np.array([sample_id in poisoned for sample_id in sample_ids], bool)
    return [("poison", _counts(values[mask], edges)), ("clean", _counts(values[~mask], edges))]


def _counts(values: Any, edges: Any) -> list[int]:
    return [int(bin_count) for bin_count in np.histogram(values, bins=edges)[0]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def worst_attack(evaluation: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The attack with the highest upper bound: of the known attacks if there are any, else of the battery."""
    known = _known_attacks(evaluation)
    found = [(name, evaluation["attack_success_rate"][name]) for name in known]
    found = found or [(f"worst of {len(evaluation.get('battery') or [])} triggers", row) for row in evaluation.get("battery") or []]
    usable = [pair for pair in found if pair[1].get("high") is not None]
    return max(usable, key=lambda pair: pair[1]["high"], default=None)
