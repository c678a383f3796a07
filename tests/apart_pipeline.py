"""`retrain` as on a cluster, for tests: what a step writes lies outside the run's folder, and is gone before the report is made."""

import os
import shutil
from pathlib import Path

from kfp import local
from kfp.local import subprocess_task_handler

from pipelines.retrain import retrain

PODS = Path(os.environ["CBD_TEST_PODS"])
"""Where the steps' artifacts lie; the runner took the run's folder before it loaded this module."""
run_step = subprocess_task_handler.run_local_subprocess


def _run_apart(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    if "report_step" in full_command:
        shutil.rmtree(PODS)
    return run_step(full_command, env_vars)


subprocess_task_handler.run_local_subprocess = _run_apart
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(PODS), workspace_root=str(PODS / "workspace"), raise_on_error=True)
__all__ = ["retrain"]
