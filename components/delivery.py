"""What a supplier sent, file by file, in whichever form, from a local path or `s3://`. Nothing is decoded here."""

import contextlib
import functools
import itertools
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbd.config import Ingest
from cbd.dataset import INFO
from cbd.errors import DataError
from cbd.images import Refused
from components.archives import Archive, has_suffix, open_archive
from components.manifests import find_manifest, is_webdataset, read_manifest, read_webdataset
from components.object_store import open_store, read_ahead
from components.parquet_delivery import read_shards
from components.rawfiles import FORMS, Delivery, Entry, RawFile, printable, too_large


class _Source(NamedTuple):
    """Where files are read from, whatever it is."""

    entries: Sequence[Entry]
    read: Callable[[str], bytes]
    """The bytes of a listed file; raises Refused."""
    place: Callable[[str], Path]
    """Where a listed file can be opened."""
    walk: Callable[[Callable[[Any], RawFile], Iterable[Any]], Iterator[RawFile]] = map
    """Applies a function that reads to many items, in their order."""


@contextlib.contextmanager
def read_delivery(uri: str, *, name: str, limits: Ingest, limit: int = 0) -> Iterator[Delivery]:
    """An open delivery whose every file will be told, readable or not.

    Args:
        uri: local path or `s3://bucket/prefix`.
        name: what to call it in errors: `delivery` or `trusted set`.
        limits: a larger file is refused unread, an archive that expands too far is refused whole.
        limit: only the first so many (of class folders: by turns from each class); 0 for all.

    Raises:
        DataError: nothing there, or none of the known forms, or a damaged manifest, shard or archive.
        EnvironmentFault: the object store is out of reach.
    """
    told = f"{name} {uri!r}"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cbd-delivery-")))
        if uri.startswith("s3://"):
            store = open_store(uri, told=told)
            source = _Source([Entry(*item) for item in store.list()], store.read, lambda path: store.download(path, folder), read_ahead)
        else:
            root, entries = _list_local(uri, told)
            source = _Source(entries, lambda path: _read_local(root / path, limits.max_file_bytes), root.__truediv__)
        yield _open(source, _Opening(told, limits, limit, folder, stack))


class _Opening(NamedTuple):
    """What is the same for all parts of a delivery that is being opened."""

    told: str
    limits: Ingest
    limit: int
    folder: Path
    """For temporary files of ours."""
    stack: contextlib.ExitStack
    """Closes archives when the delivery is closed."""
    inside: bool = False
    """Within an archive; those in it are not opened."""


def _open(source: _Source, opening: _Opening) -> Delivery:
    """The delivery in `source`, in whichever form it has."""
    entries, limits, limit, told = source.entries, opening.limits, opening.limit, opening.told
    raw = functools.partial(_raw_file, read=source.read, max_file_bytes=limits.max_file_bytes)
    if _holds_shards(entries):
        shards = _open_shards(entries, source.place)
        return read_shards(shards, told=told, max_file_bytes=limits.max_file_bytes, limit=limit)
    if manifest := find_manifest(entries):
        return _first(read_manifest(manifest, entries, source.read, told=told, raw=raw, walk=source.walk), limit)
    if _holds_archives(entries) and not opening.inside:
        inner = opening._replace(inside=True, limit=limit if len(entries) == 1 else 0)
        return _first(_join([_open_inner(entry, source, inner) for entry in sorted(entries, key=_path)]), limit)
    if is_webdataset(entries):
        return _first(read_webdataset(entries, source.read, raw=raw), limit)
    chosen = _by_turns(entries, limit) if limit else sorted(entries, key=_path)
    return Delivery(source.walk(raw, chosen), len(chosen), None)


