"""MLflow for real: PostgreSQL, S3, basic authentication, and whole runs against it while it is killed and restored.

`make test-services` runs this file; without CBD_TEST_POSTGRES (a database that is emptied), CBD_TEST_S3_ENDPOINT and CBD_TEST_MLFLOW (the
Python of mlflow/requirements.lock) it is skipped.
"""

import http.client
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from decided_case import Case, make_case
from small_delivery import write_small
from tracking_server import ADMIN, RUNS, TrackingServer

from cbd.errors import EnvironmentFault
from components import STEPS, tracking_store
from components.records import read_records
from components.register import register
from components.tracking import fetch_model, open_run
from components.tracking_store import client
from pipelines import outcome

PROJECT = Path(__file__).parent.parent
NEEDED = ("CBD_TEST_POSTGRES", "CBD_TEST_S3_ENDPOINT", "CBD_TEST_MLFLOW")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.services,
    pytest.mark.skipif(any(not os.environ.get(name) for name in NEEDED), reason=f"{', '.join(NEEDED)} name no services"),
]
CREATING = ("experiments/create", "runs/create", "logged-models", "registered-models/create", "model-versions/create")
REGISTRY = "SELECT name, version, source, run_id, current_stage, status FROM model_versions ORDER BY 1, 2"
ALIASES = "SELECT name, alias, version FROM registered_model_aliases ORDER BY 1, 2"
USERS = "SELECT username FROM users ORDER BY 1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A server with the runs' user, whom docs/cluster.md makes; its address and his password are in the environment."""
    database, endpoint, python = (os.environ[name] for name in NEEDED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "testtest123"), ("AWS_DEFAULT_REGION", "us-east-1")):
            patch.setenv(name, os.environ.get(name, value))
        held = TrackingServer(tmp_path_factory.mktemp("server"), database=database, endpoint=endpoint, python=Path(python))
        patch.setenv("MLFLOW_TRACKING_URI", held.uri)
        patch.setenv("MLFLOW_TRACKING_USERNAME", RUNS[0])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", RUNS[1])
        patch.delenv("AWS_ENDPOINT_URL", raising=False)  # artifacts go through the server
        try:
            held.start()
            held.run_in_pod(_code_that_makes_the_user(), RUNS[1])
            yield held
        finally:
            held.kill()


def _code_that_makes_the_user() -> str:
    (found,) = re.findall(
        r"exec -i deployment/mlflow -- python -c '\n(.*?)\n' < FILE", (PROJECT / "docs/cluster.md").read_text(), re.DOTALL
    )
    return str(found)


