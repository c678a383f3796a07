"""What a supplier sent, file by file: class folders of images or Parquet, from a local path or `s3://`. Nothing is decoded here."""

import contextlib
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cbd.dataset import INFO
from cbd.errors import DataError
from cbd.images import Refused
from components.object_store import open_store
from components.parquet_delivery import read_shards
from components.rawfiles import FORMS, Delivery, RawFile, printable, too_large


class Entry(NamedTuple):
    """A file in a listing: its path below the root, with `/`, as the file system or the object store spells it."""

    path: str
    num_bytes: int
    refusal: Refused | None = None


@contextlib.contextmanager
def read_delivery(uri: str, *, name: str, max_file_bytes: int, limit: int = 0) -> Iterator[Delivery]:
    """An open delivery whose every file will be told, readable or not.

    Args:
        uri: local path or `s3://bucket/prefix`.
        name: what to call it in errors: `delivery` or `trusted set`.
        max_file_bytes: a larger file is refused unread.
        limit: only the first so many (of class folders: by turns from each class); 0 for all.

    Raises:
        DataError: nothing there, or it is neither class folders nor Parquet.
        EnvironmentFault: the object store is out of reach.
    """
    told = f"{name} {uri!r}"
    with contextlib.ExitStack() as stack:
        if uri.startswith("s3://"):
            store = open_store(uri, told=told)
            entries = [Entry(key, num_bytes) for key, num_bytes in store.list()]
            fetched = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cbd-delivery-")))
            place, read = (lambda path: store.download(path, fetched)), store.read
        else:
            root, entries = _list_local(uri, told)
            place, read = root.__truediv__, lambda path: _read_local(root / path, max_file_bytes)
        if _holds_shards(entries):
            yield read_shards(_open_shards(entries, place), told=told, max_file_bytes=max_file_bytes, limit=limit)
        else:
            chosen = _by_turns(entries, limit) if limit else sorted(entries)
            yield Delivery((_raw_file(entry, read, max_file_bytes) for entry in chosen), len(chosen), None)


def _list_local(uri: str, told: str) -> tuple[Path, list[Entry]]:
    """The folder to read from and the files in it; one Parquet file is a listing of one."""
    root = Path(uri)
    if "://" in uri:
        raise DataError(f"{told}: this kind of address is not read; {FORMS}")
    if root.is_file():
        with root.open("rb") as file:
            if file.read(4) != b"PAR1":
                raise DataError(f"{told}: a single file must be Parquet; {FORMS}")
        return root.parent, [Entry(root.name, root.stat().st_size)]
    if not root.is_dir():
        raise DataError(f"{told}: no such file or folder; {FORMS}")
    return root, list(_walk(root))


def _walk(root: Path) -> Iterator[Entry]:
    """Every file below `root`; links are told and never followed."""
    inside = os.path.realpath(root) + os.sep
    pending = [""]
    while pending:
        parent = pending.pop()
        try:
            found = list(os.scandir(root / parent))
        except OSError as error:
            yield Entry(parent or ".", 0, Refused("unreadable", f"folder: {error.strerror or error}"))
            continue
        for item in found:
            path = f"{parent}/{item.name}" if parent else item.name
            if item.is_symlink():
                leaves = not (os.path.realpath(item.path) + os.sep).startswith(inside)
                yield Entry(path, 0, Refused("link-outside" if leaves else "link", "links are not followed; deliver the file itself"))
            elif item.is_dir(follow_symlinks=False):
                pending.append(path)
            else:
                yield Entry(path, item.stat(follow_symlinks=False).st_size)


def _holds_shards(entries: Sequence[Entry]) -> bool:
    """Whether a listing is a Parquet delivery: one file, or `.parquet` shards and no folder."""
    flat = not any("/" in entry.path for entry in entries)
    return flat and any(entry.path.endswith(".parquet") for entry in entries)


def _open_shards(entries: Sequence[Entry], place: Callable[[str], Path]) -> Iterator[tuple[str, Path | Refused, int]]:
    """Each file of a Parquet delivery with where it lies, or why it is not read; our own `dataset.json` beside shards is no data."""
    for entry in sorted(entries):
        if entry.path == INFO:
            continue
        stray = Refused("not-a-shard", "only .parquet files are read here")
        refusal = entry.refusal or (None if entry.path.endswith(".parquet") else stray)
        yield printable(entry.path), refusal or place(entry.path), entry.num_bytes


def _by_turns(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """The first `limit` files, one from each top folder in turn, in the order of their paths."""
    seen: Counter[str] = Counter()
    turns = []
    for entry in sorted(entries):
        folder = entry.path.partition("/")[0]
        turns.append((seen[folder], entry))
        seen[folder] += 1
    return sorted(entry for _, entry in sorted(turns)[:limit])


def _raw_file(entry: Entry, read: Callable[[str], bytes], max_file_bytes: int) -> RawFile:
    label, slash, _ = entry.path.partition("/")
    raw = RawFile(printable(entry.path), printable(label) if slash else None, None, entry.num_bytes, entry.refusal)
    if raw.refusal:
        return raw
    try:
        if entry.num_bytes > max_file_bytes:
            raise too_large(entry.num_bytes, max_file_bytes)
        data = read(entry.path)
    except Refused as refusal:
        return raw._replace(refusal=refusal)
    return raw._replace(data=data, num_bytes=len(data), refusal=None if slash else Refused("no-class", "not in a class folder"))


def _read_local(path: Path, max_file_bytes: int) -> bytes:
    """The bytes of a regular file; a link, pipe or device is not read, so that nothing outside is told and nothing blocks."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Refused("not-a-file", "a pipe, socket or device")
            data = file.read(max_file_bytes + 1)
    except OSError as error:
        raise Refused("unreadable", error.strerror or str(error)) from None
    if len(data) > max_file_bytes:
        raise too_large(len(data), max_file_bytes)
    return data
