"""A slice of the log: the lines about one run, each with a proof that it stands in the tree under one signed head.

Where keys were rotated since, the rotations are in it, proven likewise: the key that signed the head vouches by it for those before it.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from cbd.audit import ROTATE, Entry, handed_over, parse_line
from cbd.config import canonical_json, parse_canonical
from cbd.decision import SignedDecision
from cbd.errors import DataError
from cbd.heads import Head, is_by, parse_head
from cbd.keys import PublicKey, key_id, verify
from cbd.merkle import Hash, includes, inclusion_proof, leaf_hash

LOG_SLICE = "log.json"


class Slice(NamedTuple):
    """A slice whose head a trusted key signed; its lines are not looked at yet."""

    head: Head
    lines: list[dict[str, Any]]
    keys: list[PublicKey]
    """Who is believed: those that are trusted, and those that handed over to the one that signed the head."""
    told: str
    """How an error names it."""


def make_slice(lines: Iterable[tuple[Entry, Hash]], head: Head, signed: SignedDecision) -> bytes:
    """The slice about the run that was decided on, as canonical JSON; `lines` are all that the head is over."""
    kept, rotations, leaves = [], [], []
    for entry, leaf in lines:
        leaves.append(leaf)
        if is_about(entry, str(signed.content["run_id"]), {signed.digest}):
            kept.append(entry)
        elif entry["event"] == ROTATE and kept:
            rotations.append(entry)
    proven = {"lines": [prove_line(entry, leaves) for entry in kept], "rotations": [prove_line(entry, leaves) for entry in rotations]}
    return canonical_json({"schema_version": 2, "head": head, **proven})


def is_about(entry: Entry, run_id: str, decisions: Collection[str]) -> bool:
    """Whether an entry of the log is about the run, which it names, or about one of its decisions: what became of the model later."""
    return entry["data"].get("run_id") == run_id or entry["data"].get("decision_digest") in decisions


def prove_line(entry: Entry, leaves: Sequence[Hash]) -> dict[str, Any]:
    """The entry with its path to the root over the hashes of all lines."""
    return {"entry": entry, "path": [node.hex() for node in inclusion_proof(entry["seq"] - 1, leaves)]}


def check_proven(line: Any, head: Head, *, told: str) -> Entry:
    """The entry of what `prove_line` gave, after checking that it is whole and in the tree of the head. Who signed it is not looked at.

    Raises:
        DataError: it names the line as `told`.
    """
    if not _is_line(line) or not _is_hash(head["root"]):
        raise DataError(f"{told} is no proof: it or its head was edited")
    text = canonical_json(line["entry"])
    try:
        entry = parse_line(text + b"\n")
        bytes.fromhex(entry["hash"])
    except ValueError as error:
        raise DataError(f"{told} {error}") from None
    path = [bytes.fromhex(node) for node in line["path"]]
    if not includes(leaf_hash(text), entry["seq"] - 1, head["size"], path, bytes.fromhex(head["root"])):
        raise DataError(f"{told} is not in the tree of the head over {head['size']} lines")
    return entry


def open_slice(data: bytes, keys: Sequence[PublicKey], *, told: str) -> Slice:
    """The slice, and besides these keys those that handed over to the one of them that signed its head, which is over their rotations.

    A key vouches for those before it, never for one after it: nobody else can have it sign a head over a rotation to it.

    Args:
        data: what `make_slice` gave.
        keys: who is trusted.
        told: how an error names it.

    Raises:
        DataError: no slice, its head is of none of the keys, or a rotation is not in its tree or hands over to another key.
    """
    head, lines, rotations = _parse(data, told)
    current = next((key for key in keys if is_by(head, key)), None)
    if current is None:
        raise DataError(f"{told}: the head is altered, or of key {head['key_id'][:12]!r}, not a trusted one; export the run again")
    found, before = list(keys), int(head["size"]) + 1
    for line in reversed(rotations):
        entry = check_proven(line, head, told=f"{told}: a rotation")
        try:
            old, new = handed_over(entry)
        except ValueError as error:
            raise DataError(f"{told}: line {entry['seq']} {error}; export the run again") from None
        ordered = entry["event"] == ROTATE and entry["seq"] < before and key_id(new) == key_id(current)
        if not ordered or not verify(bytes.fromhex(entry["hash"]), entry["signature"], old):
            raise DataError(f"{told}: line {entry['seq']} hands over to another key than {key_id(current)[:12]}; export the run again")
        found.append(old)
        current, before = old, entry["seq"]
    return Slice(head, lines, found, told)


def check_slice(found: Slice, signed: SignedDecision) -> dict[str, Any]:
    """The head's size and time, what became of the model, and how many lines there are, after checking every signature and proof.

    Args:
        found: the slice.
        signed: the decision, which one of the lines must name.

    Raises:
        DataError: a line is edited, not in the tree or signed by no key that is believed, or the decision is not in it.
    """
    head, lines, keys, told = found
    entries = [check_proven(line, head, told=f"{told}: line {number} of it") for number, line in enumerate(lines, 1)]
    for number, entry in enumerate(entries, 1):
        if not any(verify(bytes.fromhex(entry["hash"]), entry["signature"], key) for key in keys):
            trusted = ", ".join(key_id(key)[:12] for key in keys)
            raise DataError(f"{told}: line {number} of it was not signed by a trusted key ({trusted}); export the run again")
    if [entry["seq"] for entry in entries] != sorted({entry["seq"] for entry in entries}):
        raise DataError(f"{told}: lines are doubled or out of order; export the run again")
    decided = [entry["data"] for entry in entries if entry["event"] == "decision"]
    if not any(each.get("decision_digest") == signed.digest and each.get("verdict") == signed.content["verdict"] for each in decided):
        raise DataError(f"{told}: names no decision {signed.digest[:12]}; export the run again")
    if decided[-1].get("decision_digest") != signed.digest:
        raise DataError(f"{told}: the run was decided again since, {str(decided[-1].get('verdict'))[:20]}; export that decision")
    moves = [entry for entry in entries if entry["event"] in ("register", "rollback", "override", "demote")]
    became = _tell(moves[-1]) if moves else "not registered"
    return {"log_lines": len(entries), "log_size": head["size"], "head_time": head["time"], "head_root": head["root"], "became": became}


def _tell(move: Entry) -> str:
    """What a move made of the model, such as `register champion`."""
    data = move["data"]
    told = f"{move['event']} {data.get('alias') or 'without an alias'}"
    return f"{told} until {data['expires']}" if isinstance(data.get("expires"), str) else told


def _parse(data: bytes, told: str) -> tuple[Head, list[dict[str, Any]], list[dict[str, Any]]]:
    """Head, lines and rotations of a slice."""
    try:
        values = parse_canonical(data)
    except ValueError:
        values = {}
    listed = all(isinstance(values.get(name), list) for name in ("lines", "rotations"))
    if set(values) != {"schema_version", "head", "lines", "rotations"} or values["schema_version"] != 2 or not listed:
        raise DataError(f"{told}: expected a slice of a log in canonical JSON, found something else; export the run again")
    return parse_head(canonical_json(values["head"]), told=f"{told}: head"), values["lines"], values["rotations"]


def _is_line(line: Any) -> bool:
    if not isinstance(line, dict) or set(line) != {"entry", "path"} or not isinstance(line["path"], list):
        return False
    return all(_is_hash(node) for node in line["path"])


def _is_hash(node: Any) -> bool:
    return isinstance(node, str) and len(node) == 64 and set(node) <= set("0123456789abcdef")
