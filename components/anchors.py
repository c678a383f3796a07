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

from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError
from cbd.files import disk_fault, locked
from cbd.heads import Head, head_name, parse_head, read_heads, sign_head
from cbd.log_store import open_log
from components.git import git, origin
from components.tracking_store import sqlite_file, tracking_uri

if TYPE_CHECKING:
    from components.object_store import Store

TAG = "cbd.log_head"
"""Of an MLflow run: the head of the log when the run was registered or closed."""
BUCKET = "CBD_LOG_HEADS"
"""Address (s3://bucket/prefix), of one log alone, at which every head is also put as an object; with object lock nobody takes it away."""
NOTES = "refs/notes/cbd-heads"
"""Git notes of the data registry, a ref for each log: refs/notes/cbd-heads/<first 12 of the first line's hash>."""

_AS_THEY_ARE = ("--patch", "--text", "--no-textconv", "--no-ext-diff", "--no-color")
"""How git shows what was added, whatever attributes of the files say."""


def close_log(workspace: Path) -> Head:
    """A new signed head of the log, kept beside it and, where there is one, in the data registry's git history, at its origin,
    and in the bucket that `CBD_LOG_HEADS` names.

    Raises:
        DataError: the log contradicts its last head, or the origin holds heads of another history of it.
        EnvironmentFault: the disk is full, or the origin is out of reach.
    """
    head = sign_head(workspace)
    registry = workspace / "registry"
    if (registry / ".git").is_dir() and git(registry, "for-each-ref", "refs/heads/main"):
        with _registry_lock(workspace):
            ref = _notes_ref(workspace)
            _follow(registry, ref)
            git(registry, "notes", f"--ref={ref}", "append", f"--message={told(head)}", "HEAD")
            if origin():
                git(registry, "push", "--quiet", "origin", ref)
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
        with _registry_lock(workspace):
            _follow(registry, ref)
        # every text that was ever added to the notes, so that one which was taken out again still counts
        known = git(registry, "for-each-ref", ref)
        history = git(registry, "log", "--format=", *_AS_THEY_ARE, "--unified=0", ref, "--") if known else ""
        texts = {line[1:] for line in history.splitlines() if line.startswith("+") and not line.startswith("+++") and line != "+"}
        yield place, [parse_head(text.encode(), told=place) for text in sorted(texts)]
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


def _follow(registry: Path, ref: str) -> None:
    """Brings the heads that the origin has, if there is one; it never replaces ours by others."""
    if not origin():
        return
    theirs = ref.replace(NOTES, f"{NOTES}-of-origin")
    git(registry, "fetch", "--quiet", str(origin()), f"+{NOTES}/*:{NOTES}-of-origin/*")
    known = {name for name in (ref, theirs) if git(registry, "for-each-ref", name)}
    if theirs not in known:
        return
    if ref not in known or git(registry, "rev-list", "--count", f"{theirs}..{ref}") == "0":
        git(registry, "update-ref", ref, theirs)
    elif git(registry, "rev-list", "--count", f"{ref}..{theirs}") != "0":
        raise DataError(f"{registry}: its origin holds heads of another history of this log; restore the log and the registry from a copy")


@contextlib.contextmanager
def _registry_lock(workspace: Path) -> Iterator[None]:
    try:
        with locked(workspace / "registry.lock"):
            yield
    except OSError as error:
        raise disk_fault(workspace / "registry", error) from None
