"""One run on a Kubeflow Pipelines server, from the checks at the door to the result."""

import contextlib
import datetime
import json
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd.config import Params
from cbd.errors import CbdError, ConfigError, EnvironmentFault
from pipelines import overlays
from pipelines.compile import check_image, compile_pipeline
from pipelines.kubeflow import Missing, asked, connect, created, experiment_of, link_to, listed, named
from pipelines.launch import NAME, Order, check_names, pipeline_arguments
from pipelines.progress import printable

if TYPE_CHECKING:
    from kfp import Client

WORKSPACE = Path(overlays.WORKSPACE)
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
POLL_SECONDS = 15.0
PATIENCE = 20
"""How much longer than usual a server may be out of reach while a run is followed: 10 minutes."""


@dataclass(frozen=True)
class Cluster:
    """Where and how a pipeline runs."""

    image: str
    """NAME@sha256:DIGEST."""
    overlay: str
    """KIND or KIND:POOL."""
    namespace: str = ""
    """On a server that serves several users."""
    service_account: str | None = None


def submit(order: Order, params: Params, cluster: Cluster, *, run_id: str = "", wait: bool = True) -> dict[str, Any]:
    """What the run came to (as `outcome.finish` tells it), with the links `run` and `report`; with `wait=False` only `run_id` and `run`.

    A run that is there already under `run_id` is followed, not started again.

    Raises:
        ConfigError: refused at the door or by the server; with `wait`, MLFLOW_TRACKING_URI is not set.
        EnvironmentFault: the server is out of reach, or the tracking server holds no result.
        CbdError: the run failed.
    """
    if wait and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("MLFLOW_TRACKING_URI is not set: the verdict is read from the tracking server; set it, or give --no-wait")
    run_id = _named(run_id)
    client, started = _started(run_id, arguments(order, params, run_id), cluster, "retrain", gpus=params.training.gpus)
    link = link_to(started.run_id)
    print(f"run: {link}", file=sys.stderr)
    if not wait:
        return {"run_id": run_id, "run": link}
    ended = _followed(client, started.run_id, run_id)
    return {**_result(run_id, str(ended.state), link), "run_id": run_id, "run": link}


def submit_redteam(given: dict[str, Any], cluster: Cluster, *, run_id: str = "", wait: bool = True) -> dict[str, Any]:
    """Where the red team's table lies in the workspace of the cluster, and the link `run`; with `wait=False` only `run_id` and `run`.

    Args:
        given: parameters of the pipeline `redteam`.
        cluster: where and how it runs.
        run_id: names the run; one that is there already is followed.
        wait: for its end.

    Raises:
        ConfigError: refused at the door or by the server.
        EnvironmentFault: the server is out of reach.
        CbdError: the run failed.
    """
    run_id = _named(run_id)
    _check_readable(given["delivery"]["data"], given["delivery"]["trusted"])
    _check_texts(given)
    client, started = _started(run_id, given, cluster, "redteam")
    told = {"run_id": run_id, "run": link_to(started.run_id)}
    print(f"run: {told['run']}", file=sys.stderr)
    if not wait:
        return told
    ended = _followed(client, started.run_id, run_id)
    if ended.state != "SUCCEEDED":
        raise CbdError(f"the run ended as {ended.state}; see {told['run']}, and submit it again: what was measured is not measured again")
    return {**told, "table": f"{given['out']}/redteam.parquet", "page": f"{given['out']}/redteam.md"}


def arguments(order: Order, params: Params, run_id: str) -> dict[str, Any]:
    """The parameters of the pipeline on a cluster.

    Raises:
        ConfigError: a name that is none, a place that no step could read, or text that the server would replace.
    """
    check_names(order)
    _check_readable(order.data, order.trusted)
    given = pipeline_arguments(order, params, WORKSPACE / "runs" / run_id)
    _check_texts(given)
    return given


@contextlib.contextmanager
def compiled(cluster: Cluster, pipeline: str = "retrain", gpus: int = 1) -> Iterator[Path]:
    """A pipeline for the cluster, in a file that is gone afterwards; raises ConfigError on a bare tag or an unknown overlay."""
    check_image(cluster.image)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / f"{pipeline}.yaml"
        compile_pipeline(package, pipeline, image=cluster.image, overlay=cluster.overlay, gpus=gpus)
        yield package


def find_run(client: "Client", experiment: str, run_id: str) -> Any | None:
    """The server's run that has our run id as its name; None if there is none."""
    runs = listed(client.list_runs, "runs", experiment_id=experiment, filter=named(run_id))
    return next((run for run in runs if run.display_name == run_id), None)


def has_ended(run: Any) -> bool:
    """Whether the server's run has; a state that this client does not know is an end if it also has a time at which it ended."""
    return run.state in ENDED or bool(run.finished_at and run.finished_at.year > 1970)


