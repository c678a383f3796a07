"""Decoding in workers: the order is kept, and a decoder that crashes, hangs or takes all memory costs one image."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import psutil
import pytest
from delivery_files import bomb, png
from faulty_decoder import faulty_rows

from cbd.config import Ingest
from cbd.dataset import make_row
from cbd.images import Refused
from components import decoders, decoding
from components.decoding import decode_files
from components.parallel import num_cores
from components.rawfiles import RawFile


def raw(number: int, data: bytes | None, refusal: Refused | None = None) -> RawFile:
    return RawFile(f"a/{number:04d}.png", "a", data, len(data or b""), refusal)


def outcomes(files: list[RawFile], **limits: float) -> list[str]:
    """For every file `row`, or the reason why there is none."""
    seen = list(decode_files(iter(files), source="acme", limits=Ingest(**limits)))  # type: ignore[arg-type]
    assert [file.original_path for file, _ in seen] == [file.original_path for file in files]
    return ["row" if row else file.refusal.reason if file.refusal else "?" for file, row in seen]


def test_rows_are_those_of_this_process_in_the_order_of_the_files() -> None:
    files = [raw(number, png(number)) for number in range(decoding.CHUNK_FILES + 5)]
    seen = list(decode_files(iter(files), source="acme", limits=Ingest()))
    expected = [make_row(png(number), label=0, original_path=f"a/{number:04d}.png", source="acme") for number in range(len(files))]
    assert [row for _, row in seen] == expected and [file for file, _ in seen] == files


def test_refused_files_and_files_without_data_pass_through() -> None:
    link = Refused("link", "links are not followed")
    files = [raw(0, png(0)), raw(1, None, link), raw(2, b"no image"), raw(3, bomb()), raw(4, png(1), link)]
    assert outcomes(files) == ["row", "link", "not-an-image", "decompression-bomb", "link"]


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [(b"crash", "decoder-crashed", "code -11"), (b"hang", "decoder-hung", "after 1 s"), (b"hog", "decoder-crashed", "memory")],
)
def test_an_image_that_brings_its_decoder_down_costs_only_itself(
    data: bytes, reason: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoders, "_rows", faulty_rows)
    files = [raw(number, data if number == 7 else png(number)) for number in range(80)]
    started = time.monotonic()
    seen = list(decode_files(iter(files), source="acme", limits=Ingest(decode_seconds=1)))
    assert [file.original_path for file, row in seen if row is None] == ["a/0007.png"]
    refusal = seen[7][0].refusal
    assert refusal is not None and refusal.reason == reason and detail in refusal.detail
    assert time.monotonic() - started < 30


def test_workers_that_are_killed_while_they_wait_are_replaced() -> None:
    files = [raw(number, png(number)) for number in range(3)]

    def decoded() -> list[bool]:
        return [row is not None for _, row in decode_files(iter(files), source="acme", limits=Ingest())]

    assert decoded() == [True] * 3
    pool = decoders._POOLS[Ingest().max_pixels, num_cores()]
    for worker in psutil.Process().children(recursive=True):
        if any("spawn_main" in part for part in worker.cmdline()):
            worker.kill()
    until = time.monotonic() + 20
    while pool.active and time.monotonic() < until:
        time.sleep(0.05)
    assert not pool.active and decoded() == [True] * 3


def test_what_was_asked_of_a_pool_that_broke_is_asked_again_and_no_image_is_blamed() -> None:
    broken: Future[list[decoders.Outcome]] = Future()
    broken.set_exception(BrokenProcessPool())
    (outcome,) = decoders.Decoding(num_cores(), [(png(0), "a/0.png")], "acme", Ingest(), broken).result()
    assert not isinstance(outcome, Refused)


def test_only_a_few_chunks_are_read_ahead() -> None:
    taken = 0

    def files() -> Iterator[RawFile]:
        nonlocal taken
        for number in range(100 * decoding.CHUNK_FILES):
            taken += 1
            yield raw(number, b"x")

    walking = decode_files(files(), source="acme", limits=Ingest())
    next(walking)
    assert taken <= (2 * num_cores() + 1) * decoding.CHUNK_FILES
    walking.close()  # type: ignore[attr-defined]
