"""Where the log lies: in a file of the workspace or, where several machines write, in a bucket, an object for every line."""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from cbd.errors import ConfigError
from cbd.files import disk_fault, locked, still
from cbd.lines import complete_end, last_line, write_line

LOG = "audit.jsonl"
HEADS = "heads.jsonl"
"""In the workspace, beside the log: one signed head a line, see `cbd.heads`."""
ENVIRONMENT = "CBD_LOG"
"""Address (s3://bucket/prefix) of the log, where it is not the workspace's file."""
OPENERS = "cbd.log_stores"
"""Entry points (see pyproject.toml) that open a log by its address, named by the address's scheme: cbd itself knows no bucket."""


class End(Protocol):
    """The end of a log, at which lines are added."""

    last: bytes | None
    """The last complete line, with its end."""
    torn: bytes
    """What a crash left after it."""

    def add(self, entry: dict[str, Any]) -> bool:
        """Writes the next line, also over what is torn; False if another process was faster, and then nothing was written."""

    def lines(self) -> Iterator[bytes]:
        """The complete lines, with their ends, that were there."""


class LogStore(Protocol):
    """A log and its heads; as text, what errors call it."""

    heads_told: str
    """What errors call the heads."""

    def exists(self) -> bool:
        """Whether there is a line."""

    def lines(self, until: int | None = None) -> Iterator[bytes]:
        """All lines with their ends, oldest first, or those up to there; of a file the last may be torn."""

    def still(self) -> contextlib.AbstractContextManager[tuple[int | None, int | None]]:
        """Where the last complete line ends, and what a crash left after it: both for `lines`. No process writes while the block lasts.

        None where nobody can be kept from writing.
        """

    def ending(self) -> contextlib.AbstractContextManager[End]:
        """The end of the log, for as long as the block lasts."""

    def heads(self, *, newest: bool = False) -> list[tuple[str, bytes]]:
        """The heads that are kept beside the log, or the newest alone, each with what errors call it."""

    def add_head(self, head: dict[str, Any]) -> None:
        """Keeps a head."""


def open_log(workspace: Path) -> LogStore:
    """The log at the address that `CBD_LOG` names, otherwise the file in the workspace.

    Raises:
        ConfigError: the address is of no kind that is known here, or the workspace has begun a log of its own.
    """
    log, address = FileLog(workspace / LOG), os.environ.get(ENVIRONMENT)
    if not address:
        return log
    if log.exists():
        raise ConfigError(f"{ENVIRONMENT}={address}: {log} is there, and a log stays where it began; unset it, or give another workspace")
    return _opener(address)(address)


class FileLog:
    """The log in a file; processes that add lines at once wait for each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heads = path.with_name(HEADS)
        self.heads_told = str(self._heads)

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        """A file without a line is none: who makes it makes the key next, which a reader would miss."""
        return self.path.is_file() and self.path.stat().st_size > 0

    def lines(self, until: int | None = None) -> Iterator[bytes]:
        """All: up to where the file ended when no process was writing to it. A line that is being written is not there yet."""
        if until is None:
            with self.still() as (_, until):
                pass
        with self.path.open("rb") as file:
            left = until
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                yield line

    @contextlib.contextmanager
    def still(self) -> Iterator[tuple[int, int]]:
        """See `LogStore`; it needs no right to write."""
        with still(self.path) as file:
            end, torn = complete_end(file)
            yield end, end + len(torn)

    @contextlib.contextmanager
    def ending(self) -> Iterator["_FileEnd"]:
        """The end of the file, which no other process changes meanwhile.

        Raises:
            EnvironmentFault: the disk is full or the file not writable; it is as it was.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.path) as file:
                yield _FileEnd(file)
        except OSError as error:
            raise disk_fault(self.path, error) from None

    def heads(self, *, newest: bool = False) -> list[tuple[str, bytes]]:
        """What a crash left of an unfinished line is no head."""
        if not self._heads.exists():
            return []
        found = [(f"{self._heads}: line {number}", line) for number, line in enumerate(self._heads.read_bytes().split(b"\n")[:-1], 1)]
        return found[-1:] if newest else found

    def add_head(self, head: dict[str, Any]) -> None:
        try:
            with locked(self._heads) as file:
                os.ftruncate(file, complete_end(file)[0])
                write_line(file, head)
        except OSError as error:
            raise disk_fault(self._heads, error) from None


class _FileEnd:
    def __init__(self, file: int) -> None:
        self._file = file
        self._end, self.torn = complete_end(file)
        self.last = last_line(file, self._end)

    def add(self, entry: dict[str, Any]) -> bool:
        if self.torn:
            os.ftruncate(self._file, self._end)
            self.torn = b""
        write_line(self._file, entry)
        return True

    def lines(self) -> Iterator[bytes]:
        with open(self._file, "rb", closefd=False) as file:
            file.seek(0)
            while file.tell() < self._end:
                yield file.readline()


@functools.cache
def _opener(address: str) -> Callable[[str], LogStore]:
    scheme, known = address.partition("://")[0], importlib.metadata.entry_points(group=OPENERS)
    if scheme not in known.names:
        raise ConfigError(f"{ENVIRONMENT}={address}: expected {' or '.join(sorted(known.names))}://bucket/prefix")
    found: Callable[[str], LogStore] = known[scheme].load()
    return found
