"""What a person sees while the pipeline runs: bars on a terminal, else one line per finished step. Always on stderr."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from components import STEPS

PROGRESS = re.compile(r"^\s*\[(\w+)\] (\d+)/(\d+)(?: (.*))?$")
STARTED = re.compile(r"Executing task \S*'([a-z-]+?)(?:-step)?(?:-\d+)?'")
FINISHED = re.compile(r" - Task \S*'[a-z0-9-]+'\S* finished with status ")
Show = Callable[[str], None]


@contextlib.contextmanager
def display(records: Path) -> Iterator[Show]:
    """A function that takes each line of the pipeline's output and shows what is worth showing."""
    if sys.stderr.isatty():
        with _bars(records) as show:
            yield show
    else:
        yield _lines(records)


@contextlib.contextmanager
def by_hand() -> Iterator[None]:
    """Inside, what a step that runs in this process prints is drawn as bars on a terminal; on stdout it would be in the way of results."""
    with display(Path(os.devnull)) as show, contextlib.redirect_stdout(_Followed(show)):
        yield


class _Followed(io.TextIOBase):
    """A stdout whose lines are shown."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._show(line)
        return len(text)


def printable(text: str) -> str:
    """`text` with control and invisible characters written as escapes, so that no name can move a cursor or hide a line."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _lines(records: Path) -> Show:
    told: set[str] = set()

    def show(line: str) -> None:
        if FINISHED.search(line):
            for name, record in _finished(records):
                if name not in told:
                    told.add(name)
                    print(f"{name}: {record['status']}, {record['seconds']:.1f} s", file=sys.stderr, flush=True)

    return show


@contextlib.contextmanager
def _bars(records: Path) -> Iterator[Show]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars: dict[str, Any] = {}
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=False, redirect_stderr=False) as progress:

        def show(line: str) -> None:
            if (started := STARTED.search(line)) and (name := started[1].replace("-", "_")) in STEPS:
                bars[name] = progress.add_task(name, total=None, note="")
            elif (moved := PROGRESS.match(line)) and moved[1] in STEPS:
                if moved[1] not in bars:
                    bars[moved[1]] = progress.add_task(moved[1], total=None, note="")
                note = escape(printable(moved[4] or ""))
                progress.update(bars[moved[1]], completed=int(moved[2]), total=int(moved[3]), note=note)
            elif FINISHED.search(line):
                for name, record in _finished(records):
                    if name in bars:
                        bar = bars.pop(name)
                        total = progress.tasks[bar].total or 1
                        progress.update(bar, completed=total, total=total, note=f"{record['status']}, {record['seconds']:.1f} s")
                        progress.stop_task(bar)

        yield show


def _finished(records: Path) -> list[tuple[str, dict[str, Any]]]:
    """Steps whose record says that they ended, in pipeline order."""
    ended = []
    for name in STEPS:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads((records / f"{name}.json").read_text())
            if record["status"] != "running":
                ended.append((name, record))
    return ended
