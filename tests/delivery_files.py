"""Small real deliveries for tests: images made by Pillow, and files that are damaged as files are."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cbd.config import Ingest
from components.ingest import IngestOptions, IngestPaths


def pixels(seed: int, *, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """uint8 [H, W, 3], another image for every seed."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    """The image as a file's bytes."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def png(seed: int) -> bytes:
    """A valid PNG, another for every seed."""
    return encode(pixels(seed))


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 10,000 million pixels."""
    data = bytearray(encode(np.zeros((4, 4, 3), np.uint8)))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def animation() -> bytes:
    """A GIF of two frames."""
    frames = [Image.fromarray(pixels(seed)) for seed in (1, 2)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def write_classes(root: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """Class folders with so many valid images each."""
    for offset, (name, count) in enumerate(sorted(counts.items())):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            (root / name / f"{index:03d}.png").write_bytes(png(seed + 1000 * offset + index))
    return root


def write_parquet(path: Path, rows: list[tuple[bytes | None, object]], *, names: list[str] | None) -> Path:
    """A Parquet file in the Hugging Face convention; with class names in its metadata if given."""
    image = pa.array(
        [{"bytes": data, "path": f"{i:03d}.png"} for i, (data, _) in enumerate(rows)],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    table = pa.table({"image": image, "label": [label for _, label in rows]})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def places(folder: Path) -> IngestPaths:
    """The outputs of an ingest under `folder`."""
    return IngestPaths(*(folder / name for name in IngestPaths._fields))


LIMITS = Ingest(max_file_bytes=1_000_000, max_pixels=1_000_000)
OPTIONS = IngestOptions("acme")
