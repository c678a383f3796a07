"""How rows are laid out in Parquet shards: the Hugging Face image convention, in row groups of bounded size."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

_HF = {"double": "float64"}
"""How Hugging Face calls the types that Arrow calls otherwise."""
GROUP_ROWS = 1000
GROUP_BYTES = 32 * 2**20
"""A row group ends at this many rows or bytes of images, so that reading one needs little memory."""


def schema(class_names: Sequence[str]) -> pa.Schema:
    """The Arrow schema of every shard, with the class names as Hugging Face metadata."""
    text, number = pa.string(), pa.int64()
    kinds = {"sample_id": text, "pixel_digest": text, "source": text, "batch": text, "original_path": text}
    kinds |= {"width": number, "height": number, "mode": text, "format": text, "num_bytes": number}
    kinds |= {"phash": pa.uint64(), "brightness": pa.float64(), "entropy": pa.float64()}
    features: dict[str, Any] = {"image": {"_type": "Image"}, "label": {"names": list(class_names), "_type": "ClassLabel"}}
    features |= {name: {"dtype": _HF.get(str(kind), str(kind)), "_type": "Value"} for name, kind in kinds.items()}
    image = pa.struct([("bytes", pa.binary()), ("path", text)])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([("image", image), ("label", number), *kinds.items()], metadata=metadata)


def row_groups(batches: Iterable[pa.RecordBatch], shard_images: int) -> Iterator[pa.Table]:
    """The same rows in tables whose limits depend on the rows alone, not on how they arrived; none crosses a shard's end."""
    pending: list[pa.RecordBatch] = []
    rows = num_bytes = total = 0
    for batch in batches:
        start = 0
        batch = batch.replace_schema_metadata(None)
        for index, length in enumerate(batch["num_bytes"].to_pylist()):
            rows, num_bytes, total = rows + 1, num_bytes + length, total + 1
            if rows == GROUP_ROWS or num_bytes >= GROUP_BYTES or total % shard_images == 0:
                yield pa.Table.from_batches([*pending, batch.slice(start, index + 1 - start)]).combine_chunks()
                pending, rows, num_bytes, start = [], 0, 0, index + 1
        if start < len(batch):
            pending.append(batch.slice(start))
    if pending:
        yield pa.Table.from_batches(pending).combine_chunks()


def shards(tables: Iterable[pa.Table], shard_images: int) -> Iterator[Iterator[pa.Table]]:
    """The tables grouped by shard; each group must be used up before the next one is taken."""
    total = 0

    def numbered() -> Iterator[tuple[int, pa.Table]]:
        nonlocal total
        for table in tables:
            yield total // shard_images, table
            total += table.num_rows

    for _, group in itertools.groupby(numbered(), key=lambda pair: pair[0]):
        yield (table for _, table in group)
