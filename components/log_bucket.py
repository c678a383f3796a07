"""The log in a bucket: `lines/<number>.json`, an object for every line, `heads/`, one for every head, and the empty `probe`.

A line is put only where there is none of its number (`If-None-Match: *`), and is there whole or not at all. So writers on many machines
need no lock: the slower of two looks at the new end and tries again.
"""

import contextlib
import functools
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError
from cbd.heads import head_name
from cbd.keys import ENVIRONMENT as SIGNING_KEY
from cbd.log_store import ENVIRONMENT
from components.object_store import Store, StoredObject, open_store, read_ahead


@functools.cache
def open_bucket(address: str) -> "BucketLog":
    """The log at `s3://bucket/prefix`; nothing is fetched yet."""
    return BucketLog(address)


class BucketLog:
    """See `cbd.log_store.LogStore`. What was read is kept in a private file, and read again only where the bucket lists something else."""

    def __init__(self, address: str) -> None:
        self._told = f"{ENVIRONMENT} {address}"
        place = address.rstrip("/")
        self._lines, self._heads = (open_store(f"{place}/{name}", told=f"{self._told} {name}") for name in ("lines", "heads"))
        self.heads_told = self._heads.told
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
        self._copied: list[StoredObject] = []
        self._copying = threading.Lock()
        self._root, self._is_checked = open_store(place, told=self._told), False

    def __str__(self) -> str:
        return self._told

    def exists(self) -> bool:
        return any(True for _ in self._lines.find())

    def lines(self, until: int | None = None) -> Iterator[bytes]:
        yield from self.copied([listed for _, listed in self._lines.find()][:until])

    @contextlib.contextmanager
    def still(self) -> Iterator[tuple[None, None]]:
        """Others may go on meanwhile; no line is ever torn."""
        yield None, None

    @contextlib.contextmanager
    def ending(self) -> Iterator["_BucketEnd"]:
        """The end as it is now: others may go on meanwhile.

        Raises:
            ConfigError: no signing key is named, and each workspace would make a key of its own.
            EnvironmentFault: the bucket is out of reach, or its server ignores conditions.
        """
        if not os.environ.get(SIGNING_KEY):
            raise ConfigError(f"{SIGNING_KEY} is not set, but a log that many write needs one key for all; see docs/audit.md")
        if not self._is_checked:
            self._root.check_conditions("probe")
            self._is_checked = True
        yield _BucketEnd(self, self._lines)

    def heads(self, *, newest: bool = False) -> list[tuple[str, bytes]]:
        """The newest by a plain listing; all of them in every version, also those that a delete marker hides."""
        if newest:
            names = [path for path, _ in self._heads.find()]
            return [(f"{self.heads_told}: {name}", self._heads.read(name)) for name in names[-1:]]
        found = self._heads.read_versions()
        return [(f"{self.heads_told}: {name}", data) for name in sorted(found) for data in found[name]]

    def add_head(self, head: dict[str, Any]) -> None:
        self._heads.put_once(head_name(head), canonical_json(head))

    def copied(self, listed: Sequence[StoredObject]) -> Iterator[bytes]:
        """The lines in these objects, which are those of the log from the first on.

        Raises:
            DataError: one of them is missing, or holds no single line.
        """
        with self._copying:
            self._follow(listed)
        start = 0
        for each in listed:
            yield os.pread(self._copy.fileno(), each.num_bytes, start)
            start += each.num_bytes

    def _follow(self, listed: Sequence[StoredObject]) -> None:
        """Makes the copy begin with what is listed."""
        same = 0
        while same < min(len(listed), len(self._copied)) and listed[same] == self._copied[same]:
            same += 1
        if same == len(listed):
            return
        self._copied = self._copied[:same]
        self._copy.truncate(sum(each.num_bytes for each in self._copied))
        self._copy.seek(0, os.SEEK_END)
        paths = [each.key.rpartition("/")[2] for each in listed]
        for number, data in enumerate(read_ahead(self._lines.read, paths[same:]), same + 1):
            if paths[number - 1] != line_name(number):
                raise DataError(f"{self}: line {number} is missing: it was removed; restore the log from a copy")
            if data.find(b"\n") != len(data) - 1:
                raise DataError(f"{self}: line {number} is no log entry: it was edited; restore the log from a copy")
            self._copy.write(data)
            self._copied.append(listed[number - 1])
        self._copy.flush()


class _BucketEnd:
    torn = b""

    def __init__(self, log: BucketLog, store: Store) -> None:
        self._log, self._store = log, store
        self._listed = [listed for _, listed in store.find()]
        self.last = store.read(self._listed[-1].key.rpartition("/")[2]) if self._listed else None

    def add(self, entry: dict[str, Any]) -> bool:
        return self._store.put_once(line_name(entry["seq"]), canonical_json(entry) + b"\n")

    def lines(self) -> Iterator[bytes]:
        yield from self._log.copied(self._listed)


def line_name(number: int) -> str:
    """The object of a line, counted from 1 on; names sort as numbers do."""
    return f"{number:012d}.json"
