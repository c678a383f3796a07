"""A small finished run with everything that an export holds: real attestations, a signed model, a log."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from decided_case import POLICY, Case, make_bundle, make_case, record

from cbd.audit import append
from cbd.files import sha256_file, write_json
from components.attestation import attest_evaluation, attest_scan, attest_training, attest_version
from components.decide import decide_step

Make = Callable[..., dict[str, Any]]


def run_case(
    workspace: Path, make_evaluation: Callable[..., dict[str, Any]], *, canary: dict[str, Any] | None = None, **changes: Any
) -> Case:
    """A finished run under `<workspace>/runs/<run id>`, as its steps leave it; `changes` as of `make_case`."""
    case = make_case(workspace, make_evaluation, **changes)
    run, subject, about = workspace / "runs" / case.run_id, case.subject, {"workspace": str(workspace)}
    records = str(run / "records")
    Path(records).mkdir(parents=True)
    (run / "report.html").write_text("<!doctype html><title>report</title>")
    assert subject.evaluation and subject.scan
    data = json.loads((subject.dataset / "dataset.json").read_text())["digest"]
    confounder = make_bundle(workspace / case.run_id / "confounder", data, kind="confounder", trial=changes.get("trial", False))
    measured = {"model": case.bundle, "trusted_set": subject.trusted_set, "policy": POLICY.model_dump(), **about}
    attest_version(records, subject.dataset, subject.trusted_set, revision="e" * 40, **about)
    attest_training(records, "train_confounder", confounder, **about)
    attest_training(records, "train_deconfounded", case.bundle, confounder=confounder, **about)
    attest_evaluation(records, subject.evaluation / "evaluation.json", **measured)
    attest_scan(records, subject.scan / "scan.json", **measured)
    parts = {name: getattr(subject, name) for name in ("dataset", "trusted_set", "validation", "evaluation", "model")}
    parts |= {"scanned": subject.scan, "canary": _write_canary(case, canary), "decision": case.decision}
    artifacts = {name: SimpleNamespace(path=str(path)) for name, path in parts.items()}
    decide_step.python_func(records=records, run_id=case.run_id, policy=POLICY.model_dump(), **artifacts, **about)
    record(case)
    write_json(run / "records" / "canary.json", {"status": "succeeded", "outputs": {"paths": {"canary": str(parts["canary"])}}})
    return case


def _write_canary(case: Case, canary: dict[str, Any] | None) -> Path:
    """The folder of the canary, empty without one; its result stands in the log."""
    folder = case.workspace / case.run_id / "canary"
    if canary is not None:
        trusted = json.loads((case.subject.trusted_set / "dataset.json").read_text())["digest"]
        write_json(folder / "canary.json", {**canary, "trusted_digest": trusted})
        append(case.workspace, "canary", {"sha256": sha256_file(folder / "canary.json"), "config_sha256": canary["config_sha256"]})
    return folder
