"""Submitting a run to a Kubeflow Pipelines server and following it; what is said when that does not work."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from kfp_server import Fault, Server

from cbd.errors import CbdError, ConfigError, EnvironmentFault
from components.tracking_runs import close_run, log_run
from components.tracking_store import client
from pipelines import kubeflow, submit
from pipelines.launch import Order
from pipelines.options import load
from pipelines.submit import Cluster

pytestmark = pytest.mark.slow

IMAGE = "registry.example/cbd@sha256:" + "0123456789abcdef" * 4
ORDER = Order("s3://bucket/delivery", "s3://bucket/trusted", Path("/workspace"))
GIVEN = ("--data", ORDER.data, "--trusted", ORDER.trusted, "--image", IMAGE, "--overlay", "gke")
RESULT: dict[str, Any] = {
    "verdict": "PASS",
    "sentence": "PASS: nothing was found.",
    "nothing_new": False,
    "clean_accuracy": {"k": 9, "n": 10, "rate": 0.9, "low": 0.6, "high": 1.0},
    "attack_success_rate": {},
    "confounder": {"steps": 1, "separated": True, "asr": None},
    "canary": None,
    "baseline": None,
    "data": {"delivered": 10, "accepted": 10, "duplicates": 0, "quarantined": 0, "digest": "ab" * 32},
    "model": {"name": "model-1a2b", "digest": "cd" * 32, "version": "1", "alias": "champion"},
    "alarms": [],
    "stopped": {},
    "run_dir": "/workspace/runs/first",
    "seconds": {"ingest": 1.0},
}


@pytest.fixture
def tracked(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mlflow_template: Path) -> Callable[..., None]:
    """A function that leaves a result at the tracking server, as the report step does; without it there is none."""
    place = tmp_path / "tracking"
    place.mkdir()
    (place / "mlflow.db").write_bytes(mlflow_template.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")

    def leave(run_id: str = "first", **changes: Any) -> None:
        (place / "result.json").write_text(json.dumps(RESULT | changes))
        close_run(place, run_id, status="FINISHED", artifacts=[place / "result.json"])

    return leave


def send(**changes: Any) -> dict[str, Any]:
    return submit.submit(ORDER, load(params_path=None, preset=None), Cluster(IMAGE, "gke"), **{"run_id": "first", **changes})


# A run that ends well


def test_a_run_is_followed_to_its_verdict_and_its_links_are_told(
    server: Server, tracked: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    tracked()
    code, out, err = cbd(capsys, "submit", *GIVEN, "--run-id", "first")
    assert code == 0 and "PASS: nothing was found." in out and "clean accuracy: 90.0 %" in out
    assert f"run: {server.address}/#/runs/details/{server.runs[0]['run_id']}" in err
    assert "ingest-step: pending" in err and "ingest-step: running" in err and "ingest-step: succeeded" in err
    assert "/artifacts/report.html" in out


def test_the_verdict_is_found_where_the_server_presets_a_tracking_run_for_every_task(
    tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CBD_IMAGE", IMAGE)
    with client(tmp_path) as mlflow:
        tasks = [mlflow.create_run("0").info.run_id for _ in range(2)]
    monkeypatch.setenv("MLFLOW_RUN_ID", tasks[0])
    log_run(tmp_path, "first", params={"seed": 0})
    monkeypatch.setenv("MLFLOW_RUN_ID", tasks[1])
    tracked()
    assert send()["verdict"] == "PASS"


@pytest.mark.parametrize(("verdict", "code"), [("REVIEW", 10), ("BLOCK", 11), ("INCONCLUSIVE", 12), ("INVALID", 13)])
def test_every_verdict_has_the_exit_code_of_a_local_run(
    tracked: Callable[..., None], capsys: pytest.CaptureFixture[str], verdict: str, code: int
) -> None:
    tracked(verdict=verdict)
    found, out, _ = cbd(capsys, "submit", *GIVEN, "--run-id", "first", "--json")
    told = json.loads(out.splitlines()[-1])
    assert found == code and (told["verdict"], told["run_id"]) == (verdict, "first") and told["run"].startswith("http")


def test_the_server_gets_pipeline_settings_and_parameters_in_its_own_terms(server: Server, tracked: Callable[..., None]) -> None:
    tracked()
    send()
    run = server.runs[0]
    assert set(run["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    executors = run["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {IMAGE}
    given = run["runtime_config"]["parameters"]
    assert given["records"] == "/workspace/runs/first/records" and given["workspace"] == "/workspace"
    assert given["data"] == ORDER.data and given["gate"]["min_clean_accuracy"] == 0.5
    assert run["display_name"] == "first" and run["experiment_id"] == server.experiments[0]["experiment_id"]


def test_without_waiting_only_the_link_is_told_and_no_tracking_server_is_needed(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, out, _ = cbd(capsys, "submit", *GIVEN, "--no-wait", "--json")
    assert code == 0 and json.loads(out)["run"].endswith(server.runs[0]["run_id"])
    assert "GET runs/" not in " ".join(server.asked)


def test_a_run_that_is_there_is_followed_and_not_started_again(server: Server, tracked: Callable[..., None]) -> None:
    tracked()
    first, second = send(), send()
    assert len(server.runs) == 1 and first["run"] == second["run"]


# At the door


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "registry.example/cbd:latest"), "expected NAME@sha256:DIGEST"),
        (("--image", "registry.example/cbd"), "expected NAME@sha256:DIGEST"),
        (("--overlay", "aks"), "expected one of gke, eks, onprem"),
        (("--data", "delivery"), "a cluster cannot read it"),
        (("--data", "/workspace/../etc"), "a cluster cannot read it"),
        (("--trusted", "s3://bucket/{{$.x}}"), "which the server replaces"),
        (("--data", "s3://bucket/[[Index]]"), "which the server replaces"),
        (("--name", "a b"), "--name 'a b'"),
        (("--run-id", "../x"), "--run-id '../x'"),
        (("--image", ""), "--image is missing"),
    ],
)
def test_a_mistake_is_refused_before_the_server_is_asked(
    server: Server, tracked: Callable[..., None], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = cbd(capsys, "submit", *GIVEN, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert server.asked == [] and server.runs == []


def test_without_a_tracking_server_nothing_is_started_that_could_not_be_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        send()
    assert server.asked == []


def test_in_a_cluster_the_server_is_where_kubeflow_pipelines_puts_it(
    server: Server, tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked()
    assert kubeflow.IN_CLUSTER == "http://ml-pipeline.kubeflow:8888"
    monkeypatch.setattr(kubeflow, "IN_CLUSTER", server.address)
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert send()["run"].startswith(f"{server.address}/#/runs/details/")


def test_without_an_address_nobody_is_asked(tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    with pytest.raises(ConfigError, match="KF_PIPELINES_ENDPOINT is not set"):
        send()


# The server refuses, or fails


def test_a_refused_token_is_told_at_once_and_never_shown(
    server: Server, tracked: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.token = "right"
    monkeypatch.setenv("CBD_KFP_TOKEN", "hunter2")
    code, _, err = cbd(capsys, "submit", *GIVEN)
    assert code == 2 and "does not accept the credentials (401); put a fresh token into CBD_KFP_TOKEN" in err
    assert "hunter2" not in err and err.count("\n") == 1 and server.asked == ["GET healthz"]


def test_the_right_token_is_accepted(server: Server, tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "right"
    monkeypatch.setenv("CBD_KFP_TOKEN", "right")
    tracked()
    assert send()["verdict"] == "PASS"


def test_a_busy_server_is_asked_again(server: Server, tracked: Callable[..., None]) -> None:
    tracked()
    server.faults = [Fault("GET", "healthz", 503, times=2), Fault("GET", "experiments", 502), Fault("GET", "runs/", 504, times=2)]
    server.faults += [Fault("GET", "runs/", 429, retry_after="60")]
    assert send()["verdict"] == "PASS" and len(server.runs) == 1


@pytest.mark.parametrize("too_late", [False, True])
def test_a_run_whose_start_was_answered_with_a_failure_is_started_once(
    server: Server, tracked: Callable[..., None], too_late: bool
) -> None:
    tracked()
    server.faults = [Fault("POST", "runs", 503, too_late=too_late)]
    assert send()["verdict"] == "PASS"
    assert len(server.runs) == 1 and server.asked.count("POST runs") == (1 if too_late else 2)


def test_an_experiment_that_another_makes_at_the_same_moment_is_the_one(server: Server, tracked: Callable[..., None]) -> None:
    tracked()
    server.faults = [Fault("POST", "experiments", 409, too_late=True)]
    assert send()["verdict"] == "PASS" and len(server.experiments) == 1


def test_a_server_that_stays_busy_is_told(server: Server, tracked: Callable[..., None]) -> None:
    server.faults = [Fault("GET", "healthz", 503, times=99)]
    with pytest.raises(EnvironmentFault, match="busy or starting"):
        send()


def test_a_server_that_does_not_answer_is_told(tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="does not answer"):
        send()


def test_a_server_of_an_older_version_is_told(server: Server, tracked: Callable[..., None]) -> None:
    server.faults = [Fault("GET", "healthz", 404, body=b"404 page not found", content_type="text/plain")]
    with pytest.raises(EnvironmentFault, match="cbd needs v2beta1"):
        send()


def test_a_server_that_does_not_know_the_pipeline_is_told_in_its_own_words(server: Server, tracked: Callable[..., None]) -> None:
    server.faults = [Fault("POST", "runs", 400, body=b'{"message": "unknown field \\"x\\"\\u001b[2J"}')]
    with pytest.raises(ConfigError, match="one older than kfp 2.17") as refused:
        send()
    assert 'unknown field "x"' in str(refused.value) and "\x1b" not in str(refused.value) and not server.runs


def test_a_log_in_page_is_not_taken_for_a_server(server: Server, tracked: Callable[..., None]) -> None:
    server.faults = [Fault("GET", "healthz", 200, times=9, body=b"<html>Log in</html>", content_type="text/html")]
    with pytest.raises(EnvironmentFault, match="a page and not as a Kubeflow Pipelines server"):
        send()


@pytest.mark.parametrize("call", [("GET", "experiments"), ("GET", "runs"), ("POST", "runs"), ("GET", "runs/")])
def test_a_log_in_page_in_the_middle_is_not_taken_for_an_answer(
    server: Server, tracked: Callable[..., None], call: tuple[str, str]
) -> None:
    server.faults = [Fault(*call, 200, times=99, body=b"<html>Log in to see the state of runs</html>", content_type="text/html")]
    with pytest.raises(EnvironmentFault, match="a page and not as a Kubeflow Pipelines server"):
        send()


def test_a_server_that_takes_connections_and_never_answers_is_given_up(
    tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubeflow, "ANSWER_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(EnvironmentFault, match="does not answer"):
            send()


@pytest.mark.parametrize("path", ["experiments", "runs/"])
def test_a_server_that_falls_silent_is_asked_again(
    server: Server, tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(kubeflow, "ANSWER_SECONDS", 0.2)
    tracked()
    server.faults = [Fault("GET", path, 503, silent_seconds=1.0)]
    assert send()["verdict"] == "PASS" and len(server.runs) == 1


def test_a_server_of_several_users_wants_a_namespace(server: Server, tracked: Callable[..., None], tmp_path: Path) -> None:
    server.multi_user = True
    with pytest.raises(ConfigError, match="name yours with --namespace"):
        send()
    assert server.runs == []


# The run does not end well


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_failed_or_was_cancelled_ends_with_its_reason(server: Server, tracked: Callable[..., None], state: str) -> None:
    server.states = ["RUNNING", state]
    tracked(stopped={"validate": "validate failed: no such bucket"}, verdict=None)
    with pytest.raises(CbdError, match=f"ended as {state}: validate failed: no such bucket"):
        send()


def test_a_state_of_a_newer_server_is_not_waited_for_for_ever(server: Server, tracked: Callable[..., None]) -> None:
    server.states = ["RUNNING", "EVAPORATED"]
    with pytest.raises(EnvironmentFault, match="ended as EVAPORATED, but the tracking server holds no result"):
        send()


def test_a_success_without_a_verdict_is_none(tracked: Callable[..., None]) -> None:
    tracked(verdict=None)
    with pytest.raises(CbdError, match="without a verdict"):
        send()


def test_a_verdict_beside_an_alarm_is_none(tracked: Callable[..., None]) -> None:
    tracked(alarms=["The verdict is BLOCK, but promote ran."])
    with pytest.raises(CbdError, match="promote ran"):
        send()


def test_a_run_that_is_deleted_while_it_is_followed_is_told_as_that(server: Server, tracked: Callable[..., None]) -> None:
    missing = b'{"error": "ResourceNotFoundError: Run x not found.", "code": 5, "message": "Run x not found."}'
    server.faults = [Fault("GET", "runs/", 404, body=missing)]
    with pytest.raises(CbdError, match=r"run first: .* \(404: Run x not found.\); it was deleted, which ends it") as told:
        send()
    assert "goes on" not in str(told.value) and "v2beta1" not in str(told.value)


def test_losing_the_server_says_how_to_follow_on(server: Server, tracked: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "PATIENCE", 1)
    server.faults = [Fault("GET", "runs/", 401)]
    with pytest.raises(ConfigError, match="the same command with --run-id first follows this run"):
        send()


def named_in(err: str) -> str:
    """The run id that an error tells to follow."""
    return err.partition("--run-id ")[2].split()[0]


def test_ctrl_c_tells_how_to_follow_on_and_that_starts_no_second_run(
    server: Server, tracked: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(submit.time, "sleep", interrupt)
        code, _, err = cbd(capsys, "submit", *GIVEN)
    assert code == 1 and "error: interrupted; the same command with --run-id" in err
    tracked(named_in(err))
    assert cbd(capsys, "submit", *GIVEN, "--run-id", named_in(err))[0] == 0 and len(server.runs) == 1


def test_a_start_that_may_have_happened_tells_how_to_follow_it(
    server: Server, tracked: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [Fault("POST", "runs", 503, times=3), Fault("POST", "runs", 503, too_late=True)]
    code, _, err = cbd(capsys, "submit", *GIVEN)
    assert code == 1 and "busy or starting" in err and named_in(err) == server.runs[0]["display_name"]


def test_a_tracking_server_that_is_gone_when_the_run_has_ended_costs_no_second_run(
    server: Server, tracked: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.tracking_store.PATIENCE_SECONDS", 0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, _, err = cbd(capsys, "submit", *GIVEN)
    assert code == 1 and "out of reach" in err and named_in(err) == server.runs[0]["display_name"]
