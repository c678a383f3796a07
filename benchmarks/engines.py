"""Which engine decodes a delivery beyond one machine: images in an object store, read, decoded and looked at, on 1 and 2 workers.

    python benchmarks/engines.py --data CIFAR10 [--images 4000] [--side 224] [--runs 3]

Needs an object store (AWS_ENDPOINT_URL), and `ray[data]` and `daft`, which the project itself does not need. Every engine does the same:
each object is read with its listed ETag, decoded in a worker process with limits, and its row comes back in the order of the listing.

* here: worker processes of this machine, read ahead by threads.
* ray: what ingest does on a cluster: read ahead here, decoded by Ray tasks.
* ray-data: a Ray Data set of the listing, read and decoded by `map_batches`.
* daft: a Daft frame of the listing on its Ray runner, read and decoded by a batch function.

Each measurement is a process of its own. Starting the cluster and decoding the first images, which starts the workers, does not count.
"""

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from defence import about

from cbd.config import Ingest
from cbd.images import Refused
from components.cluster import CLUSTER
from components.decoders import Outcome, schedule_here
from components.decoding import decode_files
from components.delivery import read_delivery
from components.object_store import Store, StoredObject, open_store, read_ahead
from components.rawfiles import RawFile

Listing = list[StoredObject]
ENGINES = ("here", "ray", "ray-data", "daft")
WORKERS = (1, 2)
WARM = 256
"""Images before the clock starts."""
BATCH = 64


