"""Worker processes that decode, with limits of memory and time: an image that crashes or hangs a decoder costs itself, not the run."""

import multiprocessing
import os
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from pebble import ProcessExpired, ProcessPool

from cbd.config import Ingest
from cbd.dataset import Row, look_at
from cbd.images import Refused, looks_of
from components.parallel import num_cores

BYTES_PER_PIXEL, SPARE_BYTES = 24, 256 * 2**20
"""What a worker may use beyond what it starts with: RGBA, its copy over white and the result, twice; and room for the decoders."""
Outcome = Row | Refused
Asked = list[tuple[bytes, str]]
"""The bytes of images and their paths."""
_POOLS: dict[tuple[int, int], ProcessPool] = {}
"""Of this process, by the largest image and the number of workers; they end with it."""


def schedule_here(asked: Asked, source: str, limits: Ingest, *, workers: int | None = None) -> "Decoding":
    """Starts the decoding of images by worker processes of this machine, by default as many as cores."""
    workers = workers or num_cores()
    return Decoding(workers, asked, source, limits, _start(workers, asked, source, limits))


@dataclass(frozen=True, slots=True)
class Decoding:
    """Images that are being decoded."""

    workers: int
    asked: Asked
    source: str
    limits: Ingest
    future: "Future[list[Outcome]]"

    def result(self) -> list[Outcome]:
        """The outcome of every image, without its bytes; if they did not come back whole, each is tried alone."""
        try:
            return self._whole(self.asked, self.future)
        except (ProcessExpired, TimeoutError, MemoryError):
            return [self._alone(image) for image in self.asked]

    def cancel(self) -> object:
        """Stops it."""
        return self.future.cancel()

    def _whole(self, asked: Asked, future: "Future[list[Outcome]]") -> list[Outcome]:
        try:
            return future.result()
        except BrokenProcessPool:  # a worker died while it had nothing to do: no image is to blame
            return _start(self.workers, asked, self.source, self.limits).result()

    def _alone(self, image: tuple[bytes, str]) -> Outcome:
        try:
            return self._whole([image], _start(self.workers, [image], self.source, self.limits))[0]
        except TimeoutError:
            return Refused("decoder-hung", f"not decoded after {self.limits.decode_seconds:g} s")
        except (ProcessExpired, MemoryError) as error:
            code = getattr(error, "exitcode", None)
            return Refused(
                "decoder-crashed", f"the decoder ended with code {code}" if code is not None else "the decoder ran out of memory"
            )


def _start(workers: int, asked: Asked, source: str, limits: Ingest) -> "Future[list[Outcome]]":
    pool = _pool(limits.max_pixels, workers)
    return pool.schedule(_rows, args=(asked, source, limits.max_pixels), timeout=limits.decode_seconds)


def _pool(max_pixels: int, workers: int) -> ProcessPool:
    """The workers, started on first use and again where one died while it had nothing to do, which breaks a pool for good."""
    found = _POOLS.get((max_pixels, workers))
    if found is None or not found.active:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
        found = ProcessPool(workers, initializer=_limit_memory, initargs=(max_pixels,), context=context)
        _POOLS[max_pixels, workers] = found
    return found


def _rows(asked: Asked, source: str, max_pixels: int) -> list[Outcome]:
    """In the worker: a row without its bytes for every image, which the caller has already."""
    outcomes: list[Outcome] = []
    places, glances = [], []
    for place, (data, path) in enumerate(asked):
        try:
            row, seen = look_at(data, label=0, original_path=path, source=source, max_pixels=max_pixels)
        except Refused as refusal:
            outcomes.append(refusal)
        else:
            outcomes.append(row._replace(data=b""))
            places.append(place)
            glances.append(seen)
    for place, found in zip(places, looks_of(glances), strict=True):
        outcomes[place] = outcomes[place]._replace(**found._asdict())  # type: ignore[union-attr]
    return outcomes


def _limit_memory(max_pixels: int) -> None:
    """In the worker: no more address space than it has at its start and the largest image needs."""
    import resource
    import warnings

    warnings.filterwarnings("ignore", module=r"PIL\.")  # they speak of metadata; faults of pixels are errors
    try:
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        most = held + BYTES_PER_PIXEL * max_pixels + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (OSError, ValueError):
        pass  # a system without this limit still has the one of time
