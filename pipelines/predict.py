"""Predictions of a model on any images, as a table with which anyone can count for himself."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cbd.config import Ingest
from cbd.errors import DataError
from cbd.files import replacing
from cbd.images import Refused, decode, resize
from components.delivery import read_delivery
from components.rawfiles import RawFile

BATCH_IMAGES = 512
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("original_path", pa.string()),
        ("label", pa.int64()),
        ("label_name", pa.string()),
        ("prediction", pa.int64()),
        ("prediction_name", pa.string()),
        ("probabilities", pa.list_(pa.float32())),
    ]
)


class Item(NamedTuple):
    """One image to predict."""

    raw: RawFile
    sample_id: str
    pixels: NDArray[np.uint8]
    """uint8 [S, S, 3]"""


def predict(model: str, data: str, out: Path, *, workspace: Path) -> dict[str, Any]:
    """Counts of what was predicted; the table itself is written to `out`, one row per image in the order of the delivery.

    `label` is the given label as an index into the model's classes, null where the data names none or one the model does not know.
    A file that is no usable image has no row; it is counted, and the reasons are told on stderr.

    Args:
        model: bundle folder, or models:/NAME@ALIAS.
        data: a delivery in any format, or a flat folder of images.
        out: Parquet file.
        workspace: where the model registry is.

    Raises:
        DataError: no such model or data, a confounder, or no usable image at all.
    """
    from cbd.models import load_model
    from components.tracking import fetch_model

    network, card = load_model(fetch_model(model, workspace))
    if card.kind == "confounder":
        raise DataError(f"{model}: a confounder holds the backdoor by design and predicts nothing; give the deconfounded model")
    refused: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with replacing(out) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for batch in _batches(_items(data, card.image_size, refused)):
            probabilities = _probabilities(network, np.stack([item.pixels for item in batch]))
            rows = [_row(item, row, card.class_names) for item, row in zip(batch, probabilities, strict=True)]
            counts.update(row["prediction_name"] for row in rows)
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        if not counts:
            raise DataError(
                f"{data}: no usable image among {refused.total()} files; give class folders, a flat folder of images or Parquet"
            )
    for reason, number in refused.most_common():
        print(f"refused: {number} {reason}", file=sys.stderr)
    return {"predicted": counts.total(), "refused": refused.total(), "predictions": dict(counts.most_common()), "out": str(out)}


def _items(data: str, image_size: int, refused: "Counter[str]") -> Iterator[Item]:
    limits = Ingest()
    with read_delivery(data, name="--data", limits=limits) as delivery:
        for raw in delivery.files:
            try:
                content = raw.data if raw.data is not None else _read_flat(data, raw, limits.max_file_bytes)
                pixels = resize(decode(content, max_pixels=limits.max_pixels).pixels, image_size)
            except Refused as refusal:
                refused[refusal.reason] += 1
            else:
                yield Item(raw, hashlib.sha256(content).hexdigest(), pixels)


def _read_flat(data: str, raw: RawFile, max_file_bytes: int) -> bytes:
    """The bytes of a local image that lies in no class folder: to predict it, no class is needed."""
    refusal = raw.refusal or Refused("unreadable", "no data")
    if refusal.reason != "no-class" or raw.num_bytes > max_file_bytes or not Path(data).is_dir():
        raise refusal
    try:
        with open(os.open(Path(data) / raw.original_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            return file.read(max_file_bytes)
    except OSError as error:
        raise Refused("unreadable", error.strerror or str(error)) from None


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH_IMAGES:
            yield batch
            batch = []
    if batch:
        yield batch


def _probabilities(network: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float [N, num_classes] for images uint8 [N, S, S, 3]."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        logits, _ = network.to(device)(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device))
        probabilities: NDArray[np.float32] = logits.float().softmax(1).cpu().numpy()
    return probabilities


def _row(item: Item, probabilities: NDArray[np.float32], class_names: tuple[str, ...]) -> dict[str, Any]:
    prediction, label_name = int(probabilities.argmax()), item.raw.label_name
    return {
        "sample_id": item.sample_id,
        "original_path": item.raw.original_path,
        "label": class_names.index(label_name) if label_name in class_names else None,
        "label_name": label_name,
        "prediction": prediction,
        "prediction_name": class_names[prediction],
        "probabilities": probabilities.tolist(),
    }
