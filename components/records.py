"""What every step leaves behind: `<records>/<step>.json`, from which the report and the command line read, and beside it its artifacts."""

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from cbd.errors import CbdError
from cbd.files import replacing, sha256_file, write_json

TOLD_AS: ContextVar[str | None] = ContextVar("told_as", default=None)
"""The step as whose progress that of others is told; None: each tells its own."""
ARTIFACTS = "artifacts"
"""Folder of a run in which steps keep artifacts that would otherwise lie where only they can read them."""
IMAGE = "cbd-python:by-digest"
"""Base image of every component: a placeholder that `cbd compile --image` fills in."""


def kfp_component(function: Callable[..., Any]) -> Any:
    """The KFP component with this body; inside a running task, where kfp loads only what a task needs, the plain function."""
    from kfp import dsl

    return dsl.component(base_image=IMAGE, install_kfp_package=False)(function) if hasattr(dsl, "component") else function


@contextlib.contextmanager
def step(records: str, name: str) -> Iterator[dict[str, Any]]:
    """Records a step: `running` when it starts, then `succeeded` with the outputs put into the yielded dict, or `failed`.

    A step that is killed stays `running`: that is how the report sees it. The artifacts that the outputs name under `paths` are kept in
    the run's folder where they do not lie there already (see `_kept`), and the record tells the SHA-256 of each file under `kept`.
    """
    path = Path(records) / f"{name}.json"
    started = time.time()
    outputs: dict[str, Any] = {}
    record: dict[str, Any] = {"step": name, "status": "running", "started": started, "import_seconds": _seconds_since_start(started)}
    write_json(path, record)
    try:
        yield outputs
        _keep_artifacts(record, outputs, path.parents[1] / ARTIFACTS / name)
    except BaseException as error:
        told = isinstance(error, CbdError)
        record["status"] = "failed"
        record["error"] = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code if told else 1}
        if not told:
            record["error"]["traceback"] = traceback.format_exc()
        raise
    else:
        record["status"] = "succeeded"
        record["outputs"] = outputs
    finally:
        record["seconds"] = time.time() - started
        with contextlib.suppress(CbdError) if record["status"] == "failed" else contextlib.nullcontext():
            write_json(path, record)


def _keep_artifacts(record: dict[str, Any], outputs: dict[str, Any], folder: Path) -> None:
    if "paths" in outputs:
        outputs["paths"] = {key: _kept(source, folder / key) for key, source in outputs["paths"].items()}
    if folder.is_dir():
        record["kept"] = {str(file): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _kept(source: str, target: Path) -> str:
    """Where an artifact lies in the run's folder, which every later step and reader can open: it is copied to `target` if need be.

    On a cluster a step's artifacts lie in its own pod, and nobody else's. Shards of data sets are left out: the data registry has them.
    """
    from cbd.dataset import SHARDS

    place, run_dir = Path(source), target.parents[2]
    target = target.with_suffix(place.suffix)
    if not place.exists() or place.resolve().is_relative_to(run_dir.resolve()):
        return source
    with replacing(target) as temporary:
        if place.is_dir():
            shutil.copytree(place, temporary, ignore=shutil.ignore_patterns(SHARDS))
        else:
            shutil.copyfile(place, temporary)
    return str(target)


@contextlib.contextmanager
def told_as(step_name: str) -> Iterator[None]:
    """Inside, progress is told as that of the step which calls others for its own ends."""
    before = TOLD_AS.set(step_name)
    try:
        yield
    finally:
        TOLD_AS.reset(before)


def read_records(records: str) -> dict[str, dict[str, Any]]:
    """All records under the prefix, by step name; a missing step has no entry."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(records).glob("*.json"))}


def progress(step_name: str, done: int, total: int, note: str = "") -> None:
    """One line that a person reads in a pod's log and the command line draws as a bar: `[step] done/total note`."""
    if (outer := TOLD_AS.get()) is not None:
        step_name, note = outer, f"{step_name.removeprefix('train_')} {note}"
    print(f"[{step_name}] {done}/{total} {note}".rstrip(), flush=True)


def _seconds_since_start(now: float) -> float | None:
    """Seconds from the start of this process until `now`, where the system tells: imports and start-up of a step."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, IndexError, ValueError):
        return None
    return round(max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK") - (time.time() - now)), 3)
