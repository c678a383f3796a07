"""The pipeline `retrain` for real, on a tiny delivery: what a run leaves behind, and attacks on the run itself."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from small_delivery import write_small

from cbd.errors import CbdError
from cbd.images import encode_png
from components import STEPS
from components.records import read_records
from pipelines import cli, launch, local, outcome
from pipelines.console import tell_result

PARAMS = """
seed: 0
model: {image_size: 16}
confounder: {steps: 24, batch_size: 16, max_epochs: 5, until_slow: false}
deconfounded: {epochs: 3, batch_size: 16, crop: 2}
canary: {every: 0}
gate: {min_clean_accuracy: 0.0, max_excess_asr: 0.98, block_excess_asr: 0.98, min_images: 30, warn_images: 30, null_members: 2}
"""
"""For a model of a few seconds, which passes or is reviewed."""
pytestmark = pytest.mark.slow


class Place(NamedTuple):
    """A folder with a delivery, a trusted set, parameters, and a workspace whose MLflow store is ready."""

    root: Path

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    def arguments(self, *more: str) -> list[str]:
        data = ["--data", self.root / "delivery", "--trusted", self.root / "trusted", "--supplier", "acme", "--name", "scans"]
        place = ["--workspace", self.workspace, "--params", self.root / "params.yaml"]
        return ["run", *map(str, [*data, *place]), "--json", *more]

    def run_dirs(self) -> list[Path]:
        return sorted((self.workspace / "runs").iterdir())


class Finished(NamedTuple):
    """A place and what the run there told."""

    place: Place
    code: int
    told: dict[str, Any]
    err: str


def make_place(root: Path, mlflow_template: Path) -> Place:
    write_small(root, params=PARAMS)
    (root / "workspace").mkdir()
    shutil.copy(mlflow_template, root / "workspace" / "mlflow.db")
    return Place(root)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def place(tmp_path: Path, mlflow_template: Path) -> Place:
    return make_place(tmp_path, mlflow_template)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Finished:
    """A place where one run, with a baseline, has ended. Tests may add runs to it."""
    place = make_place(tmp_path_factory.mktemp("finished"), mlflow_template)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        return Finished(place, *cbd(place.arguments("--baseline")))


def cbd(arguments: list[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON object in the last line of stdout, and stderr; a run is told in words as well, as without --json."""
    told = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], capture_output=True, text=True, check=False)
    print(told.stderr)
    result = json.loads(told.stdout.splitlines()[-1])
    if arguments[0] == "run" and (result.get("verdict") or result.get("nothing_new")):
        with contextlib.redirect_stdout(io.StringIO()) as words:
            assert tell_result(result, False) == told.returncode
        assert "None" not in words.getvalue()
    return told.returncode, result, told.stderr


@contextlib.contextmanager
def killing(step: str, place: Place, *, after: str = "") -> Iterator[list[int]]:
    """Inside, that step is killed with -9 as soon as it is seen, or as soon as the log holds `after`; yields the killed process."""
    killed: list[int] = []
    over = threading.Event()
    mine = str(place.root).encode()

    def hunt() -> None:
        while not over.wait(0.03):
            if after and not any(after in log.read_text(errors="replace") for log in place.workspace.glob("runs/*/pipeline.log")):
                continue
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    command = (process / "cmdline").read_bytes()
                    is_step = b"executor_main\0" in command and command.rstrip(b"\0").endswith(b"\0" + f"{step}_step".encode())
                    if is_step and mine in command and not command.startswith(b"sh\0"):
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
                        return

    hunter = threading.Thread(target=hunt, daemon=True)
    hunter.start()
    try:
        yield killed
    finally:
        over.set()
        hunter.join()


