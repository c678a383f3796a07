"""What stands in MLflow's registry, compared with the log: read from its SQLite file, without MLflow."""

import contextlib
import sqlite3
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path

from cbd.audit import LOG
from cbd.bundle import bundle_digest, read_card
from cbd.errors import DataError
from cbd.keys import PublicKey
from cbd.model_signature import verify_model
from cbd.signed_model import DEMANDED
from components.decision import Signers, check_decision
from components.logged import Unverified
from components.standing import Move, holder, lapsed
from components.tracking_store import sqlite_file, tracking_uri

ARTIFACTS = "mlartifacts"
"""Folder of the workspace in which a store without a server keeps its files."""
OURS = "WHERE workspace = 'default'"
"""The rows that MLflow looks at here: what it calls a workspace is not ours, and without a server there is one."""


def check_registry(workspace: Path, moves: Sequence[Move], *, signers: Signers, key: PublicKey) -> Iterator[str]:
    """A sentence for each alias, and one for the models: aliases are where the log put them, models are those that it names.

    A model is looked at where MLflow fetches it from; one that is not there, and has no alias, is told as `Unverified`.

    Without an SQLite file, where MLflow is a server, the log alone is looked at.

    Args:
        workspace: with the store.
        moves: the log's events about registered models, expired overrides marked.
        signers: under which key the log names each decision.
        key: what signs now.

    Raises:
        DataError: an alias was moved, stands by an override that is over, or a registered model was altered or
            exchanged, or has an alias and is not there.
    """
    names = sorted({str(move["name"]) for move in moves})
    file = sqlite_file(tracking_uri(workspace))
    if file is None or not file.is_file():
        for name in names:
            if over := lapsed([move for move in moves if move["name"] == name]):
                raise DataError(_expired(name, over))
        if names:
            yield "registry: not looked at, MLflow is a server; what is fetched from it is verified each time"
        return
    rows = _rows(file, f"SELECT name, alias, version FROM registered_model_aliases {OURS}")
    aliases = {(name, alias): str(version) for name, alias, version in rows}
    for name in names:
        yield from _check_aliases(file, name, [move for move in moves if move["name"] == name], aliases)
    aliased, found = {(name, version) for (name, _), version in aliases.items()}, _folders(file, workspace)
    placed = [(move, found.get((move["name"], str(move["version"])), [])) for move in moves if move["event"] == "register"]
    for move, folders in placed:
        if not folders and (move["name"], str(move["version"])) in aliased:
            raise DataError(f"{file}: version {move['version']} of {move['name']} has an alias and names no folder here; restore both")
        for folder in folders:
            _check_model(move, folder, signers, key)
    if num_checked := sum(bool(folders) for _, folders in placed):
        yield f"registry: {num_checked} registered models, and the decisions beside them, are those that the log names"
    if gone := [move for move, folders in placed if not folders]:
        told = f"{len(gone)} registered models without an alias are not there, such as version {gone[0]['version']} of {gone[0]['name']}"
        yield Unverified(f"registry: NOT VERIFIED: {told}")


def _check_aliases(file: Path, name: str, moves: Sequence[Move], aliases: dict[tuple[str, str], str]) -> Iterator[str]:
    for alias in DEMANDED:
        told, found, over = holder(moves, alias), aliases.get((name, alias)), lapsed(moves)
        if told != found and over and alias == over["alias"] and found == str(over["version"]):
            raise DataError(_expired(name, over))
        if told != found:
            what = f"is version {found or 'none'}, {LOG} last set {told or 'none'}: the alias was moved"
            raise DataError(f"{file}: models:/{name}@{alias} {what}; set it right with cbd rollback, or cbd retest --demote")
        if told:
            yield f"{alias}: models:/{name} version {told}, as the log last set it"


def _check_model(move: Move, folder: Path, signers: Signers, key: PublicKey) -> None:
    """Raises DataError unless a registered model and its decision are those that the log names."""
    read_card(folder)
    what = f"version {move['version']} of {move['name']}"
    if (found := bundle_digest(folder)) != move["model_digest"]:
        raise DataError(f"{folder}: altered: {what} is {found[:12]}, {LOG} registered {move['model_digest'][:12]}; restore the model")
    if (found := check_decision(folder, signers, key=key).digest) != move["decision_digest"]:
        raise DataError(f"{folder}: the decision of {what} is {found[:12]}, {LOG} registered {move['decision_digest'][:12]}; restore it")
    verify_model(folder, signers["decision", found])


def _expired(name: str, move: Move) -> str:
    return (
        f"{name} version {move['version']}: is champion by an override that expired on {move['expires']}; "
        f"run: cbd rollback {name} --reason WHY, or cbd retest --demote"
    )


def _rows(file: Path, query: str) -> list[tuple[str, ...]]:
    with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=30)) as store:
        try:
            return store.execute(query).fetchall()
        except sqlite3.Error as error:
            raise DataError(f"{file}: cannot be read as MLflow's store: {error}; restore it from a copy") from None


def _folders(file: Path, workspace: Path) -> dict[tuple[str, str], list[Path]]:
    """By name and version: where MLflow fetches a model from and, if the workspace was moved or copied, where it lies in it."""
    query = f"SELECT name, version, COALESCE(NULLIF(storage_location, ''), source) FROM model_versions {OURS}"
    return {(name, str(version)): _local(place, workspace) for name, version, place in _rows(file, query)}


def _local(place: object, workspace: Path) -> list[Path]:
    """The folders on this machine that an address in MLflow's file may mean, as far as they are there."""
    if not isinstance(place, str) or not place.startswith("file:///"):
        return []
    path = Path(urllib.parse.unquote(urllib.parse.urlsplit(place).path))
    meant = [path]
    if ARTIFACTS in path.parts:
        at = len(path.parts) - path.parts[::-1].index(ARTIFACTS)
        meant.append(workspace.joinpath(ARTIFACTS, *path.parts[at:]))
    return [folder for folder in dict.fromkeys(meant) if folder.is_dir()]
