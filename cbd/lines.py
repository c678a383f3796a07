"""Files that lines are only ever appended to: each is on disk when it was written, and a crash leaves at most an unfinished last one."""

import os

from cbd.config import canonical_json

_BLOCK = 65536


def write_line(file: int, value: dict[str, object]) -> None:
    """Appends `value` as a line of canonical JSON and waits for the disk; a line that does not fit is taken back whole."""
    line, before = canonical_json(value) + b"\n", os.lseek(file, 0, os.SEEK_END)
    try:
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
        os.fsync(file)
    except OSError:
        os.ftruncate(file, before)
        raise


def complete_end(file: int) -> tuple[int, bytes]:
    """Where the last complete line ends, and what stands after it."""
    size = end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    return end, os.pread(file, size - end, end)


def last_line(file: int, end: int) -> bytes | None:
    """The line that ends at `end`, with its end; None where there is none."""
    if end == 0:
        return None
    start, line = end - 1, b""
    while start > 0 and b"\n" not in line:
        start = max(0, start - _BLOCK)
        line = os.pread(file, end - 1 - start, start)
    return line[line.rfind(b"\n") + 1 :] + b"\n"