@pytest.fixture(scope="module")
def runs(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of two runs in one workspace, started together on the empty server, which is away for the last of their trainings."""
    root = tmp_path_factory.mktemp("two")
    started = {name: start(write_small(root / name, first=first), root / "workspace", name) for name, first in (("one", 0), ("two", 50))}
    try:
        until = time.monotonic() + 400
        while len(list(root.glob("workspace/runs/*/records/train_deconfounded.json"))) < 2 and time.monotonic() < until:
            early = [process.communicate() for process in started.values() if process.poll() is not None]
            assert early == [], "a run ended too early"
            time.sleep(0.05)
        server.kill()
        server.start()
        return {name: ended(process) for name, process in started.items()}
    finally:
        for process in started.values():
            process.terminate()


def start(root: Path, workspace: Path, name: str) -> "subprocess.Popen[str]":
    """`cbd run` on a small delivery."""
    data = ["--data", root / "delivery", "--trusted", root / "trusted", "--params", root / "params.yaml"]
    command = [sys.executable, "-m", "pipelines.cli", "run", *data, "--workspace", workspace, "--name", name, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """The result of a run that ended with its verdict's exit code."""
    out, err = process.communicate(timeout=800)
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert process.returncode == outcome.EXIT_CODES.get(result["verdict"]), (result, err)
    assert result["alarms"] == [] and result["stopped"] == {}
    return result


def check_tracked(result: dict[str, Any], server: TrackingServer) -> None:
    """One finished run with whole curves, and one registered version whose files are in the bucket."""
    run_dir = Path(result["run_dir"])
    workspace = run_dir.parent.parent
    records = read_records(str(run_dir / "records"))
    with client(workspace) as mlflow:
        experiment = mlflow.get_experiment_by_name("cbd").experiment_id
        (run,) = mlflow.search_runs([experiment], f"tags.`cbd.run_id` = '{run_dir.name}'")
        assert run.info.status == "FINISHED" and run.data.tags["cbd.verdict"] == result["verdict"]
        series = {key: mlflow.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        assert {name for name, points in series.items() if max(Counter(point.step for point in points).values()) > 1} == set()
        steps = sorted(point.step for point in series["train_deconfounded.loss"])
        assert steps == list(range(1, len(steps) + 1)) and len(steps) == 3, "a curve has a gap"
        (version,) = mlflow.search_model_versions(f"name = '{result['model']['name']}'")
        assert (str(version.version), version.run_id) == (result["model"]["version"], run.info.run_id)
        (model,) = mlflow.search_logged_models([experiment], f"tags.`cbd.run_id` = '{run_dir.name}'")
    keys = server.objects()
    assert any(key.endswith("report.html") and run.info.run_id in key for key in keys)
    assert any(key.endswith("model.safetensors") and model.model_id in key for key in keys)
    assert set(records) == set(STEPS) - {"train_undefended"} and records["report"]["outputs"]["tracking"] == "closed"
    fetched = fetch_model(f"models:/{result['model']['name']}/{version.version}", workspace)
    assert (fetched / "model.safetensors").is_file()


def test_two_runs_at_the_same_time_while_the_server_is_killed_and_comes_back_are_two_whole_runs(
    server: TrackingServer, runs: dict[str, dict[str, Any]]
) -> None:
    for result in runs.values():
        check_tracked(result, server)
    assert runs["one"]["model"]["digest"] != runs["two"]["model"]["digest"]


def test_a_server_that_stays_away_is_told_with_what_to_do_and_the_model_is_registered_once_when_it_is_back(
    server: TrackingServer, tmp_path: Path, make_evaluation: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path, make_evaluation, run_id="away")
    case.decide()
    server.kill()
    monkeypatch.setattr(tracking_store, "PATIENCE_SECONDS", 1)
    with pytest.raises(EnvironmentFault, match=r"out of reach: .*start that server and run again") as caught:
        enter(case)
    assert "\n" not in str(caught.value) and RUNS[1] not in str(caught.value)
    server.start()
    assert (enter(case)["version"], enter(case)["version"]) == ("1", "1")


class Losing(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the server, but the first answer to each kind of creation is lost on its way back."""

    target = ""
    lost: list[str]

    def do_POST(self) -> None:
        connection = http.client.HTTPConnection(self.target, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection.request(self.command, self.path, body, {**self.headers, "Host": self.target})
        answer = connection.getresponse()
        content = answer.read()
        kind = next((kind for kind in CREATING if self.command == "POST" and self.path.endswith(f"/mlflow/{kind}")), None)
        if kind and kind not in self.lost and answer.status == 200:
            self.lost.append(kind)
            self.close_connection = True
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = do_DELETE = do_POST

    def log_message(self, *_: Any) -> None:
        pass


def test_an_answer_that_is_lost_makes_nothing_twice(
    server: TrackingServer, tmp_path: Path, make_evaluation: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(tmp_path, make_evaluation, run_id="lost", weight=3.0)
    case.decide()
    handler = type("Handler", (Losing,), {"target": f"127.0.0.1:{server.port}", "lost": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as between:
        threading.Thread(target=between.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{between.server_port}")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "lost")
        told = enter(case, name="lost")
        between.shutdown()
    assert set(handler.lost) == set(CREATING)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    with client(tmp_path) as mlflow:
        experiment = mlflow.get_experiment_by_name("lost").experiment_id
        assert len(mlflow.search_runs([experiment])) == len(mlflow.search_logged_models([experiment])) == 1
        assert [str(each.version) for each in mlflow.search_model_versions(f"name = '{told['name']}'")] == [told["version"]] == ["1"]
    assert fetch_model(f"models:/{told['name']}@champion", tmp_path).is_dir()


def enter(case: Case, name: str = "model") -> dict[str, Any]:
    return register(case.bundle, case.decision, branch="promote", workspace=case.workspace, name=name, run_id=case.run_id)


def test_workspaces_that_start_at_the_same_time_share_one_experiment(
    server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shared")
    code = "import sys; from pathlib import Path; from components.tracking import open_run; print(open_run(Path(sys.argv[1]), sys.argv[2]))"
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    commands = [[sys.executable, "-c", code, str(tmp_path / str(number)), f"shared-{number}"] for number in range(2)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) for command in commands]
    found = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert all(found) and found[0] != found[1] and [process.returncode for process in processes] == [0, 0]


def test_the_server_refuses_strangers_and_other_host_names(server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert (server.status(path), server.status(path, user=ADMIN)) == (401, 200)
    assert server.status(path, user=ADMIN, host="evil.example") == 403
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(EnvironmentFault, match="refuses: .*MLFLOW_TRACKING_USERNAME") as caught:
        open_run(tmp_path, "stranger")
    assert "\n" not in str(caught.value) and "wrong-password" not in str(caught.value)


def test_a_restored_dump_is_the_same_registry(server: TrackingServer, runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """By the commands of the two CronJobs, in the order of the guide in k8s/README.md."""
    one = runs["one"]
    queries = (REGISTRY, ALIASES, USERS, "SELECT run_uuid, status FROM runs ORDER BY 1", "SELECT count(*) FROM metrics")
    before = [server.sql(query) for query in queries]
    assert before[0] and before[2] == ["admin", "cbd-runs"]
    assert re.fullmatch(r"upload: s3://\S+/mlflow/\S+\.dump, \d+ bytes", server.job("postgres-backup")[1])
    (dump,) = [key for key in server.objects() if key.endswith(".dump")]
    server.sql("DELETE FROM model_version_tags", f"UPDATE model_versions SET source = 's3://evil' WHERE name = '{one['model']['name']}'")
    server.sql("CREATE TABLE left_over (x int)", "DELETE FROM metrics")
    assert [server.sql(query) for query in queries] != before
    server.kill()
    server.job("postgres-restore", BACKUP_NAME=dump)
    server.start()
    assert [server.sql(query) for query in queries] == before
    check_tracked(one, server)
    workspace = Path(one["run_dir"]).parent.parent
    audit = [sys.executable, "-m", "pipelines.cli", "audit", "verify", "--all", "--workspace", str(workspace)]
    done = subprocess.run(audit, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_was_made_since_the_dump_is_gone_and_a_cut_dump_changes_nothing(server: TrackingServer) -> None:
    """As after an upgrade of MLflow, whose new tables refer to old ones; twice, because the schema itself is another one afterwards."""
    tables = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
    server.kill()
    before = server.sql(tables)
    for _ in range(2):
        server.job("postgres-backup")
        dump = max(key for key in server.objects() if key.endswith(".dump"))
        server.sql("CREATE TABLE new_alone (x int)", "CREATE TABLE new_child (x int REFERENCES experiments (experiment_id))")
        since = server.sql(tables)
        whole = server.store.get_object(Bucket=server.bucket, Key=dump)["Body"].read()
        server.store.put_object(Bucket=server.bucket, Key="mlflow/cut", Body=whole[: len(whole) - len(whole) // 4])
        with pytest.raises(subprocess.CalledProcessError):
            server.job("postgres-restore", BACKUP_NAME="mlflow/cut")
        assert server.sql(tables) == since
        server.job("postgres-restore", BACKUP_NAME=dump)
        assert server.sql(tables) == before
    server.start()
    assert server.status("/health") == 200
