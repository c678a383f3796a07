"""What came of a run: read from its records, and turned into an exit code and one JSON object."""

import tempfile
from pathlib import Path
from typing import Any

from cbd.audit import append
from cbd.dataset import INFO, read_info
from cbd.errors import CbdError, DataError
from cbd.files import sha256_file, write_json
from cbd.log_store import open_log
from components import STEPS
from components.records import read_records

EXIT_CODES = {"PASS": 0, "REVIEW": 10, "BLOCK": 11, "INCONCLUSIVE": 12, "INVALID": 13, "NOTHING_NEW": 14}


class RunFailed(CbdError):
    """A step failed or was killed; the message and exit code are the step's own where it told them."""

    def __init__(self, message: str, run_dir: Path, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.run_dir = run_dir
        self.exit_code = exit_code


def find_run(run: str, workspace: Path) -> Path:
    """The folder of a run, given its id or the folder itself.

    Raises:
        DataError: there is no such run.
    """
    for folder in (Path(run), workspace / "runs" / run):
        if (folder / "records").is_dir():
            return folder.resolve()
    known = sorted((path.name for path in (workspace / "runs").glob("*")), reverse=True)[:1]
    hint = f"the latest in {workspace} is {known[0]}" if known else f"{workspace} holds no run; name another with --workspace"
    raise DataError(f"{run}: no such run; {hint}")


def find_artifact(run_dir: Path, step: str, artifact: str) -> Path:
    """The folder in which a step of a run left an artifact; shards of a data set that it did not keep come back from the data registry.

    Raises:
        DataError: the step did not get that far, or the data registry does not have the data set.
    """
    record = read_records(str(run_dir / "records")).get(step, {})
    path = record.get("outputs", {}).get("paths", {}).get(artifact)
    if not path or not Path(path).exists():
        raise DataError(
            f"{run_dir}: step {step} left no {artifact} (it {record.get('status', 'did not run')}); see {run_dir / 'report.html'}"
        )
    if (Path(path) / INFO).is_file():
        _bring_shards(Path(path), run_dir.parent.parent)
    return Path(path)


def _bring_shards(dataset: Path, workspace: Path) -> None:
    from components.places import DELIVERY, POISONED, TRUSTED
    from components.registry import fetch, find

    info = read_info(dataset)
    if all((dataset / name).is_file() for name in info.shards):
        return
    versions = (find(workspace, info.digest, kind=kind) for kind in (DELIVERY, TRUSTED, POISONED))
    if (version := next(filter(None, versions), None)) is None:
        raise DataError(f"{dataset}: its shards are neither there nor in the data registry of {workspace}; give the run's own workspace")
    with tempfile.TemporaryDirectory(dir=dataset.parent) as folder:
        fetch(version.tag, Path(folder) / "dataset", workspace=workspace)
        for name in info.shards:
            (Path(folder) / "dataset" / name).replace(dataset / name)


def finish(run_dir: Path, succeeded: bool) -> dict[str, Any]:
    """The result of a run whose pipeline has ended (see `write_result`). The report is made here if its own step could not make it.

    Args:
        run_dir: the run's folder.
        succeeded: what `local.run` returned.

    Raises:
        RunFailed: a step failed or was killed, the wrong branch ran, or the runner broke down.
    """
    if not (run_dir / "report.html").is_file():
        write_report(run_dir)
    _raise_failure(run_dir, succeeded)
    result = write_result(run_dir)
    ended = result["verdict"] in EXIT_CODES or result["nothing_new"]
    if result["alarms"] or result["stopped"] or not ended:
        reasons = [*result["alarms"], *result["stopped"].values(), "the pipeline ended without a verdict"]
        raise RunFailed(f"the run cannot be relied on: {reasons[0]}", run_dir)
    return result


def write_result(run_dir: Path) -> dict[str, Any]:
    """What the run came to, also written to `result.json`; rates of confounder and baseline are bare fractions there."""
    from components.summary import summary

    records = str(run_dir / "records")
    result = as_fractions(summary(records, run_dir)) | {"report": str(run_dir / "report.html"), "workspace": str(run_dir.parent.parent)}
    write_json(run_dir / "result.json", result)
    return result


def write_report(run_dir: Path) -> Path:
    """The page of a run, written from its records."""
    from components.report import report

    page = run_dir / "report.html"
    workspace = run_dir.parent.parent
    report(str(run_dir / "records"), page, workspace=str(workspace))
    if open_log(workspace).exists():
        append(workspace, "report", {"run_id": run_dir.name, "page_sha256": sha256_file(page)})
    write_result(run_dir)
    return page


def _raise_failure(run_dir: Path, succeeded: bool) -> None:
    """Raises what the first failed step said."""
    records, log = read_records(str(run_dir / "records")), run_dir / "pipeline.log"
    for name in STEPS:
        record = records.get(name, {"status": "absent"})
        if record["status"] == "failed":
            error = record["error"]
            if "traceback" not in error:
                raise RunFailed(error["message"], run_dir, exit_code=error["exit_code"])
            raise RunFailed(f"step {name} failed: {error['type']}: {error['message']}; see {log}", run_dir)
        if record["status"] == "running":
            raise RunFailed(f"step {name} was killed before it finished; run again to resume, or see {log}", run_dir)
    if not succeeded:
        raise RunFailed(f"the pipeline runner failed; see the end of {log}", run_dir)


def as_fractions(result: dict[str, Any]) -> dict[str, Any]:
    """The result with the rates of confounder and baseline as fractions; their counts stay in `evaluation.json`."""
    fractions = {key: {name: _fraction(value) for name, value in result[key].items()} for key in ("confounder", "baseline") if result[key]}
    return result | fractions


def _fraction(value: Any) -> Any:
    return value["rate"] if isinstance(value, dict) else value
