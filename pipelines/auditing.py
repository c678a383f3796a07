"""The commands about the audit trail: the log, its keys, and what people decide against the gate. Only declarations."""

from pathlib import Path

import click

from pipelines.holding import by_option, reason_option
from pipelines.options import WORKSPACE, as_json, new_place, tell, workspace_option


@click.group()
def keys() -> None:
    """Keys that sign: rotate, list, trust."""


@keys.command()
@click.option("--to", type=click.Path(path_type=Path), help="Private key (P-256, PEM) that signs from now on.  [default: a new one]")
@reason_option
@by_option
@workspace_option
@as_json
def rotate(to: Path | None, reason: str, by: str, workspace: Path, as_json: bool) -> int:
    """Sign with another key from now on; the old one is revoked, what it signed before stays valid."""
    from components.keyring import rotate_key
    from pipelines.progress import printable

    outputs = rotate_key(workspace.resolve(), to=to, reason=printable(reason), by=printable(by))
    return tell(outputs, as_json, outputs.pop("following"))


@keys.command("list")
@workspace_option
@as_json
def list_keys(workspace: Path, as_json: bool) -> int:
    """Which key signs, which ones did, until which line of the log, and whose are trusted."""
    from components import keyring

    rows = keyring.list_keys(workspace.resolve())
    shown = rows if as_json else [{name: "-" if value is None else value for name, value in row.items()} for row in rows]
    return tell({"keys": shown}, as_json, f"cbd audit verify{_place(workspace)}", table="keys")


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--remove", is_flag=True, help="Trust it no more.")
@workspace_option
@as_json
def trust(file: Path, remove: bool, workspace: Path, as_json: bool) -> int:
    """Believe what the public key in FILE signed, in proofs and bundles of others."""
    from components.keyring import trust_key

    return tell(trust_key(workspace.resolve(), file, remove=remove), as_json, f"cbd keys list{_place(workspace)}")


@click.group()
def audit() -> None:
    """The evidence: verify, export."""


@audit.command()
@click.argument("subject", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--trust", type=click.Path(path_type=Path), multiple=True, help="Public key that must have signed; may be repeated.")
@as_json
def verify(subject: Path, trust: tuple[Path, ...], as_json: bool) -> int:
    """Check every byte of DIR, which `cbd audit export` wrote, offline; the first thing that is wrong is named."""
    from pipelines import exporting

    signature = subject / "model" / "model.sig"
    following = f"model_signing verify key {signature.parent} --signature {signature} --public_key KEY.pub"
    return tell(exporting.verify(subject, trust), as_json, following)


@audit.command()
@click.argument("run")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@workspace_option
@as_json
def export(run: str, out: Path, workspace: Path, as_json: bool) -> int:
    """The evidence on RUN, a run id or its folder, as one signed folder that proves itself to whoever has the public key."""
    from pipelines import exporting

    return tell(exporting.export(run, workspace, new_place(out)), as_json, f"cbd audit verify {out} --trust KEY.pub")


def _place(workspace: Path) -> str:
    return "" if workspace == WORKSPACE else f" --workspace {workspace}"


COMMANDS = (audit, keys)
