"""Parquet deliveries in the Hugging Face image convention, row by row."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cbd.errors import DataError
from cbd.images import Refused
from components.rawfiles import Delivery, RawFile, printable, too_large

_BATCH_ROWS = 64


class Columns(NamedTuple):
    """Where a shard keeps its images and labels, and the names of the classes if it tells them."""

    image: str
    label: str
    class_names: tuple[str, ...] | None


def read_shards(shards: Iterable[tuple[str, Path | Refused, int]], *, told: str, max_file_bytes: int, limit: int) -> Delivery:
    """The open delivery in `shards` (name, where it lies or why it is refused, bytes); `told` is what to call it in errors.

    Raises:
        DataError: a shard is not Parquet, or not in the convention, or the shards name different classes.
    """
    strays: list[RawFile] = []
    parts: list[Iterator[RawFile]] = []
    total, class_names = 0, set()
    for name, place, num_bytes in shards:
        if isinstance(place, Refused):
            strays.append(RawFile(name, None, None, num_bytes, place))
            continue
        with _faults(f"{told}: {name!r}"), pq.ParquetFile(place) as file:
            total += file.metadata.num_rows
            columns = _find_columns(file.schema_arrow, f"{told}: {name!r}")
        class_names.add(columns.class_names)
        parts.append(_rows(place, columns, name=name, told=told, max_file_bytes=max_file_bytes))
    if len(class_names) > 1:
        raise DataError(f"{told}: its shards name different classes; deliver shards with the same class names in the same order")
    files = itertools.islice(itertools.chain(strays, *parts), limit or None)
    total += len(strays)
    return Delivery(files, min(total, limit or total), next(iter(class_names), None))


def _rows(path: Path, columns: Columns, *, name: str, told: str, max_file_bytes: int) -> Iterator[RawFile]:
    with _faults(f"{told}: {name!r}"), pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[columns.image, columns.label]):
            images, labels = batch[columns.image].to_pylist(), batch[columns.label].to_pylist()
            for image, label in zip(images, labels, strict=True):
                image = image or {}
                yield _raw_file(image.get("bytes"), image.get("path") or f"{name}#{number}", label, columns.class_names, max_file_bytes)
                number += 1


def _raw_file(data: bytes | None, path: str, label: Any, class_names: tuple[str, ...] | None, max_file_bytes: int) -> RawFile:
    label_name, refusal = str(label), None
    if label is None:
        label_name, refusal = None, Refused("no-class", "the row has no label")
    elif class_names is not None and isinstance(label, int):
        known = 0 <= label < len(class_names)
        label_name = class_names[label] if known else None
        refusal = None if known else Refused("no-class", f"label {label} has no class name")
    if data is None:
        refusal = refusal or Refused("no-bytes", "the row holds no image bytes; paths are not followed")
    elif len(data) > max_file_bytes:
        data, refusal = None, too_large(len(data), max_file_bytes)
    return RawFile(printable(path), label_name, data, len(data or b""), refusal)


def _find_columns(schema: pa.Schema, told: str) -> Columns:
    features = _features(schema)
    image = _pick("image", schema, [name for name, value in features.items() if value.get("_type") == "Image"])
    label = _pick("label", schema, [name for name, value in features.items() if value.get("_type") == "ClassLabel"])
    convention = "expected the Hugging Face image convention: image: struct<bytes, path>, label: int64"
    if image is None or label is None:
        raise DataError(f"{told}: no column {'image' if image is None else 'label'!r}; {convention}; found {', '.join(schema.names[:8])}")
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or not {"bytes", "path"} <= {field.name for field in kind} or not _is_bytes(kind.field("bytes").type):
        raise DataError(f"{told}: column {image!r} is {str(kind)[:60]}; {convention}")
    kind = schema.field(label).type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{told}: column {label!r} is {str(kind)[:60]}; {convention}")
    names = features.get(label, {}).get("names")
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        return Columns(image, label, None)
    return Columns(image, label, tuple(printable(str(name)) for name in names))


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The feature types in the schema's metadata; none if there are none or they are malformed."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _pick(name: str, schema: pa.Schema, typed: list[str]) -> str | None:
    """The column called `name`, else the only one that the metadata types so."""
    if name in schema.names:
        return name
    return typed[0] if len(typed) == 1 and typed[0] in schema.names else None


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


@contextlib.contextmanager
def _faults(told: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise DataError(f"{told}: not readable as Parquet: {text}; deliver the file again") from None
