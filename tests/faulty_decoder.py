"""What a worker decodes with in a test: some bytes crash it, some make it hang, some make it take all memory."""

import os
import signal
import time

from components.decoders import Outcome, _rows


def faulty_rows(asked: list[tuple[bytes, str]], source: str, max_pixels: int) -> list[Outcome]:
    """As the real one, except for those bytes."""
    for data, _ in asked:
        if data == b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if data == b"hang":
            time.sleep(600)
        if data == b"hog":
            bytearray(2**36)
    return _rows(asked, source, max_pixels)
