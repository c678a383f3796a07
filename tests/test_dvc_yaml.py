"""`dvc.yaml`: every stage can be resolved, and `dvc repro` really runs in a fresh clone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parent.parent
DVC = str(Path(sys.executable).parent / "dvc")
ATTACKS = ("badnets", "blend")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git copy of the project with its own `.venv/bin/cbd`, and parameters for a short run."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("cbd", "components", "pipelines", "data", ".dvc"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "tmp", "cache", "config.local"))
    for name in ("dvc.yaml", ".dvcignore", "params.yaml", ".gitignore"):
        shutil.copy(PROJECT / name, folder / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["model"] |= {"image_size": 16}
    params["confounder"] |= {"steps": 20, "max_epochs": 2, "until_slow": False}
    params["deconfounded"] |= {"epochs": 1}
    params["gate"] |= {"null_members": 2}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / ".venv" / "bin").mkdir(parents=True)
    command = folder / ".venv" / "bin" / "cbd"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" -m pipelines.cli "$@"\n')
    command.chmod(0o755)
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


def dvc(clone: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DVC_NO_ANALYTICS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    told = subprocess.run([DVC, *arguments], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    return told.stdout


def test_the_stages_are_a_matrix_over_attacks(clone: Path) -> None:
    stages = {line.split()[0] for line in dvc(clone, "stage", "list").splitlines()}
    every = {f"{stage}@{attack}" for stage in ("poison", "validate", "train", "evaluate", "scan", "gate") for attack in ATTACKS}
    assert stages == {"deliver", "ingest"} | every


def test_dvc_sends_nothing_home(clone: Path) -> None:
    assert "core.analytics=false" in dvc(clone, "config", "--list")


@pytest.mark.slow
def test_repro_runs_every_stage_and_then_nothing(clone: Path) -> None:
    dvc(clone, "repro")
    for attack in ATTACKS:
        evaluation = json.loads((clone / "out" / "evaluated" / attack / "evaluation.json").read_text())
        decision = json.loads((clone / "out" / "decided" / attack / "decision.json").read_text())
        assert evaluation["confounder"]["asr"] is not None and attack in evaluation["attack_success_rate"]
        assert decision["trial"] is True
    assert "Data and pipelines are up to date." in dvc(clone, "status")
