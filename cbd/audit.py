"""The audit trail: an append-only log in which each signed line seals the one before.

The chain makes appending cheap, for only the last line is read, and puts every line under a signature of its own. Heads of the Merkle tree
over the same lines (`cbd.heads`) can be kept elsewhere, and prove a line to somebody who does not get the whole log.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import locked
from cbd.keys import (
    KEYS,
    LOCK,
    PRIVATE,
    PUBLIC,
    PrivateKey,
    PublicKey,
    ensure_key,
    from_pem,
    key_id,
    read_private_key,
    read_public_key,
    sign,
    to_pem,
    verify,
    write_private_key,
    write_public_key,
)
from cbd.log_store import LOG as LOG
from cbd.log_store import End, FileLog, LogStore, open_log
from cbd.merkle import leaf_hash

FIRST = "0" * 64
"""What the first entry names as the hash before it."""
ROTATE = "rotate"
"""The event by which the key that signed until then names the one that signs from the next line on: `from`, `to` (PEM), `key_id`."""
NEXT = "next.pem"
"""In the folder of the keys: the private key that a rotation is about to put in place."""
_SEALED = {"seq": int, "time": str, "event": str, "data": dict, "previous": str}

Entry = dict[str, Any]
"""`seq` from 1 on, `time` (UTC), `event`, `data`, `previous`: hash of the entry before; `hash` over these, `signature` over the hash."""


class Line(NamedTuple):
    """A verified line of a log."""

    entry: Entry
    leaf: bytes
    """Its hash as a leaf of the Merkle tree, over the line without its end."""
    key: PublicKey | None
    """What signed it; None where signatures were not looked at."""
    following: PublicKey | None
    """What signs the next line: another key after a rotation."""


def append(workspace: Path, event: str, data: dict[str, Any], *, key: PrivateKey | None = None) -> Entry:
    """The new last entry of the workspace's log, on disk before this returns; processes that append at once wait for each other.

    What a crash left of an unfinished line is cut off and recorded in an entry `torn` of its own, before this one. No entry is dated
    before the one that it follows: a clock that was set back does not bring back what has expired.

    Args:
        workspace: with the log and the key.
        event: what happened.
        data: about it.
        key: what signed something that `data` names; if it was rotated away meanwhile, nobody would accept the two together.

    Raises:
        DataError: the last entry was edited, or `key` signs here no more.
        EnvironmentFault: the disk is full or the log not writable; the log is as it was.
    """
    log = open_log(workspace)
    while True:
        with log.ending() as end:
            last, signing = last_entry(workspace, log, end.last)
            if key is not None and key_id(key.public_key()) != key_id(signing.public_key()):
                raise DataError(f"{log}: key {key_id(key.public_key())[:12]} was rotated away meanwhile and signs no more; run again")
            entry = _seal(event, data, _record_torn(end, last, signing), signing)
            if end.add(entry):
                return entry


def rotate(workspace: Path, new: PrivateKey, data: dict[str, Any], *, own: bool) -> Entry:
    """The log's new last entry, by which the key that signed until now hands over to `new` and signs no more.

    A key that lay in the workspace is removed. A crash at any point leaves either key in charge, and the next entry tidies up.

    Args:
        workspace: with the log and the key.
        new: signs from the next entry on.
        data: why, and by whom.
        own: keep `new` in the workspace, as a development key.

    Raises:
        DataError, EnvironmentFault: as `append`.
    """
    log, folder = open_log(workspace), workspace / KEYS
    while True:
        with log.ending() as end:
            last, signing = last_entry(workspace, log, end.last)
            last = _record_torn(end, last, signing)
            if own:
                write_private_key(folder / NEXT, new)
            keys = {"from": to_pem(signing.public_key()), "to": to_pem(new.public_key()), "key_id": key_id(new.public_key())}
            entry = _seal(ROTATE, {**data, **keys}, last, signing)
            if end.add(entry):
                _finish_rotation(workspace, entry)
                return entry


def verify_log(log: Path, *, key: PublicKey | None = None) -> list[Entry]:
    """All entries of `log`, oldest first, after checking that none was removed, reordered or edited; no log, no entries.

    The last entries of a log can be cut off unseen: its heads tell that, see `cbd.heads.read_log`.

    Args:
        log: the file.
        key: what signs now; also check that every entry was signed by the key of its time: this one, or one that handed over to it.

    Raises:
        DataError: names the first bad line and what is wrong with it.
    """
    return [line.entry for line in walk_lines(FileLog(log), key=key)] if log.exists() else []


def walk_lines(log: LogStore, *, key: PublicKey | None, until: int | None = None) -> Iterator[Line]:
    """As `verify_log`, line by line, of which no more than one is held; those before the first bad one were yielded when this raises.

    A crash may have come after a rotation's line and before its keys: a last line by which `key` hands over is whole, too.

    Args:
        log: the log.
        key: what signs now.
        until: where to stop, as `LogStore.still` says.
    """
    previous, current = FIRST, _first_key(log, key, until)
    signer, time = current, ""
    for number, text in enumerate(log.lines(until), 1):
        try:
            entry = parse_line(text)
            if entry["seq"] != number or entry["previous"] != previous:
                raise ValueError(f"has number {entry['seq']} and does not follow the line before: entries were removed or reordered")
            if entry["time"] < time:
                raise ValueError(f"is dated {entry['time']!r:.40}, before the line that it follows, {time!r:.40}")
            if current is not None and not verify(bytes.fromhex(entry["hash"]), entry["signature"], current):
                raise ValueError(f"was not signed by the key of that time, {key_id(current)[:12]}")
            following = key_after(entry, current)
        except ValueError as error:
            fix = "restore the log from a copy" if text.endswith(b"\n") else "the next entry cuts it off and records it: run the pipeline"
            raise DataError(f"{log}: line {number} {error}; {fix}") from None
        yield Line(entry, leaf_hash(text[:-1]), current, following)
        previous, time, signer, current = entry["hash"], entry["time"], current, following
    if key is not None and current is not None and key_id(key) not in (key_id(signer or current), key_id(current)):
        raise DataError(f"{log}: ends under key {key_id(current)[:12]}, expected {key_id(key)[:12]}; restore the key or the log")


def parse_line(text: bytes) -> Entry:
    """The entry in a line; raises ValueError with what is wrong: it is unfinished, no entry, or its hash is not that of its content."""
    if not text.endswith(b"\n"):
        raise ValueError("is torn: a crash in the middle of writing")
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON: it was edited") from None
    if not isinstance(entry, dict) or set(entry) != {*_SEALED, "hash", "signature"}:
        raise ValueError("is no log entry: it was edited")
    if not all(type(entry[name]) is kind for name, kind in {**_SEALED, "hash": str, "signature": str}.items()):
        raise ValueError("is no log entry: it was edited")
    try:
        same = _hash(entry) == entry["hash"] and canonical_json(entry) + b"\n" == text
    except (ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError("was edited: its hash does not match its content")
    return entry


def last_entry(workspace: Path, log: LogStore, text: bytes | None, key: PrivateKey | None = None) -> tuple[Entry | None, PrivateKey]:
    """The entry in the last line of the log, and the key that signs after it: `key`, by default the workspace's.

    Raises:
        DataError: it was edited, the key is missing, or another one signs after it.
    """
    try:
        last = parse_line(text) if text else None
        _finish_rotation(workspace, last)
        key = key or ensure_key(workspace)
        if last and not _signs_after(last, key.public_key()):
            told = key_id(key.public_key())[:12]
            raise DataError(f"{log}: key {told} does not sign after the last line, another did; see which with: cbd keys list")
    except ValueError as error:
        raise DataError(f"{log}: the last line {error}; restore the log from a copy") from None
    return last, key


def key_after(entry: Entry, current: PublicKey | None) -> PublicKey | None:
    """What signs after this entry: another key after a rotation; raises ValueError if that hands over from another key than `current`."""
    if current is None or entry["event"] != ROTATE:
        return current
    before, after = handed_over(entry)
    if key_id(before) != key_id(current) or entry["data"].get("key_id") != key_id(after):
        raise ValueError("hands over from another key than the one that signed it")
    return after


def handed_over(entry: Entry) -> tuple[PublicKey, PublicKey]:
    """The keys before and after a rotation; raises ValueError if the entry does not hold them."""
    try:
        return from_pem(str(entry["data"].get("from")), told="from"), from_pem(str(entry["data"].get("to")), told="to")
    except DataError as error:
        raise ValueError(f"is no rotation: {error}") from None


def now(timespec: str = "milliseconds") -> str:
    """The time, as `utc` gives it."""
    return utc(datetime.now(UTC), timespec)


def utc(time: datetime, timespec: str = "milliseconds") -> str:
    """A time with a time zone as RFC 3339 has it, in UTC, to the millisecond as in entries or to another `timespec` of `isoformat`."""
    return time.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def _signs_after(last: Entry, key: PublicKey) -> bool:
    """Whether this key signed the entry, or is the one that it hands over to; raises ValueError if it is no rotation."""
    if last["event"] == ROTATE:
        return key_id(handed_over(last)[1]) == key_id(key)
    return verify(bytes.fromhex(last["hash"]), last["signature"], key)


def _record_torn(end: End, last: Entry | None, key: PrivateKey) -> Entry | None:
    """The log's last entry, after what a crash left of a line was cut off and recorded, if there was any."""
    if not end.torn:
        return last
    found = {"sha256": hashlib.sha256(end.torn).hexdigest(), "num_bytes": len(end.torn)}
    torn = _seal("torn", {**found, "text": end.torn[:1000].decode(errors="replace")}, last, key)
    end.add(torn)
    return torn


