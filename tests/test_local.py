"""The embedded runner: what a step sees, and what is left when something is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cbd.errors import ConfigError, EnvironmentFault
from components.records import read_records
from pipelines import local

TESTS = Path(__file__).parent
SLOW = pytest.mark.slow


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def run(run_dir: Path, deed: str, verdict: str = "PASS") -> tuple[bool, dict[str, dict[str, Any]]]:
    arguments = {"records": str(run_dir / "records"), "deed": deed, "verdict": verdict}
    succeeded = local.run(arguments, run_dir, pipeline="stub_pipeline:stub")
    return succeeded, read_records(str(run_dir / "records"))


def gone(pid: int) -> bool:
    """Whether the process has ended (or is a zombie that nobody reaps) within a few seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(("verdict", "branch"), [("PASS", "promote"), ("REVIEW", "hold"), ("BLOCK", "record")])
def test_the_branch_of_the_verdict_runs(tmp_path: Path, verdict: str, branch: str) -> None:
    succeeded, records = run(tmp_path, "work", verdict)
    assert succeeded
    assert records["register"]["outputs"]["branch"] == branch
    assert records["report"]["outputs"]["state"] == "SUCCEEDED"
    assert len(list((tmp_path / "kfp").rglob("executor_output.json"))) == 4
    assert not (tmp_path / "tmp").exists()


@pytest.mark.usefixtures("stub")
def test_parameters_arrive_unchanged_although_kfp_rewrites_interpreter_names(tmp_path: Path) -> None:
    run_dir = tmp_path / "python3 and python" / "$HOME `ls` \"quoted\" 'run'"
    succeeded, records = run(run_dir, "python3 is not a path; $HOME; {{not.a.placeholder}}")
    assert succeeded
    assert records["decide"]["outputs"]["made"] == "python3 is not a path; $HOME; {{not.a.placeholder}}"
    assert records["ingest"]["outputs"]["settings"]["OMP_WAIT_POLICY"] == "passive"
    assert records["ingest"]["outputs"]["settings"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert records["ingest"]["outputs"]["settings"]["TMPDIR"] == str(run_dir / "tmp")


@pytest.mark.parametrize("text", ["{{$.inputs}}", "/kfp-workspace/data"])
def test_text_that_the_runner_would_replace_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="replaces"):
        local.run({"gate": {"nested": text}}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize(
    ("deed", "status"), [pytest.param("fail", "failed", marks=SLOW), pytest.param("crash", "failed", marks=SLOW), ("kill", "running")]
)
def test_after_a_failed_or_killed_step_only_the_exit_handler_runs(tmp_path: Path, deed: str, status: str) -> None:
    succeeded, records = run(tmp_path, deed)
    assert not succeeded
    assert records["ingest"]["status"] == status
    assert set(records) == {"ingest", "report"}
    assert records["report"]["outputs"]["state"] == "FAILED"


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_output_that_is_no_text_neither_ends_the_run_nor_is_lost(tmp_path: Path) -> None:
    succeeded, _ = run(tmp_path, "bytes")
    assert succeeded
    assert "no text" in (tmp_path / "pipeline.log").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_a_killed_runner_leaves_no_step_behind(tmp_path: Path) -> None:
    succeeded, records = run(tmp_path, "kill the runner")
    assert not succeeded
    assert records["ingest"]["status"] == "running"
    assert gone(int((tmp_path / "records" / "ingest.pid").read_text()))


@pytest.mark.parametrize("ending", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_an_interrupt_ends_the_steps_as_well(tmp_path: Path, ending: signal.Signals) -> None:
    script = f"""
from pathlib import Path
from pipelines import local
local.run({{"records": {str(tmp_path / "records")!r}, "deed": "sleep"}}, Path({str(tmp_path)!r}), pipeline="stub_pipeline:stub")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs are started with it ignored
    )
    pid = tmp_path / "records" / "ingest.pid"
    until = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    parent.send_signal(ending)
    assert parent.wait(timeout=20) != 0
    assert gone(int(pid.read_text()))
    assert not (tmp_path / "tmp").exists()


def test_a_run_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        local.run({"records": ""}, tmp_path / "file" / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_without_a_terminal_each_finished_step_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "work")
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split(":")[0] for line in told.err.splitlines()] == ["ingest", "decide", "register", "report"]


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_on_a_terminal_bars_are_drawn_and_no_note_can_move_the_cursor(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    script = f"""
from pathlib import Path
from pipelines import local
local.run({{"records": {str(tmp_path / "records")!r}, "deed": "linger"}}, Path({str(tmp_path)!r}), pipeline="stub_pipeline:stub")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "TERM": "xterm", "COLUMNS": "140"}
    child = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=theirs)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        drawn += chunk
    assert child.wait(timeout=20) == 0
    assert b"ingest" in drawn and b"1/2" in drawn and b"half" in drawn
    assert b"\x1b[2J" not in drawn
