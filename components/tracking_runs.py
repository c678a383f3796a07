"""MLflow's runs: found by our run id, filled while training goes on, closed at the end.

MLflow takes seconds to import, so it is imported inside the functions, and `LiveCurves` does so in a thread beside the training.
"""

import math
import os
import queue
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from cbd.errors import ConfigError, EnvironmentFault
from cbd.files import locked
from components.tracking_store import EXPERIMENT, LOCK, artifact_root, client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def open_run(workspace: Path, run_id: str) -> str:
    """MLflow's id of the run tagged `cbd.run_id`, made if there is none; a preset MLFLOW_RUN_ID is that run.

    Raises:
        EnvironmentFault: MLflow is out of reach.
    """
    with client(workspace) as mlflow:
        preset = os.environ.get("MLFLOW_RUN_ID")
        if preset:
            mlflow.set_tag(preset, "cbd.run_id", run_id)
            return preset
        with locked(workspace / LOCK):
            experiment = _experiment(mlflow, workspace)
            found = mlflow.search_runs([experiment], f"tags.`cbd.run_id` = '{plain(run_id)}'", max_results=1, order_by=["start_time ASC"])
            if found:
                return str(found[0].info.run_id)
            return str(mlflow.create_run(experiment, tags={"cbd.run_id": plain(run_id)}, run_name=plain(run_id)).info.run_id)


def log_run(
    workspace: Path,
    run_id: str,
    *,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float | None] | None = None,
    artifacts: Sequence[Path] = (),
) -> None:
    """Adds to the tracking run: parameters (nested ones flattened with dots), tags, final metrics, files and folders.

    Raises:
        EnvironmentFault: MLflow is out of reach.
    """
    run = open_run(workspace, run_id)
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    known = [Param(name, value) for name, value in flatten(params or {}).items()]
    measured = [Metric(plain(name), float(value), now, 0) for name, value in (metrics or {}).items() if _is_number(value)]
    with client(workspace) as mlflow:
        for start in range(0, len(known), 100):
            mlflow.log_batch(run, params=known[start : start + 100])
        mlflow.log_batch(run, metrics=measured, tags=[RunTag(name, str(value)) for name, value in (tags or {}).items()])
        for path in artifacts:
            if path.is_dir():
                mlflow.log_artifacts(run, str(path), path.name)
            elif path.exists():
                mlflow.log_artifact(run, str(path))


def close_run(
    workspace: Path | str, run_id: str, *, status: str, artifacts: Sequence[Path] = (), tags: Mapping[str, str] | None = None
) -> None:
    """Ends the tracking run with `status` (FINISHED, FAILED or KILLED) and keeps `artifacts` and `tags` with it.

    Raises:
        EnvironmentFault: MLflow is out of reach.
    """
    place = Path(workspace)
    log_run(place, run_id, tags=tags, artifacts=artifacts)
    with client(place) as mlflow:
        mlflow.set_terminated(open_run(place, run_id), status)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as `section.key`: text, cut at MLflow's 6,000 characters."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)[:6000]
    return flat


class LiveCurves:
    """Curves that are seen while training goes on: a thread imports MLflow and writes what `log` puts in its queue.

    A server that fails never stops the training: `fault` then says what happened, and one line is printed.
    """

    def __init__(
        self,
        workspace: Path,
        run_id: str,
        *,
        prefix: str = "",
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the thread; `prefix` stands before each metric's name, `params` and `tags` are added to the run."""
        self.fault: str | None = None
        self._queue: queue.SimpleQueue[list[tuple[str, float, int, int]] | None] = queue.SimpleQueue()
        self._prefix = prefix
        self._thread = threading.Thread(target=self._work, args=(workspace, run_id, params, tags), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Queues one point per metric; what is None or not finite has no point."""
        now = int(time.time() * 1000)
        self._queue.put([(self._prefix + name, float(value), now, step) for name, value in metrics.items() if _is_number(value)])

    def close(self, timeout_seconds: float = 60.0) -> None:
        """Waits until everything is written; may be called twice."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive() and self.fault is None:
            self._tell(f"not all curves were written within {timeout_seconds:.0f} s")

    def _tell(self, fault: str) -> None:
        self.fault = fault
        print(f"[tracking] {fault}; training goes on, its curves are incomplete in MLflow", flush=True)

    def _work(self, workspace: Path, run_id: str, params: Mapping[str, Any] | None, tags: Mapping[str, str] | None) -> None:
        try:
            log_run(workspace, run_id, params=params, tags=tags)
            self._write(workspace, open_run(workspace, run_id))
        except (EnvironmentFault, ConfigError) as error:
            self._tell(str(error))

    def _write(self, workspace: Path, run: str) -> None:
        from mlflow.entities import Metric

        with client(workspace) as mlflow:
            ended = False
            while not ended:
                points, ended = self._take()
                for start in range(0, len(points), 1000):
                    mlflow.log_batch(run, metrics=[Metric(*point) for point in points[start : start + 1000]])

    def _take(self) -> tuple[list[tuple[str, float, int, int]], bool]:
        """All points that wait, at least one batch, and whether that was the last."""
        points: list[tuple[str, float, int, int]] = []
        batch = self._queue.get()
        while batch is not None:
            points += batch
            if self._queue.empty():
                return points, False
            batch = self._queue.get()
        return points, True


def _experiment(mlflow: "MlflowClient", workspace: Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    found = mlflow.get_experiment_by_name(name)
    if found:
        return str(found.experiment_id)
    has_server = tracking_uri(workspace).startswith("http")
    return str(mlflow.create_experiment(name, artifact_location=None if has_server else f"{artifact_root(workspace)}/{plain(name)}"))


def plain(text: str) -> str:
    """Text without what MLflow's names and filters give a meaning."""
    return re.sub(r"[^\w .:/-]", "_", text)[:250]


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
