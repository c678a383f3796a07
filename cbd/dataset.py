"""Data sets on disk: Parquet shards in the Hugging Face image convention beside `dataset.json`."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cbd.config import description_digest
from cbd.errors import DataError
from cbd.files import replacing, sha256_file, write_json
from cbd.images import Glance, decode, glance, looks_of, pixel_digest, resize
from cbd.shards import GROUP_BYTES, GROUP_ROWS, row_groups, schema, shards

INFO = "dataset.json"
SHARDS = "shard-*.parquet"


class Row(NamedTuple):
    """One image of a data set; `data` are the original bytes, `label` the index of its class."""

    data: bytes
    label: int
    sample_id: str
    pixel_digest: str
    source: str
    original_path: str
    width: int
    height: int
    mode: str
    format: str
    batch: str = ""
    """Names the delivery it came in: 12 hex digits over the pixels of all images that were new in it."""
    phash: int = 0
    """Perceptual hash, 64 bits: images that look alike differ in few of them."""
    brightness: float = 0.0
    """Mean grey level, in [0, 255]."""
    entropy: float = 0.0
    """Of the grey levels, in bits, in [0, 8]."""


class DatasetInfo(BaseModel):
    """`dataset.json`: what the data set holds. `digest` is over everything else in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = 2
    class_names: tuple[str, ...]
    num_images: int
    class_counts: tuple[int, ...]
    image_sizes: dict[str, int]
    """`"<width>x<height>"`: number of images."""
    supplier: str
    """Whom the images came from; several suppliers in alphabetical order, joined by `, `."""
    trial: bool
    """Poisoned on purpose: no model trained on it is ever promotable."""
    shards: dict[str, str]
    """File name: SHA-256."""
    digest: str


@dataclass(frozen=True, slots=True)
class Samples:
    """A data set in memory, in its own order."""

    images: npt.NDArray[np.uint8]
    """uint8 RGB [N, 3, S, S]"""
    labels: npt.NDArray[np.int64]
    """int64 [N], the labels as given"""
    sample_ids: list[str]


def make_row(data: bytes, *, label: int, original_path: str, source: str, max_pixels: int = 50_000_000) -> Row:
    """A data set row for an encoded image, with digests, size, mode, format and looks; raises `Refused` if it cannot be decoded."""
    row, seen = look_at(data, label=label, original_path=original_path, source=source, max_pixels=max_pixels)
    return row._replace(**looks_of([seen])[0]._asdict())


def look_at(data: bytes, *, label: int, original_path: str, source: str, max_pixels: int) -> tuple[Row, Glance]:
    """A row without its looks, and what those are made of, for many at once by `looks_of`; raises `Refused` as `make_row` does."""
    decoded = decode(data, max_pixels=max_pixels)
    height, width = decoded.pixels.shape[:2]
    sample_id, pixels = hashlib.sha256(data).hexdigest(), pixel_digest(decoded.pixels)
    row = Row(data, label, sample_id, pixels, source, original_path, width, height, decoded.mode, decoded.format)
    return row, glance(decoded.pixels)


def to_batches(rows: Iterable[Row]) -> Iterator[pa.RecordBatch]:
    """The rows as record batches of bounded size, for `write_dataset`."""
    plain = schema([]).remove_metadata()
    pending: list[Row] = []
    num_bytes = 0
    for row in rows:
        pending.append(row)
        num_bytes += len(row.data)
        if len(pending) == GROUP_ROWS or num_bytes >= GROUP_BYTES:
            yield _batch(pending, plain)
            pending, num_bytes = [], 0
    if pending:
        yield _batch(pending, plain)


def write_dataset(
    folder: Path,
    batches: Iterable[pa.RecordBatch],
    *,
    class_names: Sequence[str],
    supplier: str,
    trial: bool = False,
    shard_images: int = 10_000,
) -> DatasetInfo:
    """The description of the data set that this writes to `folder`, whole or not at all; holds one row group in memory.

    Args:
        folder: replaced if it exists.
        batches: columns as in `schema`; from rows by `to_batches`, from another data set by `read_batches`.
        class_names: a label is an index into these.
        supplier: whom the images came from.
        trial: poisoned on purpose.
        shard_images: images per shard.

    Raises:
        DataError: a label is outside the classes.
    """
    with replacing(folder) as temporary:
        temporary.mkdir()
        layout = schema(class_names)
        counts: Counter[int] = Counter()
        sizes: Counter[str] = Counter()
        for number, group in enumerate(shards(row_groups(batches, shard_images), shard_images)):
            with pq.ParquetWriter(temporary / f"shard-{number:05d}.parquet", layout, compression="zstd") as writer:
                for table in group:
                    counts.update(table["label"].to_pylist())
                    sizes.update(map("{}x{}".format, table["width"].to_pylist(), table["height"].to_pylist()))
                    writer.write_table(table.replace_schema_metadata(layout.metadata))
        if strays := sorted(set(counts) - set(range(len(class_names)))):
            raise DataError(f"label {strays[0]} is outside the {len(class_names)} classes 0..{len(class_names) - 1}; give its class a name")
        values = {
            "schema_version": 2,
            "class_names": list(class_names),
            "num_images": counts.total(),
            "class_counts": [counts[label] for label in range(len(class_names))],
            "image_sizes": dict(sorted(sizes.items())),
            "supplier": supplier,
            "trial": trial,
            "shards": {path.name: sha256_file(path) for path in sorted(temporary.glob(SHARDS))},
        }
        values["digest"] = description_digest(values)
        write_json(temporary / INFO, values)
    return DatasetInfo.model_validate(values)


