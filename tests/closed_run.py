"""A small run that was decided, and closed as the report closes it, in its folder of the workspace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decided_case import POLICY, make_case

from cbd.files import write_json
from components.decide import Subject, decide
from components.inventory import seal
from components.records import read_records

PATHS = {
    "ingest": ("dataset", "trusted_set"),
    "validate": ("validation",),
    "evaluate": ("evaluation",),
    "train_deconfounded": ("model",),
    "scan": ("scanned",),
    "decide": ("decision",),
}
FOLDERS = {"scanned": "scan"}


def make_run(workspace: Path, make_evaluation: Callable[..., dict[str, Any]], run_id: str = "run-1", **changes: Any) -> Path:
    """The folder of a run that was decided on; `changes` are `make_case`'s."""
    case = make_case(workspace, make_evaluation, run_id=run_id, **changes)
    run_dir = workspace / "runs" / run_id
    run_dir.mkdir(parents=True)
    (workspace / run_id).rename(run_dir / "kfp")
    parts = {name: getattr(case.subject, name) for name in Subject.__slots__}
    subject = Subject(**{name: path and run_dir / "kfp" / path.name for name, path in parts.items()})
    decide(subject, run_dir / "kfp" / "decision", policy=POLICY, workspace=workspace, run_id=run_id)
    (run_dir / "report.html").write_text(f"<title>{run_id}</title>")
    return run_dir


def close(run_dir: Path) -> None:
    """Writes the records of its steps and seals the run in the log."""
    verdict = json.loads((run_dir / "kfp" / "decision" / "decision.json").read_text())["verdict"]
    for step, artifacts in PATHS.items():
        paths = {name: str(run_dir / "kfp" / FOLDERS.get(name, name)) for name in artifacts}
        write_json(run_dir / "records" / f"{step}.json", {"step": step, "status": "succeeded", "outputs": {"paths": paths}})
    records = read_records(str(run_dir / "records"))
    seal(run_dir, run_dir.parent.parent, records=records, result={"verdict": verdict, "consistent": True})
