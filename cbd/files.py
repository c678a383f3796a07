"""Files that are whole or absent: written under a temporary name, then renamed; and files for one process at a time."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbd.errors import EnvironmentFault


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well, and vanishes otherwise.

    The block may create a file or a folder there. A folder that already stands at `target` is replaced.

    Raises:
        EnvironmentFault: the disk is full or the place is not writable.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise disk_fault(target, error) from None
    try:
        temporary = holder / target.name
        yield temporary
        if target.is_dir() and not target.is_symlink():
            os.rename(target, holder / "replaced")
        os.rename(temporary, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise disk_fault(target, error) from None
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file at `path` (made if absent), open for reading and appending, while no other process holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


@contextlib.contextmanager
def still(path: Path) -> Iterator[int]:
    """The file at `path`, open for reading, while no process holds it as `locked` does; it need not be writable."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file.fileno()


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, whole or not at all; refuses NaN (ValueError)."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text)


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def disk_fault(path: Path, error: OSError) -> EnvironmentFault:
    """The one-line fault for a write that the disk refused."""
    fix = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a folder that you may write to"
    return EnvironmentFault(f"cannot write {path}: {error.strerror or error}; {fix}")