def read_info(folder: Path) -> DatasetInfo:
    """The data set's description, after checking its own digest (not the shards: see `verify_dataset`).

    Raises:
        DataError: no data set there, or its description is malformed or altered.
    """
    path = folder / INFO
    if not path.is_file():
        raise DataError(f"{folder}: no data set: {INFO} is missing; give a folder that `cbd run` or `cbd poison` wrote")
    try:
        values = json.loads(path.read_text())
        info = DatasetInfo.model_validate(values)
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path}: malformed: {str(error).splitlines()[0]}; take the delivery in again") from None
    if (found := description_digest(values)) != info.digest:
        raise DataError(f"{path}: altered: its content has digest {found[:12]}, it claims {info.digest[:12]}; restore the data set")
    return info


def verify_dataset(folder: Path) -> DatasetInfo:
    """The data set's description, after checking that every shard is the one it names.

    Raises:
        DataError: naming the first shard that is missing, altered or too many.
    """
    info = read_info(folder)
    found = {path.name for path in folder.iterdir()} - {INFO}
    for name in sorted(found - set(info.shards)):
        raise DataError(f"{folder / name}: not part of the data set; restore the data set")
    for name, expected in sorted(info.shards.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{path}: this shard of the data set is missing; restore the data set")
        if (sha256 := sha256_file(path)) != expected:
            raise DataError(f"{path}: altered: SHA-256 is {sha256[:12]}, {INFO} says {expected[:12]}; restore the data set")
    return info


def read_batches(folder: Path, *, columns: Sequence[str] | None = None, batch_rows: int = 256) -> Iterator[pa.RecordBatch]:
    """The data set's record batches in order, one at a time; `columns` limits what is read."""
    for name in sorted(read_info(folder).shards):
        with pq.ParquetFile(folder / name) as shard:
            for group in range(shard.num_row_groups):
                yield from shard.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns)


def read_rows(folder: Path) -> Iterator[Row]:
    """The data set's rows in order, one at a time."""
    for batch in read_batches(folder):
        for values in batch.to_pylist():
            image = values.pop("image")
            del values["num_bytes"]
            yield Row(data=image["bytes"], **values)


def read_manifest(folder: Path) -> pa.Table:
    """All columns but the images."""
    plain = schema(read_info(folder).class_names).remove_metadata()
    columns = [name for name in plain.names if name != "image"]
    batches = [batch.replace_schema_metadata(None) for batch in read_batches(folder, columns=columns, batch_rows=10_000)]
    return pa.Table.from_batches(batches, pa.schema([plain.field(name) for name in columns]))


def read_samples(folder: Path, sample_ids: Iterable[str], *, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The named samples as they are stored, one at a time, in the order of the data set; an id that is not in it is left out."""
    wanted = pa.array(sorted(set(sample_ids)), pa.string())
    for batch in read_batches(folder, columns=columns):
        yield from batch.filter(pc.is_in(batch["sample_id"], wanted)).to_pylist()


def read_images(folder: Path, sample_ids: Iterable[str]) -> dict[str, bytes]:
    """The original bytes of the named samples, by sample id; an id that is not in the data set has no entry."""
    return {row["sample_id"]: row["image"]["bytes"] for row in read_samples(folder, sample_ids, columns=["image", "sample_id"])}


def load_samples(folder: Path, *, image_size: int) -> Samples:
    """The whole data set decoded and resized for training, after verifying its shards; `image_size` is the side in pixels.

    Raises:
        DataError: the data set is missing or altered.
    """
    info = verify_dataset(folder)
    images = np.empty((info.num_images, 3, image_size, image_size), np.uint8)
    labels, sample_ids = np.empty(info.num_images, np.int64), []
    columns = ["image", "label", "sample_id", "width", "height"]
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in read_batches(folder, columns=columns))
    for index, row in enumerate(rows):
        decoded = decode(row["image"]["bytes"], max_pixels=row["width"] * row["height"])
        images[index] = resize(decoded.pixels, image_size).transpose(2, 0, 1)
        labels[index] = row["label"]
        sample_ids.append(row["sample_id"])
    return Samples(images, labels, sample_ids)


def _batch(rows: list[Row], plain: pa.Schema) -> pa.RecordBatch:
    values: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in Row._fields}
    data = values.pop("data")
    values["image"] = pa.StructArray.from_arrays(
        [pa.array(data, pa.binary()), pa.array(values["original_path"], pa.string())], fields=list(plain.field("image").type)
    )
    values["num_bytes"] = [len(item) for item in data]
    return pa.RecordBatch.from_arrays([pa.array(values[field.name], field.type) for field in plain], schema=plain)
