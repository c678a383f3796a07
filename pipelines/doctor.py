"""Whether this machine can run it all."""

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from cbd.errors import CbdError
from pipelines.launch import MIN_FREE_BYTES

PACKAGES = ("kfp", "mlflow", "dvc", "great-expectations", "torch", "torchvision", "pyarrow", "pillow", "scikit-learn")


def examine(workspace: Path) -> dict[str, Any]:
    """What was found, by subject; `healthy` is False if something that every run needs is missing."""
    problems: list[str] = []
    findings: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        findings[package] = _version(package, problems)
    findings["device"] = _device(problems)
    findings["free disk"] = _disk(workspace, problems)
    findings["git"] = _program_version("git") or "missing"
    if findings["git"] == "missing":
        problems.append("git is missing: install it, the data registry is a git repository")
    findings["chromium"] = _program_version("chromium") or "missing (only the tests of the report need it)"
    findings["tracking"] = _tracking(workspace, problems)
    return findings | {"problems": problems, "healthy": not problems}


def _version(package: str, problems: list[str]) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"{package} is missing: run `make setup`")
        return "missing"


def _device(problems: list[str]) -> str:
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch does not import ({str(error).splitlines()[0]}): run `make setup`")
        return "unknown"
    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    return f"cpu, {torch.get_num_threads()} threads"


def _disk(workspace: Path, problems: list[str]) -> str:
    place = workspace.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < MIN_FREE_BYTES:
        problems.append(f"{place} has {free / 1e9:.1f} GB free, a run needs {MIN_FREE_BYTES / 1e9:.1f} GB: free some space")
    return f"{free / 1e9:.1f} GB at {place}"


def _program_version(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip().splitlines()[0] if told.stdout.strip() else None


def _tracking(workspace: Path, problems: list[str]) -> str:
    from components import tracking

    try:
        tracking.check_reachable(workspace)
    except CbdError as error:
        problems.append(str(error))
        return "out of reach"
    return str(tracking.tracking_uri(workspace))
