"""MLflow behind one module: found or told missing in seconds, live while training, harmless when it fails."""

import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cbd.errors import ConfigError, EnvironmentFault
from components import tracking_store
from components.attestation import IMAGE
from components.tracking import LiveCurves, check_reachable, close_run, log_run, open_run, tracking_uri
from components.tracking_runs import flatten
from components.tracking_store import OutOfReach, client, made, make_store, shown
from components.training import live_curves, training_params


@pytest.fixture
def workspace(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a fresh MLflow store, and no settings from outside."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    shutil.copyfile(mlflow_template, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


def test_the_workspace_keeps_its_own_store_unless_told_otherwise(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(workspace) == f"sqlite:///{workspace}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert tracking_uri(workspace) == "http://somewhere:5000"


def test_an_unreachable_server_is_told_fast_and_in_one_line(workspace: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{closed_port}")
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match="out of reach") as caught:
        check_reachable(workspace)
    assert time.monotonic() - started < 2 and "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_given_up(workspace: Path, silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent_port}")
    with pytest.raises(EnvironmentFault, match="timed out"):
        check_reachable(workspace, timeout_seconds=0.2)


def test_a_server_that_answers_is_reachable(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200 if self.path == "/base/health" else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}/base/")
    check_reachable(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}/other")
    with pytest.raises(EnvironmentFault, match="out of reach"):
        check_reachable(workspace)
    server.shutdown()
    server.server_close()
    assert asked == ["/base/health", "/other/health"]


@pytest.mark.parametrize("uri", ["mlruns", "ftp://host/x", "file:///tmp/x", "sqlite://", "http://", "http://host:port", "databricks"])
def test_an_address_of_another_kind_is_refused(workspace: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        check_reachable(workspace)


def test_a_store_that_is_no_database_or_no_place_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_text("no database, but long enough to be one")
    with pytest.raises(EnvironmentFault, match="not an SQLite database"):
        check_reachable(tmp_path)
    with pytest.raises(EnvironmentFault, match="cannot write"):
        check_reachable(tmp_path / "mlflow.db" / "workspace")


def test_checking_imports_no_mlflow(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from components import tracking; tracking.check_reachable(Path(sys.argv[1]))"
    code += "; print([name for name in ('mlflow', 'kfp', 'torch', 'scipy', 'pandas') if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
    assert not (tmp_path / "mlflow.db").exists()


def test_passwords_are_never_shown() -> None:
    assert shown("https://me:se@cret@host:5/path?x=1") == "https://host:5/path?x=1"
    assert shown("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_run_is_found_again_by_our_id(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_run(workspace, "run-1")
    assert open_run(workspace, "run-1") == first != open_run(workspace, "run-2")
    monkeypatch.setenv("MLFLOW_RUN_ID", first)
    assert open_run(workspace, "run-3") == first
    with client(workspace) as mlflow:
        assert mlflow.get_run(first).data.tags["cbd.run_id"] == "run-3"


def test_on_a_cluster_a_run_is_one_although_the_server_presets_one_for_every_task(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMAGE, "registry.example/cbd@sha256:" + "0" * 64)
    found = set()
    for task in ("of-the-training", "of-the-report"):  # runs of another server, as far as we know
        monkeypatch.setenv("MLFLOW_RUN_ID", task)
        found.add(open_run(workspace, "run-1"))
    assert len(found) == 1


def test_a_hostile_run_id_finds_no_other_run(workspace: Path) -> None:
    first = open_run(workspace, "run-1")
    assert open_run(workspace, "x' OR tags.`cbd.run_id` = 'run-1") != first


def test_parameters_are_flattened(workspace: Path) -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {"a.b": "1", "a.c.d": "None", "e": "[1, 2]"}
    params = {"section": {f"key_{index}": index for index in range(150)}}
    log_run(workspace, "run-1", params=params, tags={"cbd.data_digest": "d" * 64}, metrics={"ca": 0.9, "asr": None, "bad": float("nan")})
    log_run(workspace, "run-1", params=params)
    with client(workspace) as mlflow:
        run = mlflow.get_run(open_run(workspace, "run-1"))
    assert len(run.data.params) == 150 and run.data.params["section.key_7"] == "7"
    assert run.data.tags["cbd.data_digest"] == "d" * 64 and run.data.metrics == {"ca": 0.9}


def test_a_closed_run_keeps_its_artifacts_in_the_workspace(workspace: Path) -> None:
    (workspace / "report.html").write_text("<p>report</p>")
    close_run(str(workspace), "run-1", status="FAILED", artifacts=[workspace / "report.html", workspace / "absent.json"])
    with client(workspace) as mlflow:
        assert mlflow.get_run(open_run(workspace, "run-1")).info.status == "FAILED"
    assert [path.name for path in (workspace / "mlartifacts").rglob("*.html")] == ["report.html"]


def test_curves_are_seen_while_training_goes_on(workspace: Path) -> None:
    """Every point is there at the end, and the first ones before it."""
    with LiveCurves(workspace, "run-1", prefix="confounder.", params={"steps": 3}, tags={"cbd.revision": "abc"}) as curves:
        curves.log(0, {"loss": 2.5, "accuracy": None})
        deadline = time.monotonic() + 30
        while not _points(workspace) and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        assert _points(workspace) == [(0, 2.5)]
        for step in range(1, 2500):
            curves.log(step, {"loss": 1 / step, "accuracy": float("inf")})
    assert curves.fault is None
    points = _points(workspace)
    assert len(points) == 2500 and points[2499] == (2499, 1 / 2499)
    with client(workspace) as mlflow:
        run = mlflow.get_run(open_run(workspace, "run-1"))
    assert run.data.params == {"steps": "3"} and run.data.tags["cbd.revision"] == "abc" and set(run.data.metrics) == {"confounder.loss"}


def test_a_training_logs_the_parameters_that_it_was_told_and_no_defaults_of_others(workspace: Path) -> None:
    for section, told in (("confounder", {"steps": 5}), ("deconfounded", {"epochs": 16})):
        params = training_params(0, "cbd", {}, **{section: told})
        with live_curves(str(workspace), "run-1", f"train_{section}", params, section=section):
            pass
    with client(workspace) as mlflow:
        logged = mlflow.get_run(open_run(workspace, "run-1")).data.params
    assert (logged["confounder.steps"], logged["deconfounded.epochs"], logged["seed"]) == ("5", "16", "0")


def test_a_failing_server_is_told_and_harms_nothing(
    workspace: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(tracking_store, "PATIENCE_SECONDS", 0)
    with LiveCurves(workspace, "run-1") as curves:
        for step in range(100):
            curves.log(step, {"loss": 1.0})
        curves.close(timeout_seconds=0.5)
    assert curves.fault is not None and "out of reach" in curves.fault
    assert capsys.readouterr().out.count("[tracking]") == 1


def test_what_was_made_before_its_answer_was_lost_is_found_and_not_made_again(workspace: Path) -> None:
    from mlflow.exceptions import MlflowException

    there: list[str] = []

    def make() -> str:
        there.append("made")
        raise MlflowException("no answer")

    with client(workspace):
        assert made(lambda: there[0] if there else None, make) == "made"
    assert there == ["made"]


def test_what_is_refused_is_asked_for_once_and_told_as_refused(workspace: Path) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    asked: list[str] = []

    def make() -> str:
        asked.append("asked")
        raise MlflowException("not yours", error_code=PERMISSION_DENIED)

    with pytest.raises(EnvironmentFault, match="refuses: not yours") as caught, client(workspace):
        made(lambda: None, make)
    assert asked == ["asked"] and not isinstance(caught.value, OutOfReach)


def test_making_that_never_gets_an_answer_is_given_up(workspace: Path) -> None:
    from mlflow.exceptions import MlflowException

    asked: list[str] = []

    def make() -> str:
        asked.append("asked")
        raise MlflowException("no answer")

    with pytest.raises(OutOfReach, match="no answer"), client(workspace):
        made(lambda: None, make)
    assert len(asked) == tracking_store.ATTEMPTS


def test_a_training_that_fails_still_ends_its_curves(workspace: Path) -> None:
    with pytest.raises(ZeroDivisionError), LiveCurves(workspace, "run-1") as curves:
        curves.log(0, {"loss": 1.0})
        raise ZeroDivisionError
    assert len(_points(workspace, "loss")) == 1


def test_a_store_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Migrations take seconds: a process killed meanwhile leaves no `mlflow.db`, and the next one makes it."""
    from mlflow.store.tracking import sqlalchemy_store

    seen: list[str] = []

    def die_half_way(uri: str, artifacts: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"SQLite format 3 and half of the tables")
        seen.append(uri)
        raise KeyboardInterrupt

    monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path / "mlflow.db")
    assert seen and seen != [f"sqlite:///{tmp_path}/mlflow.db"] and list(tmp_path.iterdir()) == []


def _points(workspace: Path, name: str = "confounder.loss") -> list[tuple[int, float]]:
    with sqlite3.connect(workspace / "mlflow.db") as database:
        return sorted(database.execute("select step, value from metrics where key = ?", (name,)).fetchall())
