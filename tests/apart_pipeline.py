"""`retrain` as on a cluster, for tests: a step has the secrets it is granted, and artifacts that are gone before the report is made."""

import os
import shutil
from pathlib import Path

import yaml
from kfp import local
from kfp.local import subprocess_task_handler

from pipelines.compile import golden
from pipelines.overlays import KEY, TRACKING
from pipelines.retrain import retrain

PODS = Path(os.environ["CBD_TEST_PODS"])
"""Where the steps' artifacts lie; the runner took the run's folder before it loaded this module."""
GRANTED = yaml.safe_load(golden("retrain", "gke").read_text())["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
run_step = subprocess_task_handler.run_local_subprocess


def _run_apart(full_command: list[str], env_vars: dict[str, str] | None = None) -> int:
    step = next(word for word in full_command if word.endswith("_step"))
    if step == "report_step":
        shutil.rmtree(PODS)
    told = GRANTED[f"exec-{step.replace('_', '-')}"]
    granted = {secret["secretName"] for kind in ("secretAsVolume", "secretAsEnv") for secret in told.get(kind, ())}
    refused = {KEY: {"CBD_SIGNING_KEY": "/no/such/key"}, TRACKING: {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}}
    for secret in refused.keys() - granted:
        env_vars = {**(env_vars or {}), **refused[secret]}
    return run_step(full_command, env_vars)


subprocess_task_handler.run_local_subprocess = _run_apart
local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(PODS), workspace_root=str(PODS / "workspace"), raise_on_error=True)
__all__ = ["retrain"]
