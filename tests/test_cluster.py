"""Decoding on a real Ray cluster of this machine: nothing comes out differently, and a lost worker costs nothing."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from delivery_files import bomb, encode, png

from cbd.config import Ingest
from cbd.errors import EnvironmentFault
from components import cluster
from components.cluster import CLUSTER
from components.decoding import decode_files
from components.ingest import IngestOptions, IngestPaths, ingest
from components.rawfiles import RawFile

pytestmark = pytest.mark.slow
LIMITS = Ingest()


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A cluster of this machine with two processors, which the product then finds."""
    import ray

    path = {"PYTHONPATH": str(Path(__file__).parent)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": path})
    yield
    ray.shutdown()
    cluster.schedule_on.cache_clear()


def raw(number: int, data: bytes) -> RawFile:
    return RawFile(f"a/{number:04d}.png", "a", data, len(data))


def test_rows_and_refusals_are_those_of_this_machine_in_the_same_order(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [raw(number, bomb() if number == 70 else b"no image" if number % 50 == 3 else png(number)) for number in range(200)]
    told = []
    for place in ("", "auto"):
        monkeypatch.setenv(CLUSTER, place)
        told.append(
            [(file.original_path, repr(file.refusal), row) for file, row in decode_files(iter(files), source="acme", limits=LIMITS)]
        )
    assert told[0] == told[1] and sum(row is None for _, _, row in told[0]) == 5


def test_the_time_limit_holds_there_too(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLUSTER, "auto")
    limits = Ingest(decode_seconds=1e-3)
    ((file, row),) = decode_files(
        iter([raw(0, encode(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8)))]), source="acme", limits=limits
    )
    assert row is None and file.refusal is not None and file.refusal.reason == "decoder-hung"


def test_what_a_killed_worker_had_is_decoded_again(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [raw(number, png(number)) for number in range(4000)]
    here = list(decode_files(iter(files), source="acme", limits=LIMITS))
    monkeypatch.setenv(CLUSTER, "auto")
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(_kill_a_worker)
        assert list(decode_files(iter(files), source="acme", limits=LIMITS)) == here
        assert killing.result()


def _kill_a_worker() -> bool:
    """Whether there was a process of Ray that was decoding, which is gone now."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [""])[0].startswith("ray::_decode"):
                process.kill()
                return True
    return False


def test_a_data_set_has_the_same_digest_wherever_it_was_decoded(ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, count in (("delivery", 40), ("trusted", 6)):
        for number in range(2 * count):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(number + (1000 if split == "trusted" else 0)))
    digests = []
    for place in ("", "auto"):
        monkeypatch.setenv(CLUSTER, place)
        outputs = IngestPaths(*(tmp_path / (place or "here") / name for name in IngestPaths._fields))
        told = ingest(str(tmp_path / "delivery"), str(tmp_path / "trusted"), outputs=outputs, params=LIMITS, options=IngestOptions("acme"))
        digests.append((told["digest"], told["trusted_digest"], told["num_images"]))
    assert digests[0] == digests[1] and digests[0][2] == 80


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "nonsense"])
def test_a_cluster_that_is_not_there_is_told(address: str) -> None:
    program = f"from components.cluster import schedule_on; schedule_on({address!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert f"CBD_RAY_ADDRESS={address}: no Ray cluster answers" in done.stderr and "unset the address to decode here" in done.stderr


def test_without_ray_the_way_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    cluster.schedule_on.cache_clear()
    with pytest.raises(EnvironmentFault, match=r"Ray is not installed; install the extra `ray`"):
        cluster.schedule_on("somewhere:6379")
