"""One run of the pipeline, from the checks at the door to the result."""

import datetime
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd.config import Params
from cbd.errors import ConfigError, DataError, EnvironmentFault
from cbd.files import disk_fault
from pipelines import local, outcome

MIN_FREE_BYTES = 2**30
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SECTIONS = ("ingest", "validation", "model", "confounder", "deconfounded", "training", "canary", "gate", "poison")


@dataclass(frozen=True)
class Order:
    """What the pipeline is to be run on."""

    data: str
    """Delivery: a local path or s3://bucket/prefix."""
    trusted: str
    """Trusted set, in the same formats; must not come from the supplier."""
    workspace: Path
    """Where everything that outlives the run is kept."""
    name: str = "model"
    """Name of the registered model, before the digest of its class list."""
    supplier: str = "unnamed"
    """Who delivered the data."""
    limit: int = 0
    """Take in at most so many images; 0 is all of them."""
    truth: str = ""
    """Folder with the ground truth of a poisoned delivery, for measuring only; empty: none."""
    baseline: bool = False
    """Also train without defence on the same data."""
    again: bool = False
    """Train although the data set would be one that was decided on before."""


def launch(order: Order, params: Params) -> dict[str, Any]:
    """The result of one run of the pipeline (see `outcome.finish`).

    Raises:
        ConfigError, DataError: refused at the door, before anything is written.
        EnvironmentFault: the workspace cannot be used.
        RunFailed: a step failed; its report stands in the run folder.
    """
    run_id = f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    check_order(order)
    workspace = order.workspace.resolve()
    run_dir = workspace / "runs" / run_id
    check_workspace(workspace)
    succeeded = local.run(pipeline_arguments(order, params, run_dir), run_dir)
    return outcome.finish(run_dir, succeeded)


def pipeline_arguments(order: Order, params: Params, run_dir: Path) -> dict[str, Any]:
    """The parameters of the pipeline `retrain`."""
    sections = params.model_dump(mode="json", exclude_none=True)  # KFP takes no null; the steps fill the defaults in again
    return {
        "data": _absolute(order.data),
        "trusted": _absolute(order.trusted),
        "records": str(run_dir / "records"),
        "run_id": run_dir.name,
        "workspace": str(order.workspace.resolve()),
        "name": order.name,
        "supplier": order.supplier,
        "limit": order.limit,
        "truth": order.truth and _absolute(order.truth),
        "baseline": order.baseline,
        "again": order.again,
        "seed": params.seed,
        "preset": params.preset,
        **{section: sections[section] for section in SECTIONS},
    }


def check_order(order: Order) -> None:
    """Refuses at the door what no run could use.

    Raises:
        ConfigError, DataError: with the option to mend.
    """
    check_names(order)
    for option, uri in (("--data", order.data), ("--trusted", order.trusted)):
        check_uri(option, uri)
    if order.truth and not (Path(order.truth) / "truth.json").is_file():
        raise DataError(f"--truth {order.truth}: no truth.json there; give a folder that `cbd poison` wrote")


def check_names(order: Order) -> None:
    """Refuses names that are none.

    Raises:
        ConfigError: with the option to mend.
    """
    for option, value in (("--name", order.name), ("--supplier", order.supplier)):
        if not NAME.fullmatch(value):
            raise ConfigError(f"{option} {value!r}: expected up to 64 letters, digits, '.', '_' or '-', starting with a letter or digit")


def check_uri(option: str, uri: str) -> None:
    """Refuses a local path at which there is nothing.

    Raises:
        DataError: with the option to mend.
    """
    if not uri.startswith("s3://") and not Path(uri).exists():
        raise DataError(f"{option} {uri}: no such file or folder; give class folders of images, Parquet, an archive, or s3://bucket/prefix")


def check_workspace(workspace: Path) -> None:
    """Refuses a workspace that cannot be written, is nearly full, or whose MLflow server is out of reach.

    Raises:
        EnvironmentFault: with the fix.
    """
    from components.tracking import check_reachable

    try:
        (workspace / "runs").mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(workspace).free
        (probe := workspace / "runs" / f".probe-{secrets.token_hex(4)}").mkdir()
        probe.rmdir()
    except OSError as error:
        raise disk_fault(workspace, error) from None
    if free < MIN_FREE_BYTES:
        needed = MIN_FREE_BYTES / 1e9
        raise EnvironmentFault(
            f"{workspace}: {free / 1e9:.1f} GB free, a run needs {needed:.1f} GB; free some space or choose another --workspace"
        )
    check_reachable(workspace)


def _absolute(uri: str) -> str:
    return uri if uri.startswith("s3://") else str(Path(uri).resolve())
