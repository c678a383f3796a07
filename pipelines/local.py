"""The embedded runner: the pipeline on this machine, under KFP's subprocess runner, in a session of its own.

KFP's runner prints, keeps settings in globals and leaves its children behind when it is interrupted. So it runs in a child process
(`python -m pipelines.local`): the parent writes its output to `pipeline.log`, draws the progress, and ends the whole session when it stops.
"""

import contextlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from cbd.errors import ConfigError
from cbd.files import disk_fault, write_json
from components.parallel import num_cores
from pipelines.progress import display

PIPELINE = "pipelines.retrain:retrain"
REWRITTEN = ("{{$", "/kfp-workspace", "\0")
"""Text that KFP's runner would replace inside a parameter."""
CHILD_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
    "PYTHONUNBUFFERED": "1",
}


def share_cores() -> None:
    """Sets how this process and its children use the cores, where the user has not.

    One thread per core, waiting without spinning: on 2 cores this trains 1.9 times as fast as 1 thread on a quiet machine and about as
    fast on a busy one, where spinning threads take up to twice as long. The number also decides the order of sums: the same number is
    needed for the same bytes.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))


def run(arguments: dict[str, Any], run_dir: Path, *, pipeline: str = PIPELINE) -> bool:
    """Whether the pipeline, its exit handler included, ran to its end without a failure.

    Args:
        arguments: the pipeline's parameters.
        run_dir: gets `arguments.json`, `pipeline.log` and, under `kfp/`, what every task wrote.
        pipeline: where the pipeline is defined, as `module:name`.

    Raises:
        ConfigError: a parameter holds text that the runner would rewrite.
        EnvironmentFault: the run folder cannot be written.
    """
    _refuse_rewritten(arguments)
    share_cores()
    write_json(run_dir / "arguments.json", arguments)
    command = [sys.executable, "-m", "pipelines.local", str(run_dir), pipeline]
    with _scratch(run_dir) as scratch, _told_to_end():
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            env=_environment(scratch),
            start_new_session=True,
        )
        try:
            _follow(child, run_dir)
            _wait(child, seconds=None)
        finally:
            _end_session(child)
        return child.returncode == 0


def _follow(child: "subprocess.Popen[str]", run_dir: Path) -> None:
    if child.stdout is None:
        raise ValueError("the child was started without a pipe")
    path = run_dir / "pipeline.log"
    try:
        with path.open("a", encoding="utf-8", buffering=1) as log, display(run_dir / "records") as show:
            for line in child.stdout:
                log.write(line)
                show(line)
    except OSError as error:
        raise disk_fault(path, error) from None


def _end_session(child: "subprocess.Popen[str]") -> None:
    """Ends the child and everything that it started; a step outlives a runner that was killed."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, ending)
        _wait(child, seconds=5)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _wait(child: "subprocess.Popen[str]", *, seconds: float | None) -> None:
    """Waits for the child's end, but leaves it unreaped: so its number still names its session and no other."""
    until = time.monotonic() + seconds if seconds is not None else math.inf
    while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) and time.monotonic() < until:
        time.sleep(0.01)


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, being told to end by a signal is the same as Ctrl-C, so that no child is left behind."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    endings = [ending for ending in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(ending) != signal.SIG_IGN]  # nohup ignores one
    try:
        before = [signal.signal(ending, interrupt) for ending in endings]
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        for ending, handler in zip(endings, before, strict=True):
            signal.signal(ending, handler)


@contextlib.contextmanager
def _scratch(run_dir: Path) -> Iterator[Path]:
    """A folder for temporary files that is gone afterwards: KFP leaves one per task."""
    path = run_dir / "tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_fault(path, error) from None
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _environment(scratch: Path) -> dict[str, str]:
    project = str(Path(__file__).resolve().parent.parent)
    return {
        **os.environ,
        **CHILD_SETTINGS,
        "PYTHONPATH": os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "TMPDIR": str(scratch),
    }


def _refuse_rewritten(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _refuse_rewritten(item)
    elif isinstance(value, str):
        for text in REWRITTEN:
            if text in value:
                raise ConfigError(f"{value!r}: a path or name may not contain {text!r}, which the pipeline runner replaces; rename it")


def _run_step(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    """The exit status of a step's command. KFP's own breaks the whole run, exit handler included, on output that is no UTF-8."""
    env = {**os.environ, **(env_vars or {})}
    with subprocess.Popen(
        full_command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="backslashreplace", env=env
    ) as step:
        for line in step.stdout or ():
            print(line, end="")
        return step.wait()


def _execute(run_dir: Path, pipeline: str) -> None:
    """Runs the pipeline in this process; raises RuntimeError if a task failed."""
    from kfp import local
    from kfp.local import subprocess_task_handler

    subprocess_task_handler.run_local_subprocess = _run_step
    # KFP writes the interpreter's path over every "python3" in a command, parameters included; this makes that harmless.
    sys.executable = "python3"
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(run_dir / "kfp"),
        workspace_root=str(run_dir / "tmp" / "workspace"),
        raise_on_error=True,
    )
    module, name = pipeline.split(":")
    getattr(importlib.import_module(module), name)(**json.loads((run_dir / "arguments.json").read_text()))


if __name__ == "__main__":
    _execute(Path(sys.argv[1]), sys.argv[2])