def test_a_run_leaves_every_tasks_output_a_decision_a_model_and_a_report(finished: Finished) -> None:
    place, code, told, err = finished
    run_dir = Path(told["run_dir"])
    records = read_records(str(run_dir / "records"))
    assert set(records) == set(STEPS)
    assert {record["status"] for record in records.values()} == {"succeeded"}
    assert len(list((run_dir / "kfp").rglob("executor_output.json"))) == len(STEPS)
    assert code == outcome.EXIT_CODES[told["verdict"]]
    assert told["alarms"] == [] and told["stopped"] == {}
    assert told["model"]["alias"] == {"PASS": "champion", "REVIEW": "candidate"}.get(told["verdict"])
    assert told["clean_accuracy"]["n"] == 48 and set(told["clean_accuracy"]) == {"k", "n", "rate", "low", "high"}
    assert told["confounder"]["asr"] is None and set(told["baseline"]) == {"ca", "asr"}
    assert told["data"]["delivered"] == told["data"]["accepted"] + told["data"]["duplicates"] + told["data"]["quarantined"] == 90
    assert set(told["seconds"]) == set(STEPS)
    assert json.loads((run_dir / "result.json").read_text()) == told
    assert "<html" in (run_dir / "report.html").read_text()
    assert not (run_dir / "tmp").exists()
    git = ["git", "-C", str(place.workspace / "registry"), "rev-parse", "HEAD"]
    assert subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip() == told["data"]["revision"]
    assert "error" not in err
    code, listed, _ = cbd(["suspects", run_dir.name, "--workspace", str(place.workspace), "--top", "5", "--json"])
    assert code == 0 and [row["rank"] for row in listed["suspects"]] == [0, 1, 2, 3, 4]
    assert {row["given"] for row in listed["suspects"]} <= {"0", "1", "2"}


def test_a_finished_run_is_judged_by_another_policy_and_its_model_is_tested_again(finished: Finished) -> None:
    place, code, told, _ = finished
    assert code in (0, 10) and told["model"]["alias"]
    there = ["--workspace", str(place.workspace), "--json"]
    same, judged, _ = cbd(["gate", Path(told["run_dir"]).name, "--policy", str(place.root / "params.yaml"), *there])
    assert (same, judged["verdict"], judged["changed_checks"]) == (code, told["verdict"], [])
    (place.root / "strict.yaml").write_text("gate: {min_clean_accuracy: 1.0, min_images: 1000}\n")
    code, judged, _ = cbd(["gate", told["run_dir"], "--policy", str(place.root / "strict.yaml"), *there])
    assert code == outcome.EXIT_CODES[judged["verdict"]] and "clean accuracy" in {check["name"] for check in judged["changed_checks"]}
    code, again, _ = cbd(["retest", "--params", str(place.root / "params.yaml"), *there])
    row = next(row for row in again["models"] if row["version"] == told["model"]["version"])
    assert code == 0 and row["passes"] and row["name"] == told["model"]["name"], row["sentence"]


def test_a_second_run_is_nothing_new_quickly_and_again_the_same_model_and_a_rejected_suspect_makes_it_new(finished: Finished) -> None:
    place, _, first, _ = finished
    started = time.monotonic()
    code, told, _ = cbd(place.arguments())
    assert time.monotonic() - started < 60  # a training takes longer
    run_dir = Path(told["run_dir"])
    assert (code, told["verdict"], told["alarms"], told["stopped"]) == (14, None, [], {})
    assert told["nothing_new"] == {"run_id": Path(first["run_dir"]).name, "verdict": first["verdict"]}
    assert set(read_records(str(run_dir / "records"))) == {"ingest", "report"}
    assert "NOTHING NEW" in (run_dir / "report.html").read_text()
    _, again, _ = cbd(place.arguments("--again"))
    assert (again["model"]["digest"], again["data"]["revision"]) == (first["model"]["digest"], first["data"]["revision"])
    assert again["run_dir"] != first["run_dir"]
    _, listed, _ = cbd(["suspects", Path(first["run_dir"]).name, "--workspace", str(place.workspace), "--top", "1", "--json"])
    wanted = listed["suspects"][0]["sample_id"][:12]
    (Path(first["run_dir"]) / "arguments.json").unlink()  # runs on a cluster have none
    rejecting = ["quarantine", "reject", wanted, "--run", first["run_dir"], "--reason", "a patch", "--workspace", str(place.workspace)]
    assert cbd([*rejecting, "--json"])[0] == 0
    code, told, _ = cbd(place.arguments())
    assert code == outcome.EXIT_CODES[told["verdict"]] and told["data"]["num_images"] == first["data"]["num_images"] - 1


