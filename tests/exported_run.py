"""A small finished run with everything that an export holds: real attestations, a signed model, a log."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from decided_case import POLICY, Case, make_bundle, make_case

from cbd.audit import append
from cbd.config import Validation
from cbd.files import sha256_file, write_json
from components.attestation import attest_canary, attest_evaluation, attest_scan, attest_training, attest_validation, attest_version
from components.decide import decide_step

Make = Callable[..., dict[str, Any]]
STEPS = {
    "ingest": ("dataset", "trusted_set"),
    "validate": ("validation",),
    "canary": ("canary",),
    "train_deconfounded": ("model",),
    "evaluate": ("evaluation",),
    "scan": ("scanned",),
}


def run_case(
    workspace: Path,
    make_evaluation: Make,
    *,
    run_id: str = "run-1",
    canary: dict[str, Any] | None = None,
    baseline: bool = False,
    **changes: Any,
) -> Case:
    """A finished run under `<workspace>/runs/<run id>`, as its steps leave it; `changes` as of `make_case`.

    `canary` is the content of `canary.json`; with `baseline` a model was trained without defence, too.
    """
    run, about = workspace / "runs" / run_id, {"workspace": str(workspace)}
    case = make_case(workspace, make_evaluation, run_id=f"runs/{run_id}/kfp", **changes)
    records, subject = str(run / "records"), case.subject
    (run / "report.html").write_text("<!doctype html><title>report</title>")
    assert subject.evaluation and subject.scan
    data = json.loads((subject.dataset / "dataset.json").read_text())["digest"]
    confounder = make_bundle(run / "kfp" / "confounder", data, kind="confounder", trial=changes.get("trial", False))
    measured = {"model": case.bundle, "trusted_set": subject.trusted_set, "policy": POLICY.model_dump(), **about}
    sets = {"dataset": subject.dataset, "trusted_set": subject.trusted_set}
    attest_validation(records, subject.validation / "validation.json", limits=Validation(), suite="5" * 64, **sets, **about)
    attest_version(records, subject.dataset, subject.trusted_set, revision="e" * 40, **about)
    attest_training(records, "train_confounder", confounder, **about)
    attest_training(records, "train_deconfounded", case.bundle, confounder=confounder, **about)
    if baseline:
        attest_training(records, "train_undefended", make_bundle(run / "kfp" / "undefended", data, kind="undefended"), **about)
    attest_evaluation(records, subject.evaluation / "evaluation.json", **measured)
    attest_scan(records, subject.scan / "scan.json", **measured)
    parts = {name: getattr(subject, name) for name in ("dataset", "trusted_set", "validation", "evaluation", "model")}
    parts |= {"scanned": subject.scan, "canary": _write_canary(case, canary)}
    if canary is not None:
        attest_canary(records, parts["canary"] / "canary.json", parameters={"seed": 0}, **about)
    for step, names in STEPS.items():
        outputs = {"paths": {name: str(parts[name]) for name in names}}
        write_json(run / "records" / f"{step}.json", {"step": step, "status": "succeeded", "outputs": outputs})
    artifacts = {name: SimpleNamespace(path=str(path)) for name, path in {**parts, "decision": case.decision}.items()}
    decide_step.python_func(records=records, run_id=run_id, policy=POLICY.model_dump(), **artifacts, **about)
    return dataclasses.replace(case, run_id=run_id)


def _write_canary(case: Case, canary: dict[str, Any] | None) -> Path:
    """The folder of the canary, empty without one; its result stands in the log."""
    folder = case.decision.parent / "canary"
    if canary is not None:
        trusted = json.loads((case.subject.trusted_set / "dataset.json").read_text())["digest"]
        write_json(folder / "canary.json", {**canary, "trusted_digest": trusted})
        append(case.workspace, "canary", {"sha256": sha256_file(folder / "canary.json"), "config_sha256": canary["config_sha256"]})
    return folder
