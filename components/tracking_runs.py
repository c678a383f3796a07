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
from components.tracking_store import EXPERIMENT, LOCK, PATIENCE_SECONDS, OutOfReach, artifact_root, client, made, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Point = tuple[str, float, int, int]
"""Name, value, milliseconds since 1970, step."""


def open_run(workspace: Path, run_id: str) -> str:
    """MLflow's id of the run tagged `cbd.run_id`, made if there is none; on one machine a preset MLFLOW_RUN_ID is that run.

    Raises:
        EnvironmentFault: MLflow is out of reach.
    """
    with client(workspace) as mlflow:
        if preset := _preset():
            mlflow.set_tag(preset, "cbd.run_id", run_id)
            return preset
        with locked(workspace / LOCK):
            experiment, name = _experiment(mlflow, workspace), plain(run_id)

            def find() -> "Run | None":
                found = mlflow.search_runs([experiment], f"tags.`cbd.run_id` = '{name}'", max_results=1, order_by=["start_time ASC"])
                return found[0] if found else None

            return str(made(find, lambda: mlflow.create_run(experiment, tags={"cbd.run_id": name}, run_name=name)).info.run_id)


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

    Points that a server out of reach did not take are written when it is back. One that fails never stops the training: `fault` then says
    what happened, and one line is printed.
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
        self._away: str | None = None
        self._over = False
        self._queue: queue.SimpleQueue[list[Point] | None] = queue.SimpleQueue()
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

    def close(self, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """Waits until everything is written; may be called twice."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)
        self._over = True
        if self._thread.is_alive() and self.fault is None:
            self._tell(self._away or f"not all curves were written within {timeout_seconds:.0f} s")

    def _tell(self, fault: str) -> None:
        self.fault = fault
        print(f"[tracking] {fault}; training goes on, its curves are incomplete in MLflow", flush=True)

    def _work(self, workspace: Path, run_id: str, params: Mapping[str, Any] | None, tags: Mapping[str, str] | None) -> None:
        run, points, ended = None, list[Point](), False
        while not self._over:
            try:
                if run is None:
                    log_run(workspace, run_id, params=params, tags=tags)
                    run = open_run(workspace, run_id)
                _write(workspace, run, points)
            except OutOfReach as error:
                self._away = str(error)
                continue
            except (EnvironmentFault, ConfigError) as error:
                return self._tell(str(error))
            if ended:
                return
            points, ended = self._take()

    def _take(self) -> tuple[list[Point], bool]:
        """All points that wait, at least one batch, and whether that was the last."""
        points: list[Point] = []
        batch = self._queue.get()
        while batch is not None:
            points += batch
            if self._queue.empty():
                return points, False
            batch = self._queue.get()
        return points, True


def _write(workspace: Path, run: str, points: Sequence[Point]) -> None:
    """Adds points to the run; a point that was written before, with its answer lost, stays one."""
    with client(workspace) as mlflow:
        from mlflow.entities import Metric

        for start in range(0, len(points), 1000):
            mlflow.log_batch(run, metrics=[Metric(*point) for point in points[start : start + 1000]])


def _preset() -> str | None:
    """MLFLOW_RUN_ID, but None in a step on a cluster: the server there may give every task a run of its own, perhaps elsewhere."""
    from components.attestation import IMAGE

    return None if IMAGE in os.environ else os.environ.get("MLFLOW_RUN_ID")


def _experiment(mlflow: "MlflowClient", workspace: Path) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    has_server = tracking_uri(workspace).startswith("http")
    place = None if has_server else f"{artifact_root(workspace)}/{plain(name)}"

    def find() -> str | None:
        found = mlflow.get_experiment_by_name(name)
        return str(found.experiment_id) if found else None

    return made(find, lambda: str(mlflow.create_experiment(name, artifact_location=place)))


def plain(text: str) -> str:
    """Text without what MLflow's names and filters give a meaning."""
    return re.sub(r"[^\w .:/-]", "_", text)[:250]


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)