def test_a_second_run_on_the_same_bucket_says_nothing_new_quickly(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (endpoint := os.environ.get("CBD_TEST_S3_ENDPOINT")):
        pytest.skip("CBD_TEST_S3_ENDPOINT names no S3 server")
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client, bucket = boto3.session.Session().client("s3"), f"cbd-{os.getpid()}-{time.time_ns()}"
    client.create_bucket(Bucket=bucket)
    for path in sorted((place.root / "delivery").rglob("*.png")):
        client.upload_file(str(path), bucket, f"in/{path.relative_to(place.root / 'delivery')}")
    arguments = [f"s3://{bucket}/in" if item == str(place.root / "delivery") else item for item in place.arguments()]
    code, first, _ = cbd(arguments)
    assert code == outcome.EXIT_CODES[first["verdict"]]
    started = time.monotonic()
    code, told, _ = cbd(arguments)
    assert time.monotonic() - started < 60  # a training takes longer
    assert (code, told["nothing_new"]) == (14, {"run_id": Path(first["run_dir"]).name, "verdict": first["verdict"]})


@pytest.mark.parametrize("step", ["ingest", "validate", "version", "train_confounder", "decide", "register", "report"])
def test_a_killed_step_shows_in_the_report_and_fails_the_run(place: Place, step: str) -> None:
    with killing(step, place) as killed:
        code, told, err = cbd(place.arguments())
    assert killed
    assert code == 1 and told["verdict"] is None
    run_dir = Path(told["run_dir"])
    records = read_records(str(run_dir / "records"))
    assert records.get(step, {"status": "running"})["status"] == "running"
    later = set(STEPS[STEPS.index(step) + 1 :]) - {"report"}
    assert not later & set(records) or step == "version"
    page = (run_dir / "report.html").read_text()
    assert step in page
    assert err.splitlines()[-1].startswith("error: ") and str(run_dir) in err


def test_trainings_that_were_killed_and_run_again_give_the_same_model(finished: Finished, place: Place) -> None:
    for step in ("train_confounder", "train_deconfounded"):
        with killing(step, place, after=f"[{step}] ") as killed:
            code, _, _ = cbd(place.arguments())
        assert killed and code == 1
    _, told, _ = cbd(place.arguments())
    assert told["model"]["digest"] == finished.told["model"]["digest"]


def test_data_that_validation_refuses_is_blocked_without_training(place: Place) -> None:
    (place.root / "delivery" / "0" / "tiny.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8)))
    code, told, _ = cbd(place.arguments())
    records = read_records(str(Path(told["run_dir"]) / "records"))
    assert (code, told["verdict"]) == (11, "BLOCK")
    assert set(records) == {"ingest", "validate", "decide", "report"}
    assert told["clean_accuracy"] is None and told["model"]["version"] is None and told["alarms"] == []


def test_a_trial_never_gets_an_alias(place: Place) -> None:
    code, told, _ = cbd(place.arguments("--poison", "badnets", "--poison-rate", "0.2"))
    assert code == outcome.EXIT_CODES[told["verdict"]]
    assert told["trial"] and told["model"]["alias"] is None
    assert "badnets" in told["attack_success_rate"] and told["confounder"]["asr"] is not None


def test_a_mistake_that_a_step_finds_is_told_in_its_words(place: Place) -> None:
    for label in ("1", "2"):
        shutil.rmtree(place.root / "delivery" / label)
    code, told, err = cbd(place.arguments())
    assert (code, told["verdict"]) == (2, None)
    assert (
        "one class only" in err.splitlines()[-1]
        and [line for line in err.splitlines() if line.startswith("error")] == err.splitlines()[-1:]
    )
    assert "one class only" in (Path(told["run_dir"]) / "report.html").read_text()


def run_tampered(place: Place, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> dict[str, Any]:
    """The result of a pipeline whose source was changed."""
    source = (Path(local.__file__).parent / "retrain.py").read_text()
    for before, after in changes:
        assert before in source
        source = source.replace(before, after)
    (place.root / "tampered.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(place.root))
    from cbd.config import load_params

    order = launch.Order(str(place.root / "delivery"), str(place.root / "trusted"), place.workspace)
    run_dir = place.workspace / "runs" / "tampered"
    arguments = launch.pipeline_arguments(order, load_params(place.root / "params.yaml"), run_dir)
    return outcome.finish(run_dir, local.run(arguments, run_dir, pipeline="tampered:retrain"))


ROTATED = [("promote", "was promote"), ("hold", "promote"), ("record", "hold"), ("was promote", "record")]
SKIPPED = [
    ('== "PASS"', '== "never"'),
    ('== "REVIEW"', '== "nor this"'),
    ('dsl.Else(name="not-passed"', 'dsl.Elif(decided["Output"] == "nor that", name="not-passed"'),
    ('dsl.Else(name="unusable")', 'dsl.If(validated["Output"] == False, name="unusable")'),
]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param(
            [(f'branch="{before}"', f'branch="{after}"') for before, after in ROTATED], "but 'promote' ran", id="branches rotated"
        ),
        pytest.param([('decided["Output"] == "PASS"', 'decided["Output"] != "never"')], "but 'promote' ran", id="always promoted"),
        pytest.param(SKIPPED, "register never ran", id="branches skipped"),
        pytest.param([('taken["Output"] == True', 'taken["Output"] == False')], "a branch of the pipeline was skipped", id="nothing new"),
    ],
)
def test_a_flipped_branch_is_found_out(place: Place, monkeypatch: pytest.MonkeyPatch, changes: list[tuple[str, str]], told: str) -> None:
    (place.root / "params.yaml").write_text(PARAMS.replace("min_clean_accuracy: 0.0", "min_clean_accuracy: 1.0"))
    with pytest.raises(CbdError, match=told) as raised:
        run_tampered(place, monkeypatch, *changes)
    assert raised.value.exit_code != 0
    assert (place.workspace / "runs" / "tampered" / "report.html").is_file()


LIE = """from components.records import kfp_component


@kfp_component
def lie_step() -> str:
    \"\"\"What is no verdict, but makes the condition true where it is put together as text.\"\"\"
    return "x' or 'PASS' == 'PASS"


@dsl.pipeline(name="retrain\""""


def test_a_verdict_whose_text_would_make_the_condition_true_promotes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.root / "params.yaml").write_text(PARAMS.replace("min_clean_accuracy: 0.0", "min_clean_accuracy: 1.0"))
    with pytest.raises(CbdError, match="demands the branch|demands that register takes|register never ran"):
        run_tampered(
            place,
            monkeypatch,
            ('@dsl.pipeline(name="retrain"', LIE),
            ('decided["Output"] == "PASS"', 'lie_step().output == "PASS"'),
            ('dsl.Elif(decided["Output"] == "REVIEW"', 'dsl.Elif(lie_step().output == "REVIEW"'),
        )
    code, told, _ = cbd(["retest", "--params", str(place.root / "params.yaml"), "--workspace", str(place.workspace), "--json"])
    assert code == 2 and "no model was ever registered" in told["error"]


def test_a_kill_of_everything_at_once_leaves_a_run_that_can_be_reported(place: Place) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    parent = subprocess.Popen([sys.executable, "-m", "pipelines.cli", *place.arguments()], env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(place.workspace.glob("runs/*/records/train_confounder.json")) and time.monotonic() < until:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    (run_dir,) = place.run_dirs()
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", run_dir.name, "--workspace", str(place.workspace)])
    assert ended.value.code == 0
    assert "killed" in (run_dir / "report.html").read_text()
