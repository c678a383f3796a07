"""Proofs for somebody who does not get the log: that it has certain lines, and that it only grew since an earlier head (RFC 6962)."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cbd.audit import ROTATE, Entry, key_after
from cbd.config import canonical_json, parse_canonical
from cbd.errors import DataError
from cbd.heads import Head, is_by, parse_head, read_heads, walk
from cbd.keys import PublicKey, key_id, verify
from cbd.log_slice import check_proven, is_about, prove_line
from cbd.log_store import open_log
from cbd.merkle import consistency_proof, extends
from components.anchors import close_log

_KEYS = {"schema_version", "run_id", "head", "earlier", "consistency", "lines", "rotations"}


def make_proof(workspace: Path, run_id: str, *, since: Path | None = None) -> tuple[dict[str, Any], bytes]:
    """The proof and its canonical JSON: the lines about a run and all rotations of the key, each with its path to a fresh head.

    Args:
        workspace: with the log and the key.
        run_id: the run.
        since: an earlier proof, whose head this log must extend; None takes the workspace's first head.

    Raises:
        DataError: the log was altered, says nothing of the run, or does not extend the earlier head.
    """
    earlier = _read(since)["head"] if since else (read_heads(open_log(workspace)) or [None])[0]
    head = close_log(workspace)
    lines = list(itertools.islice(walk(workspace), head["size"]))
    leaves, decisions = [line.leaf for line in lines], _decisions((line.entry for line in lines), run_id)
    wanted = [line.entry for line in lines if line.entry["event"] == ROTATE or is_about(line.entry, run_id, decisions)]
    if not any(entry["event"] != ROTATE for entry in wanted):
        raise DataError(f"{run_id}: the log of {workspace} says nothing of such a run; see all with: cbd audit show")
    proven = [prove_line(entry, leaves) for entry in wanted]
    earlier = earlier or head
    if earlier["size"] > len(leaves):
        raise DataError(
            f"{since}: its head is over {earlier['size']} lines, the log has {len(leaves)}: it was cut off; restore it from a copy"
        )
    proof = {
        "schema_version": 1,
        "run_id": run_id,
        "head": head,
        "earlier": earlier,
        "consistency": [node.hex() for node in consistency_proof(earlier["size"], leaves)],
        "lines": [each for each in proven if each["entry"]["event"] != ROTATE],
        "rotations": [each for each in proven if each["entry"]["event"] == ROTATE],
    }
    return proof, canonical_json(proof)


def check_proof(path: Path, trusted: Sequence[PublicKey], *, since: Path | None = None) -> Iterator[str]:
    """A sentence for each thing that the proof in a file proves, to somebody who trusts one of these keys; nothing else is believed.

    Args:
        path: the file.
        trusted: public keys.
        since: an earlier proof, at whose head this one must begin.

    Raises:
        DataError: it is no proof, or does not hold.
    """
    proof = _read(path)
    head, earlier = proof["head"], proof["earlier"]
    keys = list(trusted)
    for entry in _proven(path, proof["rotations"], head):
        keys += _handed_over(path, entry, keys)
    signer = next((key for key in keys if is_by(head, key)), None)
    if signer is None:
        named = ", ".join(key_id(key)[:12] for key in trusted)
        raise DataError(
            f"{path}: its head is signed by {head['key_id'][:12]}, which is not the trusted key ({named}) nor one it handed over to"
        )
    yield f"head: {head['size']} lines on {head['time']}, signed by {head['key_id'][:12]}"
    if not any(is_by(earlier, key) for key in keys):
        raise DataError(
            f"{path}: its earlier head, of {earlier['time']}, is not signed by a trusted key; ask for a proof since a head you know"
        )
    if since and _read(since)["head"] != earlier:
        raise DataError(f"{path}: does not begin at the head of {since}; ask for one with: cbd audit prove RUN --since {since}")
    old, new = (_node(path, each["root"]) for each in (earlier, head))
    if not extends(earlier["size"], old, head["size"], new, _nodes(path, proof["consistency"])):
        raise DataError(f"{path}: the log does not extend its earlier head of {earlier['time']}: it was cut, forked or rewritten")
    yield f"consistency: the log only grew since the head over {earlier['size']} lines of {earlier['time']}"
    entries = list(_proven(path, proof["lines"], head))
    if not entries:
        raise DataError(f"{path}: proves no line about run {proof['run_id']!r}: they were taken out; ask for the proof again")
    decisions = _decisions(entries, proof["run_id"])
    for entry in entries:
        if not is_about(entry, proof["run_id"], decisions):
            raise DataError(f"{path}: line {entry['seq']} is not about run {proof['run_id']!r}")
        if not any(verify(bytes.fromhex(entry["hash"]), entry["signature"], key) for key in keys):
            raise DataError(f"{path}: line {entry['seq']} is not signed by a trusted key")
        told = "; ".join(f"{name} {value}" for name, value in sorted(entry["data"].items()) if isinstance(value, str) and name != "run_id")
        yield f"line {entry['seq']}: {entry['time']} {entry['event']} of run {proof['run_id']}: {told}"


def _decisions(entries: Iterable[Entry], run_id: str) -> set[str]:
    """Digests of the decisions that lines about the run name."""
    named = (entry["data"] for entry in entries if entry["data"].get("run_id") == run_id)
    return {data["decision_digest"] for data in named if "decision_digest" in data}


def _proven(path: Path, lines: Any, head: Head) -> Iterator[Entry]:
    """The entries of lines that are in the tree of the head."""
    if not isinstance(lines, list):
        raise DataError(f"{path}: is no proof: it was edited")
    for line in lines:
        yield check_proven(line, head, told=f"{path}: a line")


def _handed_over(path: Path, entry: Entry, keys: Sequence[PublicKey]) -> list[PublicKey]:
    """The key that a rotation hands over to, if a key that is trusted signed it."""
    for key in keys:
        if verify(bytes.fromhex(entry["hash"]), entry["signature"], key):
            try:
                following = key_after(entry, key)
            except ValueError as error:
                raise DataError(f"{path}: line {entry['seq']} {error}") from None
            return [following] if following else []
    return []


def _read(path: Path) -> dict[str, Any]:
    """The proof in a file, which must be canonical JSON."""
    try:
        proof = parse_canonical(path.read_bytes())
        same = set(proof) == _KEYS and proof["schema_version"] == 1
    except FileNotFoundError:
        raise DataError(f"{path}: no such proof; make one with: cbd audit prove RUN --out FILE") from None
    except (OSError, ValueError):
        same = False
    if not same:
        raise DataError(f"{path}: is no proof: it was edited, or is none that `cbd audit prove` wrote")
    for name in ("head", "earlier"):
        parse_head(canonical_json(proof[name]), told=f"{path}: {name}")
    return proof


def _nodes(path: Path, nodes: Any) -> list[bytes]:
    if not isinstance(nodes, list):
        raise DataError(f"{path}: is no proof: it was edited")
    return [_node(path, node) for node in nodes]


def _node(path: Path, text: Any) -> bytes:
    try:
        node = bytes.fromhex(text)
    except (TypeError, ValueError):
        node = b""
    if len(node) != 32 or node.hex() != text:
        raise DataError(f"{path}: is no proof: {str(text)[:80]!r} is no SHA-256 in hex")
    return node
