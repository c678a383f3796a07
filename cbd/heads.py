"""Signed heads of the log: size and root of the Merkle tree (RFC 6962) whose leaves are its lines.

A head that is kept where the log's owner cannot change it shows a log that was cut, forked or rewritten since.
"""

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cbd.audit import Entry, Line, last_entry, now, walk_lines
from cbd.config import canonical_json, parse_canonical
from cbd.errors import DataError
from cbd.keys import PrivateKey, PublicKey, key_id, load_public_key, sign, verify
from cbd.log_store import HEADS as HEADS
from cbd.log_store import End, LogStore, open_log
from cbd.merkle import Growing, leaf_hash

_FIELDS = {"schema_version": int, "size": int, "root": str, "time": str, "key_id": str, "signature": str}

Head = dict[str, Any]
"""`size` in lines, `root` (hex), `time` (UTC), `key_id`, and `signature` over the canonical JSON of all others."""


def read_log(workspace: Path) -> list[Entry]:
    """All entries of the workspace's log, oldest first, verified against its keys and its last head; no log, no entries.

    Raises:
        DataError: names the first bad line, or the head that the log contradicts.
    """
    return [line.entry for line in walk(workspace)]


def walk(workspace: Path) -> Iterator[Line]:
    """As `read_log`, line by line; those before the first bad one were yielded when this raises.

    What a crash left of an unfinished line is passed over: the next entry cuts it off and records it.
    """
    log = open_log(workspace)
    heads = read_heads(log, newest=True)
    if not log.exists():
        if heads:
            raise DataError(f"{log}: missing, and {log.heads_told} says that it had {heads[-1]['size']} lines; restore it from a copy")
        return
    matching = Matching((log.heads_told, head) for head in heads)
    with log.still() as (end, _):
        key = load_public_key(workspace)
    for line in walk_lines(log, key=key, until=end):
        matching.add(line)
        yield line
    matching.finish()


class Matching:
    """Compares a log that is walked through with heads: each must be over the log's first lines, signed by the key of its time."""

    def __init__(self, heads: Iterable[tuple[str, Head]]) -> None:
        """`heads` come with the place where each was found."""
        self._heads = sorted(heads, key=lambda found: int(found[1]["size"]))
        self._tree = Growing()
        self._num_matched = 0

    def add(self, line: Line) -> None:
        """Takes the next line; raises DataError if a head of the size up to here says something else."""
        self._tree.add(line.leaf)
        while self._num_matched < len(self._heads) and self._heads[self._num_matched][1]["size"] <= self._tree.size:
            self._check(*self._heads[self._num_matched], line.following)
            self._num_matched += 1

    def finish(self) -> int:
        """How many heads agree with the log; raises DataError if one is over more lines than there are."""
        if self._num_matched < len(self._heads):
            place, head = self._heads[-1]
            raise DataError(
                f"{place}: the head of {head['time']} is over {head['size']} lines, the log has {self._tree.size}: it was cut off; "
                "restore the log from a copy"
            )
        return self._num_matched

    def _check(self, place: str, head: Head, key: PublicKey | None) -> None:
        about = f"{place}: the head of {head['time']} over {head['size']} lines"
        if key is not None and not is_by(head, key):
            raise DataError(f"{about} was not signed by the key of that time, {key_id(key)[:12]}; restore the heads from a copy")
        if head["size"] != self._tree.size or head["root"] != self._tree.root().hex():
            raise DataError(f"{about} is of another history than the log: one of the two was forked or rewritten; restore both from a copy")


def sign_head(workspace: Path, key: PrivateKey | None = None) -> Head:
    """The signed head of the whole log, also added to the workspace's heads, after checking that the log extends the head before.

    It is signed by `key`, to which the log may just have been handed over, by default by the workspace's.

    Raises:
        DataError: there is no log, or it was cut, forked or rewritten since the head before.
        EnvironmentFault: the disk is full or the heads not writable.
    """
    log = open_log(workspace)
    if not log.exists():
        raise DataError(f"{log}: no log to sign a head of; give the workspace of the runs")
    before = read_heads(log, newest=True)  # first, so that it is over no more lines than are there afterwards
    with log.ending() as end:
        _, key = last_entry(workspace, log, end.last, key)
        tree = _grow(log, end, before)
        head = {"schema_version": 1, "size": tree.size, "root": tree.root().hex(), "time": now(), "key_id": key_id(key.public_key())}
        head["signature"] = sign(_signed(head), key)
        log.add_head(head)
        return head


def read_heads(log: LogStore, *, newest: bool = False) -> list[Head]:
    """The heads that are kept beside a log, oldest first, or the newest alone; none where there are none.

    Raises:
        DataError: one is no head.
    """
    return [parse_head(text, told=told) for told, text in log.heads(newest=newest)]


def parse_head(text: bytes, *, told: str) -> Head:
    """The head in its canonical JSON; raises DataError, which names it as `told`."""
    try:
        head = parse_canonical(text)
    except ValueError:
        head = {}
    typed = set(head) == set(_FIELDS) and all(type(head[name]) is kind for name, kind in _FIELDS.items())
    if not typed or head["schema_version"] != 1 or head["size"] < 1:
        raise DataError(f"{told}: is no head: it was edited; restore it from a copy")
    return head


def head_name(head: Head) -> str:
    """What an object that holds the head is called; names sort by size."""
    return f"{head['size']:012d}-{sha256(canonical_json(head)).hexdigest()[:12]}.json"


def is_by(head: Head, key: PublicKey) -> bool:
    """Whether this key signed the head."""
    return bool(head["key_id"] == key_id(key)) and verify(_signed(head), str(head["signature"]), key)


def _grow(log: LogStore, end: End, before: Sequence[Head]) -> Growing:
    """The tree over the lines up to the end; raises DataError unless it extends the head before, of which there is one or none."""
    tree = Growing()
    for line in end.lines():
        tree.add(leaf_hash(line[:-1]))
        for head in before:
            if head["size"] == tree.size and head["root"] != tree.root().hex():
                raise DataError(f"{log}: is of another history than its head of {head['time']}; restore it from a copy")
    if before and before[0]["size"] > tree.size:
        raise DataError(f"{log}: has {tree.size} lines, its last head is over {before[0]['size']}: it was cut off; restore it from a copy")
    return tree


def _signed(head: Head) -> bytes:
    return canonical_json({name: value for name, value in head.items() if name != "signature"})
