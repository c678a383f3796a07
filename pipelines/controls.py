"""The commands about clean controls: harmless models that a candidate is compared with."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.options import WORKSPACE, as_json, load, params_options, tell, workspace_option

if TYPE_CHECKING:
    from cbd.config import Params


@click.group()
def controls() -> None:
    """Clean controls, models of honest data that candidates are compared with: build, list."""


@controls.command()
@click.option("--trusted", required=True, help="Trusted set that does not come from the supplier: a delivery or a data set.")
@click.option("--data", help="Other honest images of the same classes to learn from.  [default: half of the trusted set]")
@click.option("--count", type=click.IntRange(1), default=5, show_default=True, help="How many; fewer than 5 compare nothing.")
@workspace_option
@params_options
@as_json
def build(trusted: str, data: str | None, count: int, workspace: Path, as_json: bool, **options: Any) -> int:
    """Train harmless models and keep them in the data registry."""
    from components import controls as clean
    from pipelines.progress import by_hand

    params = load(**options)
    with tempfile.TemporaryDirectory() as folder, by_hand():
        trusted_set = _opened(trusted, Path(folder) / "trusted", option="--trusted", params=params)
        family = _opened(data, Path(folder) / "data", option="--data", params=params) if data else None
        built = clean.build(trusted_set, family, params=params, count=count, workspace=workspace.resolve())
    return tell({"controls": built}, as_json, f"cbd controls list{_place(workspace)}", table="controls")


@controls.command("list")
@workspace_option
@params_options
@as_json
def list_controls(workspace: Path, as_json: bool, **options: Any) -> int:
    """Every control, the latest first; `today`: it was trained with today's parameters, so today's candidates are compared with it."""
    from components.controls import listed

    rows = listed(workspace.resolve(), load(**options))
    return tell({"controls": rows}, as_json, f"cbd run --data DELIVERY --trusted TRUSTED{_place(workspace)}", table="controls")


def _opened(uri: str, out: Path, *, option: str, params: "Params") -> Path:
    """The data set at `uri`, or the one to which a delivery there is taken in."""
    from cbd.dataset import INFO
    from components.controls import take_in_honest
    from pipelines.launch import check_uri

    check_uri(option, uri)
    if not (Path(uri) / INFO).is_file():
        take_in_honest(uri, out, params.ingest)
        return out
    return Path(uri)


def _place(workspace: Path) -> str:
    return "" if workspace == WORKSPACE else f" --workspace {workspace}"


COMMANDS = (controls,)
