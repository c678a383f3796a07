"""Where MLflow keeps things: finding it, telling quickly whether it answers, and opening it with safe settings."""

import contextlib
import logging
import os
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cbd.errors import ConfigError, EnvironmentFault
from cbd.files import disk_fault, locked, replacing

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "cbd"
LOCK = ".tracking.lock"
SETTINGS = {
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Forced before MLflow is imported."""
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
"""Set where the user has not: seven retries wait four minutes for a server that starts again, and MLflow does not chat."""
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PATIENCE_SECONDS = 300.0
"""So long a server that stopped answering is waited for, as its start-up probe in `k8s/` does; at the door of a run it is told at once."""
PAUSE_SECONDS = 2.0
"""Between two looks whether it is back."""
NO_ANSWER = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
"""MLflow's codes where a server does not answer, or answers 5xx."""
ATTEMPTS = 5
"""At making something, if answers keep getting lost."""
Made = TypeVar("Made")
_RETRIES = threading.Lock()


class OutOfReach(EnvironmentFault):
    """MLflow does not answer now; what it refuses is a plain EnvironmentFault."""


def tracking_uri(workspace: Path) -> str:
    """Where MLflow keeps runs and models: MLFLOW_TRACKING_URI, or an SQLite file in the workspace."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workspace.resolve() / 'mlflow.db'}"


def check_reachable(workspace: Path, *, timeout_seconds: float = 5.0) -> None:
    """Returns if MLflow can be worked with, without importing it.

    Raises:
        OutOfReach: the server does not answer.
        EnvironmentFault: the SQLite file cannot be written.
        ConfigError: MLFLOW_TRACKING_URI names something else than a server or a database.
    """
    uri = tracking_uri(workspace)
    file = sqlite_file(uri)
    if file is not None:
        _check_writable(file)
        return
    try:
        parts = urllib.parse.urlsplit(uri)
        scheme, host, port = parts.scheme.partition("+")[0], parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"MLFLOW_TRACKING_URI={shown(uri)}: {error}; unset it to use the workspace's own store") from None
    if not host or scheme not in ("http", "https", *PORTS):
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={shown(uri)}: expected http(s)://, sqlite:/// or a database; unset it to use the workspace's own"
        )
    try:
        if scheme in PORTS:
            socket.create_connection((host, port or PORTS[scheme]), timeout=timeout_seconds).close()
        else:
            _ask_health(parts, timeout_seconds)
    except (OSError, ValueError) as error:
        raise _out_of_reach(uri, getattr(error, "reason", error)) from None


def made(look: Callable[[], Made | None], make: Callable[[], Made]) -> Made:
    """What `look` finds, else what `make` makes in MLflow: never two of it.

    MLflow's client repeats a call whose answer was lost, and then there are two. So `make` is sent once, and looked for before it is sent
    again; the same where another process made it meanwhile.
    """
    attempts = ATTEMPTS
    while (found := look()) is None:
        attempts -= 1
        with ignoring(*((*NO_ANSWER, "RESOURCE_ALREADY_EXISTS") if attempts else ())), _sent_once():
            return make()
    return found


@contextlib.contextmanager
def client(workspace: Path) -> Iterator["MlflowClient"]:
    """MLflow's client for the workspace's store, which is made on first use; MLflow's errors leave as one line.

    Raises:
        OutOfReach: the server has not answered for PATIENCE_SECONDS.
        EnvironmentFault: MLflow refuses.
    """
    _await_server(workspace)
    _prepare()
    uri = tracking_uri(workspace)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        file = sqlite_file(uri)
        if file is not None and not file.exists():
            with locked(file.parent / LOCK):
                if not file.exists():
                    make_store(file)
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except MlflowException as error:
        raise (_out_of_reach if error.error_code in NO_ANSWER else _refused)(uri, error) from None
    except SQLAlchemyError as error:
        raise _out_of_reach(uri, error) from None
    except OSError as error:
        raise disk_fault(workspace, error) from None


def make_store(file: Path) -> None:
    """Makes a fresh SQLite store (seconds of migrations), whole, or not at all if the process is killed meanwhile."""
    _prepare()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with replacing(file) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary.resolve()}", artifact_root(file.parent)).engine.dispose()  # type: ignore[no-untyped-call]


def artifact_root(workspace: Path) -> str:
    """URI of the folder in which a store without a server keeps its artifacts."""
    return (workspace.resolve() / "mlartifacts").as_uri()


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI; None for any other URI."""
    scheme, _, path = uri.partition(":///")
    return Path(path) if path and scheme.partition("+")[0] == "sqlite" else None


@contextlib.contextmanager
def ignoring(*codes: str) -> Iterator[None]:
    """Lets MLflow's errors with these codes pass, and no others."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code not in codes:
            raise


def shown(uri: str) -> str:
    """The URI without user name and password."""
    scheme, separator, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def _await_server(workspace: Path) -> None:
    until, told = time.monotonic() + PATIENCE_SECONDS, False
    while True:
        try:
            return check_reachable(workspace)
        except OutOfReach as error:
            if time.monotonic() >= until:
                raise
            if not told:
                print(f"[tracking] {error}. It is asked again for {PATIENCE_SECONDS:.0f} s", file=sys.stderr, flush=True)
            told = True
        time.sleep(PAUSE_SECONDS)


@contextlib.contextmanager
def _sent_once() -> Iterator[None]:
    """Inside, MLflow's client repeats no call."""
    with _RETRIES:
        retries = os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        try:
            yield
        finally:
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = retries


def _prepare() -> None:
    os.environ.update(SETTINGS)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _check_writable(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and _head(file) not in (b"", b"SQLite format 3"):
            raise EnvironmentFault(f"{file}: not an SQLite database; move it away or set MLFLOW_TRACKING_URI")
    except OSError as error:
        raise disk_fault(file, error) from None
    if not os.access(file if file.exists() else file.parent, os.R_OK | os.W_OK):
        raise EnvironmentFault(f"cannot write {file}: permission denied; choose a folder that you may write to")


def _head(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(15)


def _ask_health(parts: urllib.parse.SplitResult, timeout_seconds: float) -> None:
    netloc = parts.netloc.rpartition("@")[2]
    url = urllib.parse.urlunsplit((parts.scheme, netloc, f"{parts.path.rstrip('/')}/health", "", ""))
    with urllib.request.urlopen(url, timeout=timeout_seconds):
        return


def _out_of_reach(uri: str, reason: object) -> OutOfReach:
    return OutOfReach(
        f"MLflow at {shown(uri)} is out of reach: {_first(reason)}; start that server and run again, or unset MLFLOW_TRACKING_URI"
    )


def _refused(uri: str, reason: object) -> EnvironmentFault:
    return EnvironmentFault(f"MLflow at {shown(uri)} refuses: {_first(reason)}; look at the rights of MLFLOW_TRACKING_USERNAME there")


def _first(reason: object) -> str:
    return (str(reason).splitlines() or ["no answer"])[0][:300]
