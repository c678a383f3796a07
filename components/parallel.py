"""How many things may run at once, and how their results come back in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Told = TypeVar("Told", covariant=True)


class Pending(Protocol[Told]):
    """What is under way, such as a `Future`."""

    def result(self) -> Told: ...

    def cancel(self) -> object: ...


def num_cores() -> int:
    """The cores that this process may use, where the system tells, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(submit: Callable[[Item], Pending[Result]], items: Iterable[Item], *, ahead: int) -> Iterator[tuple[Item, Pending[Result]]]:
    """Every item with what is pending for it, in the order of the items; at most `ahead` are under way, the rest are not taken yet."""
    waiting: deque[tuple[Item, Pending[Result]]] = deque()
    try:
        for item in items:
            waiting.append((item, submit(item)))
            if len(waiting) >= ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, pending in waiting:
            pending.cancel()
