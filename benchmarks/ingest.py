"""How long taking a delivery in lasts, beside a bare single-process Pillow decode of the same bytes. Target: a ratio of at most 2.5.

    python benchmarks/ingest.py --data train.parquet [--limit N] [--runs 3] [--json]

Each run times the bare decode and the full ingest (decode, digests, duplicates, data set, quarantine) one after the other, so that both see
the same machine; the trusted set is a dozen synthetic images and costs nothing. Told: the medians and the median of the ratios.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbd.config import Ingest
from cbd.dataset import make_row, to_batches, write_dataset
from components.delivery import read_delivery
from components.ingest import IngestOptions, IngestPaths, ingest

TARGET = 2.5


def main() -> int:
    """0 if the median ratio is within the target, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="delivery: class folders or Parquet")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many images; 0 for all")
    parser.add_argument("--runs", type=int, default=3, help="paired runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    encoded, class_names = load(arguments.data, arguments.limit)
    runs = [(bare_decode_seconds(encoded), ingest_seconds(arguments.data, arguments.limit, class_names)) for _ in range(arguments.runs)]
    result = {
        "num_images": len(encoded),
        "bare_decode_seconds": round(statistics.median(bare for bare, _ in runs), 3),
        "ingest_seconds": round(statistics.median(full for _, full in runs), 3),
        "ratio": round(statistics.median(full / bare for bare, full in runs), 3),
        "ratios": [round(full / bare, 3) for bare, full in runs],
        "target": TARGET,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, Pillow {PIL.__version__}, pyarrow {pa.__version__}",
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['num_images']} images, {arguments.runs} paired runs ({result['machine']})")
        print(
            f"bare decode {result['bare_decode_seconds']} s, full ingest {result['ingest_seconds']} s, "
            f"ratio {result['ratio']} (target {TARGET})"
        )
    return 0 if result["ratio"] <= TARGET else 1


def load(data: str, limit: int) -> tuple[list[bytes], list[str]]:
    """The encoded images and the names of all classes."""
    with read_delivery(data, name="delivery", limits=Ingest(), limit=limit) as delivery:
        files = [file for file in delivery.files if file.data is not None and file.label_name is not None]
    names = delivery.class_names or sorted({str(file.label_name) for file in files})
    return [file.data for file in files if file.data is not None], list(names)


def bare_decode_seconds(encoded: list[bytes]) -> float:
    """Seconds for nothing but decoding."""
    started = time.perf_counter()
    for data in encoded:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return time.perf_counter() - started


def ingest_seconds(data: str, limit: int, class_names: list[str]) -> float:
    """Seconds for the whole of ingest."""
    with tempfile.TemporaryDirectory() as folder:
        trusted = Path(folder) / "trusted"
        rows = [make_row(noise(i), label=i % len(class_names), original_path=str(i), source="noise") for i in range(12)]
        write_dataset(trusted, to_batches(rows), class_names=class_names, supplier="noise")
        outputs = IngestPaths(*(Path(folder) / name for name in IngestPaths._fields))
        with contextlib.redirect_stdout(io.StringIO()):
            started = time.perf_counter()
            ingest(data, str(trusted), outputs=outputs, params=Ingest(), options=IngestOptions("benchmark", limit))
            return time.perf_counter() - started


def noise(seed: int) -> bytes:
    """A small PNG that is in no delivery."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
