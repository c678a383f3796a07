"""How long taking a delivery in lasts and how much memory it needs, beside a bare single-process Pillow decode of the same bytes.

    python benchmarks/ingest.py --data CIFAR10 [--limit N] [--runs 3] [--million] [--json]

CIFAR10 is a Parquet file, a folder with a `train.parquet`, or any other delivery. Each run times the bare decode, the full ingest (decode,
digests, looks, duplicates, data set, quarantine) and, where AWS_ENDPOINT_URL names an object store, the same ingest from there, one after
the other, so that all see the same machine. The trusted set is a dozen synthetic images. Told: medians, and medians of the ratios. Memory
is the largest sum over the process and its workers, each with its shared pages. `--million` also takes in a quarter, a half and a whole
million images, made of the first 10,000 by noise, and looks for look-alikes among a million hashes.

Targets: at most 1.5 times the bare decode, at least 70 % of the local speed from the object store; of a million images at most 1.5 GB, a
time that grows as their number within 10 %, and look-alikes within 5 minutes.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import pyarrow as pa
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from defence import about

from cbd.config import Ingest
from cbd.dataset import make_row, to_batches, write_dataset
from components.delivery import read_delivery
from components.ingest import IngestOptions, IngestPaths, ingest
from components.lookalikes import lookalikes

PARTS = (250_000, 500_000, 1_000_000)
BASE, MILLION = 10_000, 1_000_000


def main() -> int:
    """0; the figures speak for themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="delivery")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many images; 0 for all")
    parser.add_argument("--runs", type=int, default=3, help="paired runs")
    parser.add_argument("--million", action="store_true", help="also a million images")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    path = arguments.data / "train.parquet" if (arguments.data / "train.parquet").is_file() else arguments.data
    encoded, class_names = load(str(path), arguments.limit)
    with uploaded(path) as remote:
        runs = [measure(encoded, str(path), remote, arguments.limit, class_names) for _ in range(arguments.runs)]
    result = {name: median([run[name] for run in runs]) for name in runs[0]} | {"num_images": len(encoded)}
    if arguments.million:
        result |= million(encoded[:BASE])
    result |= about() | {"pillow": PIL.__version__, "pyarrow": pa.__version__, "python": platform.python_version()}
    for name, value in result.items():
        print(f"{name}: {value}")
    if arguments.json:
        print(json.dumps(result))
    return 0


def measure(encoded: list[bytes], local: str, remote: str | None, limit: int, class_names: list[str]) -> dict[str, float | None]:
    """One run of each, and how they compare."""
    bare = bare_decode_seconds(encoded)
    seconds, peak = take_in(local, limit, class_names)
    from_store = take_in(remote, limit, class_names)[0] if remote else None
    return {
        "bare_decode_seconds": bare,
        "ingest_seconds": seconds,
        "ratio_to_pillow": seconds / bare,
        "s3_ingest_seconds": from_store,
        "ratio_s3_to_local": seconds / from_store if from_store else None,
        "peak_rss_bytes": peak,
    }


def median(values: list[float | None]) -> float | None:
    """None where nothing was measured."""
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 3) if known else None


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


def take_in(data: str, limit: int, class_names: list[str]) -> tuple[float, int]:
    """Seconds and bytes for the whole of ingest."""
    with tempfile.TemporaryDirectory() as folder:
        trusted = Path(folder) / "trusted"
        rows = [make_row(noise(i), label=i % len(class_names), original_path=str(i), source="noise") for i in range(12)]
        write_dataset(trusted, to_batches(rows), class_names=class_names, supplier="noise")
        outputs = IngestPaths(*(Path(folder) / name for name in IngestPaths._fields))
        with contextlib.redirect_stdout(io.StringIO()), watched() as peak:
            started = time.perf_counter()
            ingest(data, str(trusted), outputs=outputs, params=Ingest(), options=IngestOptions("benchmark", limit))
            return time.perf_counter() - started, peak()


@contextlib.contextmanager
def watched() -> Iterator[Any]:
    """Inside, the memory of this process and its children is looked at ten times a second; yields a function that gives the largest sum."""
    this, over, seen = psutil.Process(), threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.1):
            held = 0
            for process in (this, *this.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    held += process.memory_info().rss
            seen.append(held)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield lambda: max(seen)
    finally:
        over.set()
        watcher.join()


@contextlib.contextmanager
def uploaded(path: Path) -> Iterator[str | None]:
    """The file's address in an object store, in a bucket of its own; None where no store is named, or the delivery is a folder."""
    if not os.environ.get("AWS_ENDPOINT_URL") or not path.is_file():
        yield None
        return
    import boto3

    store, bucket = boto3.client("s3"), f"benchmark-{secrets.token_hex(4)}"
    store.create_bucket(Bucket=bucket)
    store.upload_file(str(path), bucket, f"delivery/{path.name}")
    try:
        yield f"s3://{bucket}/delivery"
    finally:
        store.delete_object(Bucket=bucket, Key=f"delivery/{path.name}")
        store.delete_bucket(Bucket=bucket)


def million(encoded: list[bytes]) -> dict[str, Any]:
    """Seconds and memory of more and more images, and seconds for the look-alikes of a million hashes."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            write_many(Path(folder) / "many", encoded, part)
            seconds, peak = take_in(str(Path(folder) / "many"), 0, ["a", "b"])
            result |= {f"seconds_{part}": round(seconds, 1), f"peak_rss_bytes_{part}": peak}
            print(f"{part} images: {seconds:.0f} s, {peak / 1e9:.2f} GB", flush=True)
    first, last = (result[f"seconds_{part}"] / part for part in (PARTS[0], PARTS[-1]))
    hashes = np.random.default_rng(0).integers(2**63, size=MILLION, dtype=np.uint64)
    hashes[: MILLION // 10] = hashes[-(MILLION // 10) :] ^ np.uint64(0b11)
    started = time.perf_counter()
    labels = np.arange(MILLION) % 10
    found = lookalikes(hashes, labels, hashes, labels)
    result["lookalikes_seconds"] = round(time.perf_counter() - started, 1)
    num = None if found is None else int((found[1] > 1).sum())
    return result | {"lookalikes_found": num, "time_per_image_last_to_first": round(last / first, 3)}


def write_many(folder: Path, encoded: list[bytes], num: int) -> None:
    """Parquet shards of so many images, the known ones with other noise each; shards that are there already are kept."""
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    images = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
    for shard in range(num // len(images)):
        path, generator = folder / f"{shard:05d}.parquet", np.random.default_rng(shard)
        if not path.is_file():
            noisy = images ^ generator.integers(0, 4, images.shape, dtype=np.uint8)
            rows = [{"image": {"bytes": png(image), "path": f"{shard}-{i}.png"}, "label": i % 2} for i, image in enumerate(noisy)]
            pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": NAMES}), path)


NAMES = json.dumps({"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}})


def png(image: np.ndarray) -> bytes:
    """The image as a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def noise(seed: int) -> bytes:
    """A small PNG that is in no delivery."""
    return png(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


if __name__ == "__main__":
    sys.exit(main())
