"""The commands about data that is held: the quarantine, and the versions in the data registry."""

import getpass
from pathlib import Path

import click

from cbd.errors import ConfigError
from pipelines.options import WORKSPACE, as_json, new_place, tell, workspace_option

by_option = click.option("--by", default=getpass.getuser, show_default="your user name", help="Who decides.")
reason_option = click.option("--reason", required=True, help="Why; it stands in the audit log.")


@click.group()
def quarantine() -> None:
    """Refused files: what they are, and what becomes of them."""


@quarantine.command("list")
@click.option("--status", type=click.Choice(["quarantined", "released", "rejected"]), help="Only these.")
@click.option("--top", type=click.IntRange(1), default=50, show_default=True, help="How many to list.")
@workspace_option
@as_json
def list_command(status: str | None, top: int, workspace: Path, as_json: bool) -> int:
    """The refused files of all runs, the latest first."""
    from pipelines import held

    outputs = held.quarantined(workspace, status=status, top=top)
    return tell(outputs, as_json, f"cbd quarantine show ID --out FILE{_place(workspace)}", table="files")


@quarantine.command()
@click.argument("name", metavar="ID")
@click.option("--out", type=click.Path(path_type=Path), help="Write its original bytes to this file.")
@workspace_option
@as_json
def show(name: str, out: Path | None, workspace: Path, as_json: bool) -> int:
    """A refused file, by the first digits of its id."""
    from pipelines import held

    return tell(
        held.show_quarantined(name, workspace, out=new_place(out) if out else None),
        as_json,
        f"cbd quarantine release {name} --reason WHY{_place(workspace)}",
    )


@quarantine.command()
@click.argument("names", metavar="ID...", nargs=-1, required=True)
@click.option("--label", "label_name", help="The class that it shall have; by default its own.")
@reason_option
@by_option
@workspace_option
@as_json
def release(names: tuple[str, ...], label_name: str | None, reason: str, by: str, workspace: Path, as_json: bool) -> int:
    """Let files come back: the next run judges them anew."""
    from pipelines import held

    outputs = held.release(names, workspace, by=by, reason=reason, label_name=label_name)
    return tell(outputs, as_json, f"cbd run --data DELIVERY --trusted TRUSTED{_place(workspace)}")


@quarantine.command()
@click.argument("names", metavar="ID...", nargs=-1)
@click.option("--run", help="The ids are sample ids of this run's data set.")
@click.option("--suspects", is_flag=True, help="All suspects of --run.")
@reason_option
@by_option
@workspace_option
@as_json
def reject(names: tuple[str, ...], run: str | None, suspects: bool, reason: str, by: str, workspace: Path, as_json: bool) -> int:
    """Leave files, or images of a data set, out of every run from now on."""
    from pipelines import held

    if suspects and not run:
        raise ConfigError("--suspects: of which run? name it with --run")
    if suspects == bool(names):
        raise ConfigError("name the ids, or take all with --run RUN --suspects")
    outputs = held.reject(names, workspace, run=run, by=by, reason=reason)
    return tell(outputs, as_json, f"cbd run --data DELIVERY --trusted TRUSTED{_place(workspace)}")


@click.group()
def data() -> None:
    """Versions of the data sets: list, compare, add, check out."""


@data.command("list")
@workspace_option
@as_json
def list_versions(workspace: Path, as_json: bool) -> int:
    """Every version in the data registry, the latest first."""
    from pipelines import held

    return tell(held.versions(workspace), as_json, f"cbd data diff OLD NEW{_place(workspace)}", table="versions")


@data.command()
@click.argument("old")
@click.argument("new")
@workspace_option
@as_json
def diff(old: str, new: str, workspace: Path, as_json: bool) -> int:
    """What changed from version OLD to version NEW: images, labels, classes, suppliers."""
    from pipelines import held

    return tell(held.diff(old, new, workspace), as_json, f"cbd data checkout {new} --out FOLDER{_place(workspace)}")


@data.command()
@click.argument("version")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--truth", type=click.Path(path_type=Path), help="Folder for what is known of a poisoned copy.")
@workspace_option
@as_json
def checkout(version: str, out: Path, truth: Path | None, workspace: Path, as_json: bool) -> int:
    """A version's data set in the folder OUT, verified."""
    from pipelines import held

    outputs = held.checkout(version, new_place(out), workspace, truth=truth and new_place(truth))
    return tell(outputs, as_json, f"cbd train --data {out} --out MODELS")


@data.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(["trusted", "canary", "control"]), help="By default a delivery, or a poisoned copy.")
@click.option("--truth", "truths", type=click.Path(path_type=Path), multiple=True, help="As `cbd poison` wrote it; one for each attack.")
@workspace_option
@as_json
def add(folder: Path, kind: str | None, truths: tuple[Path, ...], workspace: Path, as_json: bool) -> int:
    """Keeps FOLDER, a data set or a model of honest data (a control), as a version of its own; no run learns from it by that."""
    from pipelines import held

    return tell(held.add(folder, workspace, kind=kind, truths=truths), as_json, f"cbd data list{_place(workspace)}")


def _place(workspace: Path) -> str:
    return "" if workspace == WORKSPACE else f" --workspace {workspace}"


COMMANDS = (quarantine, data)
