"""Decodes a delivery file by file, in order: by worker processes of this machine, or on the Ray cluster that `CBD_RAY_ADDRESS` names."""

import os
from collections.abc import Iterable, Iterator

from cbd.config import Ingest
from cbd.dataset import Row
from cbd.images import Refused
from components.cluster import CLUSTER, schedule_on
from components.decoders import Outcome, schedule_here
from components.parallel import Pending, in_order, num_cores
from components.rawfiles import RawFile

CHUNK_FILES, CHUNK_BYTES = 64, 4 * 2**20


def decode_files(files: Iterable[RawFile], *, source: str, limits: Ingest) -> Iterator[tuple[RawFile, Row | None]]:
    """Every file in its order with its row, whose label is 0 for now; None with a refusal in the file where there is none.

    Args:
        files: those that were refused already, or have no data, pass through.
        source: the supplier.
        limits: of pixels and seconds.

    Raises:
        EnvironmentFault: a cluster is named that cannot be used.
    """
    if address := os.environ.get(CLUSTER):
        schedule, workers = schedule_on(address)
    else:
        schedule, workers = schedule_here, num_cores()

    def start(chunk: list[RawFile]) -> Pending[list[Outcome]]:
        return schedule([(file.data or b"", file.original_path) for file in chunk if _readable(file)], source, limits)

    for chunk, pending in in_order(start, _chunks(files), ahead=2 * workers):
        outcomes = iter(pending.result())
        for file in chunk:
            outcome = next(outcomes) if _readable(file) else None
            if isinstance(outcome, Refused):
                yield file._replace(refusal=outcome), None
            else:
                yield file, outcome and outcome._replace(data=file.data or b"", source=file.released_from or source)


def _chunks(files: Iterable[RawFile]) -> Iterator[list[RawFile]]:
    chunk: list[RawFile] = []
    num_bytes = 0
    for file in files:
        chunk.append(file)
        num_bytes += len(file.data or b"")
        if len(chunk) == CHUNK_FILES or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def _readable(file: RawFile) -> bool:
    return file.refusal is None and file.data is not None and file.label_name is not None