def _open_inner(entry: Entry, source: _Source, opening: _Opening) -> Delivery:
    """The delivery in one of several archives; its paths begin with the archive's name."""
    if entry.refusal or not has_suffix(entry.path):
        stray = RawFile(
            printable(entry.path), None, None, entry.num_bytes, entry.refusal or Refused("not-an-archive", "only archives here")
        )
        return Delivery(iter([stray]), 1, None)
    told = f"{opening.told}: {printable(entry.path)!r}"
    archive = opening.stack.enter_context(
        open_archive(source.place(entry.path), told=told, folder=opening.folder, max_expansion=opening.limits.max_archive_expansion)
    )
    inner = _open(_of_archive(archive, opening), opening._replace(told=told))
    prefixed = (file._replace(original_path=f"{printable(entry.path)}/{file.original_path}") for file in inner.files)
    return Delivery(prefixed, inner.total, inner.class_names)


def _of_archive(archive: Archive, opening: _Opening) -> _Source:
    """The archive as a source; a single folder around all class folders is left out of the paths."""
    tops = {entry.path.partition("/")[0] for entry in archive.entries}
    around = f"{tops.pop()}/" if len(tops) == 1 and all("/" in entry.path for entry in archive.entries) else ""
    inside = [entry._replace(path=entry.path.removeprefix(around)) for entry in archive.entries]
    if not _describes_itself(inside):
        folders = {entry.path.partition("/")[0] for entry in inside if "/" in entry.path}
        if len(folders) < 2 or not all("/" in entry.path for entry in inside):
            around, inside = "", archive.entries  # it is the one class that this archive holds
    limit = opening.limits.max_file_bytes
    return _Source(inside, lambda path: archive.read(around + path, limit), lambda path: archive.place(around + path, opening.folder))


def _describes_itself(entries: Sequence[Entry]) -> bool:
    """Whether the form needs no class folders."""
    return _holds_shards(entries) or find_manifest(entries) is not None or is_webdataset(entries)


def _path(entry: Entry) -> str:
    return entry.path


def _holds_archives(entries: Sequence[Entry]) -> bool:
    """Whether a listing is archives: no folder, and something that is called like one."""
    return not any("/" in entry.path for entry in entries) and any(has_suffix(entry.path) for entry in entries)


def _join(parts: Sequence[Delivery]) -> Delivery:
    names = {part.class_names for part in parts} - {None}
    return Delivery(
        itertools.chain.from_iterable(part.files for part in parts),
        sum(part.total for part in parts),
        names.pop() if len(names) == 1 else None,
    )


def _first(delivery: Delivery, limit: int) -> Delivery:
    """Only the first `limit` files; 0 for all."""
    return Delivery(itertools.islice(delivery.files, limit), min(limit, delivery.total), delivery.class_names) if limit else delivery


def _list_local(uri: str, told: str) -> tuple[Path, list[Entry]]:
    """The folder to read from and the files in it; one Parquet file is a listing of one."""
    root = Path(uri)
    if "://" in uri:
        raise DataError(f"{told}: this kind of address is not read; {FORMS}")
    if root.is_file():
        with root.open("rb") as file:
            if file.read(4) != b"PAR1" and not has_suffix(root.name):
                raise DataError(f"{told}: a single file must be Parquet, tar or zip; {FORMS}")
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
    for entry in sorted(entries, key=_path):
        if entry.path == INFO:
            continue
        stray = Refused("not-a-shard", "only .parquet files are read here")
        refusal = entry.refusal or (None if entry.path.endswith(".parquet") else stray)
        yield printable(entry.path), refusal or place(entry.path), entry.num_bytes


def _by_turns(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """The first `limit` files, one from each top folder in turn, in the order of their paths."""
    seen: Counter[str] = Counter()
    turns = []
    for entry in sorted(entries, key=_path):
        folder = entry.path.partition("/")[0]
        turns.append((seen[folder], entry))
        seen[folder] += 1
    return sorted((entry for _, entry in sorted(turns, key=lambda turn: turn[0])[:limit]), key=_path)


def _raw_file(entry: Entry, *, read: Callable[[str], bytes], max_file_bytes: int) -> RawFile:
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