def follow(client: "Client", server_id: str) -> Any:
    """The run when it has ended; meanwhile each change of a step's state is a line on stderr."""
    told: dict[str, str] = {}
    while True:
        run = asked(lambda: client.get_run(server_id), patience=PATIENCE)
        for task in (run.run_details and run.run_details.task_details) or ():
            state = str(task.state)
            if task.display_name and state != told.get(task.task_id):
                told[task.task_id] = state
                print(printable(f"{task.display_name}: {state.lower()}"), file=sys.stderr, flush=True)
        if has_ended(run):
            return run
        time.sleep(POLL_SECONDS)


def _named(run_id: str) -> str:
    """The id, or a new one from the time; raises ConfigError if it is none."""
    run_id = run_id or f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    if not NAME.fullmatch(run_id):
        raise ConfigError(f"--run-id {run_id!r}: expected up to 64 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return run_id


def _check_readable(data: str, trusted: str) -> None:
    for option, uri in (("--data", data), ("--trusted", trusted)):
        if not uri.startswith("s3://") and WORKSPACE not in Path(os.path.normpath(uri)).parents:
            raise ConfigError(f"{option} {uri!r}: a cluster cannot read it; expected s3://bucket/prefix, or a path under {WORKSPACE}")


def _check_texts(given: dict[str, Any]) -> None:
    for text in _texts(given):
        if "{{$" in text or "[[" in text:
            raise ConfigError(f"{text!r}: may hold neither '{{{{$' nor '[[', which the server replaces; rename it")


def _started(run_id: str, given: dict[str, Any], cluster: Cluster, pipeline: str, gpus: int = 1) -> tuple["Client", Any]:
    """The server's client and its run of our run id, which is started if it is not there."""
    with compiled(cluster, pipeline, gpus) as package:
        client = connect(cluster.namespace)
        experiment = experiment_of(client, cluster.namespace)
        started = find_run(client, experiment, run_id)
        if started is None:
            started = _start(client, experiment, run_id, package=package, given=given, account=cluster.service_account)
    return client, started


@contextlib.contextmanager
def _followable(run_id: str, faults: type[CbdError] = CbdError) -> Iterator[None]:
    """Has these faults and Ctrl-C, which do not end the run, tell how it is followed on."""
    follow_on = f"the same command with --run-id {run_id} follows this run"
    try:
        yield
    except KeyboardInterrupt:
        raise CbdError(f"interrupted; {follow_on}") from None
    except Missing:
        raise
    except faults as error:
        raise type(error)(f"{error}; {follow_on}") from None


def _followed(client: "Client", server_id: str, run_id: str) -> Any:
    try:
        with _followable(run_id):
            return follow(client, server_id)
    except Missing as error:
        raise CbdError(f"run {run_id}: {error}; it was deleted, which ends it: submit again with another --run-id") from None


def _start(client: "Client", experiment: str, run_id: str, *, package: Path, given: dict[str, Any], account: str | None) -> Any:
    with _followable(run_id, EnvironmentFault), contextlib.redirect_stdout(None):
        started = created(
            lambda: client.run_pipeline(experiment, run_id, str(package), params=given, service_account=account),
            lambda: find_run(client, experiment, run_id),
        )
    if not started.run_id:
        raise EnvironmentFault("the server gave the run no id; is it a Kubeflow Pipelines server of version 2?")
    return started


def _result(run_id: str, state: str, link: str) -> dict[str, Any]:
    """What the report step left at the tracking server."""
    from pipelines.outcome import EXIT_CODES, as_fractions

    with _followable(run_id):
        found = _tracked(run_id)
    if found is None:
        raise EnvironmentFault(f"the run ended as {state}, but the tracking server holds no result of {run_id}; see {link}")
    result, page = found
    faults = [*result["alarms"], *result["stopped"].values()]
    if state != "SUCCEEDED" or faults or not (result["verdict"] in EXIT_CODES or result["nothing_new"]):
        raise CbdError(f"the run ended as {state}: {printable((faults or ['without a verdict'])[0])}; see {page} and {link}")
    return as_fractions(result) | {"report": page, "workspace": str(WORKSPACE)}


def _tracked(run_id: str) -> tuple[dict[str, Any], str] | None:
    """The result of the tracking run that has our run id, and its page; None if there is none."""
    from components.tracking_runs import plain
    from components.tracking_store import client, shown, tracking_uri

    with tempfile.TemporaryDirectory() as folder, client(Path(folder)) as mlflow:
        experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
        found = mlflow.search_runs(experiments, f"tags.`cbd.run_id` = '{plain(run_id)}'", max_results=1, order_by=["start_time ASC"])
        if not found or not any(artifact.path == "result.json" for artifact in mlflow.list_artifacts(found[0].info.run_id)):
            return None
        info = found[0].info
        result = json.loads(Path(mlflow.download_artifacts(info.run_id, "result.json", folder)).read_text())
        address = re.sub(r"/+$", "", shown(tracking_uri(Path(folder))))
        return result, f"{address}/#/experiments/{info.experiment_id}/runs/{info.run_id}/artifacts/report.html"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
