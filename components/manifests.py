"""Deliveries that name their labels in a file: a CSV or JSON Lines manifest beside the images, or WebDataset's `.cls` members."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cbd.errors import DataError
from cbd.images import Refused
from components.rawfiles import Delivery, Entry, RawFile, printable

NAMES = ("manifest.csv", "manifest.jsonl", "metadata.csv", "metadata.jsonl")
"""At the root of a delivery; the last two are the Hugging Face convention for image folders."""
PATHS, LABELS = ("file_name", "path", "image"), ("label", "class", "class_name")
"""What its columns may be called, the first that is there."""
_CLS = "cls"
Read = Callable[[str], bytes]
Walk = Callable[[Callable[[Any], RawFile], Iterable[Any]], Iterator[RawFile]]


def find_manifest(entries: Sequence[Entry]) -> Entry | None:
    """The manifest in a listing, if there is one."""
    return next((entry for name in NAMES for entry in entries if entry.path == name and entry.refusal is None), None)


def read_manifest(
    manifest: Entry, entries: Sequence[Entry], read: Read, *, told: str, raw: Callable[[Entry], RawFile], walk: Walk = map
) -> Delivery:
    """A file for every row, with its label; then every file that no row names.

    Args:
        manifest: one of `entries`.
        entries: the whole listing; a path that is not in it is not looked for anywhere else.
        read: gives the manifest's bytes.
        told: what to call the delivery in errors.
        raw: reads the image of an entry.
        walk: applies a function that reads to many items, in their order.

    Raises:
        DataError: the manifest is no such file, or lacks a column.
    """
    try:
        content = read(manifest.path)
    except Refused as refusal:
        raise DataError(f"{told}: {manifest.path}: {refusal.detail}; deliver the data as Parquet or in several archives") from None
    rows = _rows(content, manifest.path, f"{told}: {manifest.path}")
    listed = {entry.path: entry for entry in entries if entry is not manifest}
    named = {path for path, _ in rows if path is not None}
    strays = [entry for path, entry in sorted(listed.items()) if path not in named]

    def labelled(row: tuple[int, tuple[str | None, Any]]) -> RawFile:
        number, (path, label) = row
        return _labelled(listed.get(path or ""), path, label, number, raw)

    def stray(entry: Entry) -> RawFile:
        return raw(entry)._replace(label_name=None, refusal=entry.refusal or Refused("not-in-manifest", "no row names this file"))

    files = itertools.chain(walk(labelled, enumerate(rows, 1)), walk(stray, strays))
    return Delivery(files, len(rows) + len(strays), None)


def _labelled(entry: Entry | None, path: str | None, label: Any, number: int, raw: Callable[[Entry], RawFile]) -> RawFile:
    if path is None or entry is None:
        why = Refused("missing-file", f"row {number} names no file of the delivery; its place must be below the manifest's")
        return RawFile(printable(path or f"row {number}"), None, None, 0, why)
    found = raw(entry)
    refusal = found.refusal if found.data is None else None
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        return found._replace(label_name=None, refusal=refusal or Refused("no-class", f"row {number}: the label is no text and no integer"))
    return found._replace(label_name=printable(str(label)), refusal=refusal)


def _rows(data: bytes, name: str, told: str) -> list[tuple[str | None, Any]]:
    """Path and label of every row; None for a path that is no text."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{told}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    rows = list(_csv_rows(text, told) if name.endswith(".csv") else _json_rows(text, told))
    if not rows:
        raise DataError(f"{told}: no row in it; write one for each image")
    columns = [next((column for column in known if column in rows[0]), None) for known in (PATHS, LABELS)]
    for column, known in zip(columns, (PATHS, LABELS), strict=True):
        if column is None:
            raise DataError(f"{told}: no column {' or '.join(known)}; found {', '.join(map(printable, list(rows[0])[:8]))}")
    path, label = columns
    return [(value if isinstance(value := row.get(path), str) and value else None, row.get(label)) for row in rows]


def _csv_rows(text: str, told: str) -> Iterator[dict[Any, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise DataError(f"{told}: a column stands twice in its header; name each once")
        for row in reader:
            if None in row or None in row.values():
                raise DataError(f"{told}: line {reader.line_num} has other columns than its header; quote fields that hold a comma")
            yield row
    except csv.Error as error:
        raise DataError(f"{told}: line {reader.line_num}: {error}") from None


def _json_rows(text: str, told: str) -> Iterator[dict[Any, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{told}: line {number}: {printable(' '.join(str(error).split())[:120])}") from None
        if not isinstance(row, dict):
            raise DataError(f"{told}: line {number} is no JSON object; write one object a line")
        yield row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return row


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def is_webdataset(entries: Sequence[Entry]) -> bool:
    """Whether a listing holds `.cls` members, which are labels of the files that share their name up to the first dot."""
    return any(_split(entry.path)[1] == _CLS for entry in entries)


def read_webdataset(entries: Sequence[Entry], read: Read, *, raw: Callable[[Entry], RawFile]) -> Delivery:
    """A file for every member that is no label, in the order of the archive."""
    labels = {_split(entry.path)[0]: entry for entry in entries if _split(entry.path)[1] == _CLS}
    images = [entry for entry in entries if _split(entry.path)[1] != _CLS]

    def files() -> Iterator[RawFile]:
        for entry in images:
            found, label = raw(entry), labels.get(_split(entry.path)[0])
            refusal = found.refusal if found.data is None else None
            name = None if label is None else _class_in(label, read)
            yield found._replace(label_name=name, refusal=refusal or (None if name else Refused("no-class", "no .cls member labels it")))

    return Delivery(files(), len(images), None)


def _split(path: str) -> tuple[str, str]:
    """WebDataset's key and extension: all up to the first dot of the base name, and the rest."""
    folder, slash, base = path.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _class_in(label: Entry, read: Read) -> str | None:
    try:
        return None if label.refusal else printable(read(label.path).decode("utf-8").strip()) or None
    except (Refused, UnicodeDecodeError):
        return None
