"""The commands about the audit trail: the log, its keys, and what people decide against the gate. Only declarations."""

from datetime import UTC, datetime
from pathlib import Path

import click

from cbd.errors import ConfigError
from pipelines.holding import by_option, reason_option
from pipelines.options import WORKSPACE, as_json, new_place, tell, workspace_option
from pipelines.progress import printable


@click.group()
def keys() -> None:
    """Keys that sign: rotate, list, trust."""


@keys.command()
@click.option("--to", help="Private key that signs from now on: a P-256 key in PEM form, or pkcs11:...  [default: a new one]")
@reason_option
@by_option
@workspace_option
@as_json
def rotate(to: str | None, reason: str, by: str, workspace: Path, as_json: bool) -> int:
    """Sign with another key from now on; the old one is revoked, what it signed before stays valid."""
    from components.keyring import rotate_key

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
    """Believe what the public key in FILE signed, in proofs of others; for an exported run name it with --trust."""
    from components.keyring import trust_key

    return tell(trust_key(workspace.resolve(), file, remove=remove), as_json, f"cbd keys list{_place(workspace)}")


@click.group()
def audit() -> None:
    """The evidence: verify, show, prove, export."""


@audit.command()
@click.argument("subject", metavar="[RUN|PROOF|DIR]", required=False)
@click.option("--all", "everything", is_flag=True, help="The whole workspace; so it is without RUN.")
@click.option("--trust", type=click.Path(path_type=Path), multiple=True, help="Public key that must have signed; may be repeated.")
@click.option("--since", type=click.Path(path_type=Path), help="With PROOF: the earlier proof at whose head it must begin.")
@workspace_option
@as_json
def verify(subject: str | None, everything: bool, trust: tuple[Path, ...], since: Path | None, workspace: Path, as_json: bool) -> int:
    """Check every signature, digest, head and proof, offline; the first thing that is wrong is named, and the exit code is not 0.

    A run that was never closed is refused by its name; of a whole workspace it is told as NOT VERIFIED, and counted apart.

    RUN is a run id or its folder, PROOF a file that `cbd audit prove` wrote, DIR a folder that `cbd audit export` wrote.
    """
    from pipelines import exporting

    if subject and not everything and exporting.is_export(Path(subject)):
        signature = Path(subject) / "model" / "model.sig"
        following = f"model_signing verify key {signature.parent} --signature {signature} --public_key KEY.pub"
        return tell(exporting.verify(Path(subject), trust), as_json, following)
    from pipelines import evidence

    if subject and everything:
        raise ConfigError(f"{subject}: goes without --all; name a run, or take the whole workspace")
    from components.logged import Unverified

    found = {True: 0, False: 0}
    for sentence in evidence.verify(subject, workspace, trust=trust, since=since):
        found[not isinstance(sentence, Unverified)] += 1
        if not as_json:
            print(printable(sentence))
    outputs = {"verified": True, "num_checks": found[True], "num_unverified": found[False]}
    return tell(outputs, as_json, f"cbd audit show{_place(workspace)}")


@audit.command()
@click.argument("run", required=False)
@workspace_option
@as_json
def show(run: str | None, workspace: Path, as_json: bool) -> int:
    """What happened, line by line: all of it, or what is about RUN."""
    from pipelines import evidence

    outputs = evidence.timeline(run, workspace)
    return tell(outputs, as_json, f"cbd audit verify{f' {run}' if run else ''}{_place(workspace)}", table="events")


@audit.command()
@click.argument("run")
@click.option("--since", type=click.Path(path_type=Path), help="An earlier proof: also prove that the log only grew since.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write.")
@workspace_option
@as_json
def prove(run: str, since: Path | None, out: Path, workspace: Path, as_json: bool) -> int:
    """A proof, for somebody without the log, that it has the lines about RUN and that it only ever grew."""
    from pipelines import evidence

    outputs = evidence.prove(run, workspace, since=since, out=new_place(out))
    return tell(outputs, as_json, f"cbd audit verify {out} --trust KEY.pub")


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


@click.command()
@click.argument("run")
@click.option("--expires", type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]), required=True, help="UTC; at most 90 days from now.")
@reason_option
@by_option
@workspace_option
@as_json
def override(run: str, expires: datetime, reason: str, by: str, workspace: Path, as_json: bool) -> int:
    """Let the model of RUN, whose verdict is REVIEW, be champion until a date: signed, logged, and over then."""
    from components.override import override

    given = {"reason": printable(reason), "by": printable(by), "expires": expires.replace(tzinfo=UTC)}
    outputs = override(Path(run).name, workspace.resolve(), **given)
    return tell(outputs, as_json, f"cbd predict models:/{outputs['name']}@champion --data IMAGES --out predictions.parquet")


COMMANDS = (audit, keys, override)
