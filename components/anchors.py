"""Heads of the log where its owner cannot change them unseen: in the data registry's git history, in the MLflow runs'
tags, and in a bucket.

They are read again without MLflow: from its SQLite file, which is the store of a workspace without a server.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cbd.audit import walk_lines
from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError, EnvironmentFault
from cbd.heads import Head, Matching, head_name, parse_head, read_heads, sign_head
from cbd.keys import PrivateKey
from cbd.log_store import open_log
from components.git import AS_THEY_ARE, ATTEMPTS, git, held, origin
from components.tracking_store import sqlite_file, tracking_uri

if TYPE_CHECKING:
    from components.object_store import Store

TAG = "cbd.log_head"
"""Of an MLflow run: the head of the log when the run was registered or closed."""
BUCKET = "CBD_LOG_HEADS"
"""Address (s3://bucket/prefix), of one log alone, at which every head is also put as an object; with object lock nobody takes it away."""
NOTES = "refs/notes/cbd-heads"
"""Git notes of the data registry, a ref for each log: refs/notes/cbd-heads/<first 12 of the first line's hash>."""


def close_log(workspace: Path, key: PrivateKey | None = None) -> Head:
    """A new signed head of the log, kept beside it and, where there is one, in the data registry's git history, at its origin,
    and in the bucket that `CBD_LOG_HEADS` names; signed by `key` as `sign_head` says.

    Raises:
        DataError: the log contradicts its last head, or the origin holds heads of another history of it.
        EnvironmentFault: the disk is full, or the origin is out of reach.
    """
    head = sign_head(workspace, key)
    registry = workspace / "registry"
    if (registry / ".git").is_dir() and git(registry, "for-each-ref", "refs/heads/main"):
        with held(registry):
            ref = _notes_ref(workspace)
            _follow(workspace, ref)
            _add(registry, ref, told(head))
            _publish(workspace, ref)
    if bucket := _bucket():
        bucket.put_once(head_name(head), told(head).encode())
    return head


def told(head: Head) -> str:
    """The head as text, for a tag or a note."""
    return canonical_json(head).decode()


def read_anchors(workspace: Path) -> Iterator[tuple[str, list[Head]]]:
    """Where heads of this log are kept, and which; places that do not exist are left out.

    Raises:
        DataError: what is kept in a place is no head, or the origin's heads are of another history.
        EnvironmentFault: the origin is out of reach.
    """
    log = open_log(workspace)
    yield log.heads_told, read_heads(log)
    registry = workspace / "registry"
    if (registry / ".git").is_dir() and log.exists():
        place, ref = f"git notes of {registry}", _notes_ref(workspace)
        if origin():
            with held(registry):
                _follow(workspace, ref)
        yield place, [parse_head(text.encode(), told=place) for text in _added(registry, ref)]
    if (file := sqlite_file(tracking_uri(workspace))) and file.is_file():
        place = f"tags of the runs in {file}"
        yield place, [parse_head(text.encode(), told=place) for text in _tags(file)]
    if bucket := _bucket():
        found = bucket.read_versions()
        yield bucket.told, [parse_head(data, told=f"{bucket.told}: {path}") for path in sorted(found) for data in found[path]]


def _bucket() -> "Store | None":
    """The objects below the address that `CBD_LOG_HEADS` names."""
    address = os.environ.get(BUCKET)
    if not address:
        return None
    if not address.startswith("s3://"):
        raise ConfigError(f"{BUCKET}={address}: expected s3://bucket/prefix")
    from components.object_store import open_store

    return open_store(address, told=f"{BUCKET} {address}")


def _tags(file: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=30)) as store:
        try:
            return [str(value) for (value,) in store.execute("SELECT value FROM tags WHERE key = ? ORDER BY value", (TAG,))]
        except sqlite3.Error as error:
            raise DataError(f"{file}: cannot be read as MLflow's store: {error}; restore it from a copy") from None


def _notes_ref(workspace: Path) -> str:
    """The ref of this log's notes."""
    return f"{NOTES}/{_log_id(workspace)}"


def _log_id(workspace: Path) -> str:
    """Tells this log from others: the first 12 digits of its first line's hash."""
    log = open_log(workspace)
    try:
        return str(json.loads(next(log.lines(), b""))["hash"][:12])
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{log}: line 1 is no log entry: it was edited; restore the log from a copy") from None


def _add(registry: Path, ref: str, text: str) -> None:
    git(registry, "notes", f"--ref={ref}", "append", f"--message={text}", "HEAD")


def _added(registry: Path, ref: str) -> list[str]:
    """Every text that was ever added to the notes, so that one which was taken out again still counts."""
    if not git(registry, "for-each-ref", ref):
        return []
    history = git(registry, "log", "--format=", *AS_THEY_ARE, "--unified=0", ref, "--").splitlines()
    return sorted({line[1:] for line in history if line.startswith("+") and not line.startswith("+++") and line != "+"})


def _publish(workspace: Path, ref: str) -> None:
    """Pushes the heads to the origin, if there is one; where others were faster, on top of theirs."""
    if not (url := origin()):
        return
    for _ in range(ATTEMPTS):
        try:
            git(workspace / "registry", "push", "--quiet", "--", url, ref)
            return
        except EnvironmentFault:
            if not _follow(workspace, ref):
                raise
    raise EnvironmentFault(f"{workspace / 'registry'}: others keep publishing heads to its origin; run again")


def _follow(workspace: Path, ref: str) -> bool:
    """Whether the origin, if there is one, had heads that were not here: now they are, and ours that it has not are added to them."""
    if not (url := origin()):
        return False
    registry, theirs = workspace / "registry", ref.replace(NOTES, f"{NOTES}-of-origin")
    git(registry, "fetch", "--quiet", "--", url, f"+{NOTES}/*:{NOTES}-of-origin/*")
    known = {name for name in (ref, theirs) if git(registry, "for-each-ref", name)}
    if theirs not in known or (ref in known and git(registry, "rev-list", "--count", f"{ref}..{theirs}") == "0"):
        return False
    own: set[str] = set()
    if ref in known and git(registry, "rev-list", "--count", f"{theirs}..{ref}") != "0":
        _check_history(workspace, theirs)
        own = set(_added(registry, ref)) - set(_added(registry, theirs))
    git(registry, "update-ref", ref, theirs)
    for text in sorted(own):
        _add(registry, ref, text)
    return True


def _check_history(workspace: Path, theirs: str) -> None:
    """Raises DataError where the origin's heads are not of this log: two that wrote it have heads of one history."""
    place = f"the origin of {workspace / 'registry'}"
    matching = Matching((place, parse_head(text.encode(), told=place)) for text in _added(workspace / "registry", theirs))
    for line in walk_lines(open_log(workspace), key=None):
        matching.add(line)
    matching.finish()