def main() -> int:
    """0; the figures speak for themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="delivery whose images are enlarged")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--side", type=int, default=224, help="of the stored JPEG images in pixels")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    uri = upload(arguments.data, arguments.images, arguments.side)
    seconds: dict[tuple[str, int], list[float]] = {}
    found: dict[str, set[str]] = {}
    for _ in range(arguments.runs):
        for engine in ENGINES:
            for workers in WORKERS:
                program = f"import engines; engines.tell({uri!r}, {engine!r}, {workers})"  # as a module, so that workers can import it
                told = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=Path(__file__).parent)
                if told.returncode:
                    print(f"{engine}, {workers} workers: {told.stderr.decode()[-600:]}")
                    continue
                result = json.loads(told.stdout.splitlines()[-1])
                found.setdefault(engine, set()).add(result["digest"])
                seconds.setdefault((engine, workers), []).append(result["seconds"])
    print(f"{arguments.images} JPEG images of {arguments.side} px, median of {arguments.runs} runs\n")
    print(
        "| engine | "
        + " | ".join(f"{workers} worker(s): images/s" for workers in WORKERS)
        + " | 2 to 1 | the same rows in the same order |"
    )
    print("|---" * (len(WORKERS) + 3) + "|")
    for engine in ENGINES:
        same = "yes" if found.get(engine) == found.get("here") else "no"
        rates = [(arguments.images - WARM) / statistics.median(seconds.get((engine, workers), [float("nan")])) for workers in WORKERS]
        print(f"| {engine} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + f" | {rates[1] / rates[0]:.2f} | {same} |")
    print("\n" + "{date}, commit {commit}, {machine}".format(**about()))
    return 0


def upload(data: Path, images: int, side: int) -> str:
    """The address of as many enlarged images in a bucket of their own."""
    import boto3
    from PIL import Image

    path = data / "train.parquet" if (data / "train.parquet").is_file() else data
    client, bucket = boto3.client("s3"), f"engines-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)

    def put(numbered: tuple[int, RawFile]) -> None:
        number, file = numbered
        encoded = io.BytesIO()
        Image.open(io.BytesIO(file.data or b"")).convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(
            encoded, "JPEG", quality=90
        )
        client.put_object(Bucket=bucket, Key=f"images/{number:06d}.jpg", Body=encoded.getvalue())

    with read_delivery(str(path), name="delivery", limits=Ingest(), limit=images) as delivery:
        list(read_ahead(put, enumerate(delivery.files)))
    return f"s3://{bucket}/images"


def tell(uri: str, engine: str, workers: int) -> None:
    """Prints one measurement as JSON."""
    print(json.dumps(measure(uri, engine, workers)))


def measure(uri: str, engine: str, workers: int) -> dict[str, Any]:
    """Seconds for all but the first images, and a digest of what came back."""
    import hashlib

    store = open_store(uri, told="engines")
    store.list()
    listing = sorted(store.objects.values())
    run = RUNS[engine](uri, workers)
    list(run(listing[:WARM]))
    started = time.perf_counter()
    ids = [sample_id for sample_id, _ in run(listing[WARM:])]
    return {"seconds": time.perf_counter() - started, "digest": hashlib.sha256("".join(ids).encode()).hexdigest()[:12]}


Run = Callable[[Listing], Iterator[tuple[str, bytes]]]


def here(uri: str, workers: int) -> Run:
    """Worker processes of this machine."""
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:workers])
    return functools.partial(read_then_decode, uri)


def ray_tasks(uri: str, workers: int) -> Run:
    """Tasks on a cluster of so many processors."""
    start_ray(workers)
    os.environ[CLUSTER] = "auto"
    return functools.partial(read_then_decode, uri)


def read_then_decode(uri: str, listing: Listing) -> Iterator[tuple[str, bytes]]:
    """As ingest does."""
    store = store_of(uri)
    store.objects |= {item.key: item for item in listing}
    raw = read_ahead(lambda item: RawFile(item.key, "a", store.read(item.key), item.num_bytes), listing)
    for _, row in decode_files(raw, source="engines", limits=Ingest()):
        assert row is not None
        yield row.sample_id, row.data


def ray_data(uri: str, workers: int) -> Run:
    """A Ray Data set of the listing."""
    start_ray(workers)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    def run(listing: Listing) -> Iterator[tuple[str, bytes]]:
        rows = [item._asdict() for item in listing]
        data = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // BATCH))
        work = functools.partial(read_and_decode, uri)
        for row in data.map_batches(work, batch_size=BATCH, batch_format="numpy", num_cpus=1).iter_rows():
            yield row["sample_id"], row["data"]

    return run


def daft_frame(uri: str, workers: int) -> Run:
    """A Daft frame of the listing on its Ray runner."""
    start_ray(workers)
    import daft

    daft.set_runner_ray(noop_if_initialized=True)
    kind = daft.DataType.struct({"sample_id": daft.DataType.string(), "data": daft.DataType.binary()})

    @daft.func.batch(return_dtype=kind, batch_size=BATCH)
    def work(key: Any, num_bytes: Any, etag: Any) -> Any:
        columns = {"key": key.to_pylist(), "num_bytes": num_bytes.to_pylist(), "etag": etag.to_pylist()}
        found = read_and_decode(uri, columns)
        return [{"sample_id": one, "data": data} for one, data in zip(found["sample_id"], found["data"], strict=True)]

    def run(listing: Listing) -> Iterator[tuple[str, bytes]]:
        columns = {name: [getattr(item, name) for item in listing] for name in StoredObject._fields}
        frame = daft.from_pydict(columns).into_partitions(max(1, len(listing) // BATCH))
        for row in frame.select(work(frame["key"], frame["num_bytes"], frame["etag"]).alias("row")).iter_rows():
            yield row["row"]["sample_id"], row["row"]["data"]

    return run


RUNS: dict[str, Callable[[str, int], Run]] = {"here": here, "ray": ray_tasks, "ray-data": ray_data, "daft": daft_frame}


def read_and_decode(uri: str, columns: dict[str, Any]) -> dict[str, Any]:
    """On a worker: reads and decodes a batch of the listing."""
    store = store_of(uri)
    items = [StoredObject(str(k), int(n), str(e)) for k, n, e in zip(columns["key"], columns["num_bytes"], columns["etag"], strict=True)]
    store.objects |= {item.key: item for item in items}
    asked = list(read_ahead(lambda item: (store.read(item.key), item.key), items))
    outcomes: list[Outcome] = schedule_here(asked, "engines", Ingest(), workers=1).result()
    ids = ["" if isinstance(outcome, Refused) else outcome.sample_id for outcome in outcomes]
    return {"sample_id": ids, "data": [data for data, _ in asked]}


@functools.cache
def store_of(uri: str) -> Store:
    """The store, opened once in each process."""
    return open_store(uri, told="engines")


def start_ray(workers: int) -> None:
    """A cluster of this machine with so many processors."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    path = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"}
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": path})


if __name__ == "__main__":
    sys.exit(main())