def _finish_rotation(workspace: Path, last: Entry | None) -> None:
    """Puts the keys in place that the last entry, if it is a rotation, hands over to: a crash may have come between.

    At no moment do two keys lie there that do not belong together.
    """
    folder = workspace / KEYS
    following, private, public = (folder / name for name in (NEXT, PRIVATE, PUBLIC))
    if last is None or last["event"] != ROTATE or not public.exists():
        following.unlink(missing_ok=True)
        return
    before, after = handed_over(last)
    with locked(folder / LOCK):
        told = key_id(read_public_key(public))
        if told not in (key_id(before), key_id(after)) or not verify(bytes.fromhex(last["hash"]), last["signature"], before):
            return
        if private.exists() and key_id(read_private_key(private).public_key()) == key_id(before):
            private.unlink()
        if told == key_id(before):
            write_public_key(public, after)
        if following.exists() and key_id(read_private_key(following).public_key()) == key_id(after):
            os.replace(following, private)


def _first_key(log: LogStore, key: PublicKey | None, until: int | None) -> PublicKey | None:
    """The key that the log began with: what handed over in the first rotation, or without one the key that signs now."""
    if key is None:
        return None
    for number, text in enumerate(log.lines(until), 1):
        if b'"event":"rotate"' not in text:
            continue
        try:
            entry = parse_line(text)
        except ValueError:
            return key  # the walk comes to this line and names what is wrong with it
        if entry["event"] == ROTATE:
            return from_pem(str(entry["data"].get("from")), told=f"{log}: line {number}")
    return key


def _seal(event: str, data: dict[str, Any], last: Entry | None, key: PrivateKey) -> Entry:
    time, seq, previous = now(), 1, FIRST
    if last:
        time, seq, previous = max(time, last["time"]), last["seq"] + 1, last["hash"]
    entry = {"seq": seq, "time": time, "event": event, "data": data, "previous": previous}
    digest = _hash(entry)
    return {**entry, "hash": digest, "signature": sign(bytes.fromhex(digest), key)}


def _hash(entry: Entry) -> str:
    return hashlib.sha256(canonical_json({name: entry[name] for name in _SEALED})).hexdigest()
