"""What the log of a workspace says, verified with every head that can be reached. Imports neither torch nor MLflow."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd.audit import Line, walk_lines
from cbd.errors import DataError
from cbd.heads import HEADS, Matching
from cbd.keys import PublicKey, key_id, load_public_key
from cbd.log_store import open_log
from components.anchors import read_anchors
from components.decision import Signers, find_signers
from components.standing import EVENTS, Move, mark_expired

OF_RUNS = ("delivery", "decision", "register", "override", "closed", "report")
"""Events that are about one run, which their data names by `run_id`."""


class Unverified(str):
    """A sentence that names what was not checked, and proves nothing."""


@dataclass(slots=True)
class Evidence:
    """What a verified log says, as far as files are compared with it; its size does not grow with theirs."""

    workspace: Path
    key: PublicKey
    """What signs now."""
    signers: Signers = field(default_factory=dict)
    signed_by: dict[str, PublicKey] = field(default_factory=dict)
    """All keys that signed a line, by id."""
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By run id, the data of the entries about it, each with its `event`, oldest first."""
    moves: list[Move] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Files of the workspace that the log names: SHA-256 by path."""
    num_lines: int = 0
    time: str = ""
    """Of the last entry."""

    def last(self, run_id: str, *events: str) -> dict[str, Any]:
        """Data of the last entry of these kinds about a run; empty without one."""
        found = [told for told in self.runs.get(run_id, []) if told["event"] in events]
        return found[-1] if found else {}


def read_evidence(workspace: Path, *, trusted: Sequence[PublicKey] = ()) -> tuple[Evidence, list[str]]:
    """What the log says, and a sentence for each thing that holds: the log itself, and every head that can be reached.

    Raises:
        DataError: there is no log, it or its heads were altered, or none of the `trusted` keys, if there are any, signed a line of it.
        EnvironmentFault: the data registry's origin is out of reach.
    """
    log = open_log(workspace)
    anchors = list(read_anchors(workspace))
    heads_file = workspace / HEADS
    if heads_file.exists() and heads_file.stat().st_size > 0 and not heads_file.read_bytes().endswith(b"\n"):
        raise DataError(f"{heads_file}: its last line is torn; restore it from a copy, or run the pipeline, which tidies it up")
    if not log.exists():
        Matching((place, head) for place, heads in anchors for head in heads).finish()
        raise DataError(f"{log}: no log there; give the workspace of the runs with --workspace")
    with log.still() as (_, end):
        evidence = Evidence(workspace, load_public_key(workspace))
    matching = Matching((place, head) for place, heads in anchors for head in heads)
    for line in walk_lines(log, key=evidence.key, until=end):
        matching.add(line)
        _note(evidence, line)
    matching.finish()
    mark_expired(evidence.moves, last=evidence.time)
    if trusted and not evidence.signed_by.keys() & {key_id(key) for key in trusted}:
        named = ", ".join(key_id(key)[:12] for key in trusted)
        raise DataError(f"{log}: no trusted key signed a line of it ({named}); expected the log of somebody you trust, do not believe it")
    keys = f"{len(evidence.signed_by)} key{'s' * (len(evidence.signed_by) != 1)}"
    held = [f"log: {evidence.num_lines} lines, each signed by the key of its time ({keys}) and in its place"]
    held += [f"heads: {len(heads)} in {place} agree with the log" for place, heads in anchors if heads]
    return evidence, held


def _note(evidence: Evidence, line: Line) -> None:
    """Adds what a line says."""
    entry = line.entry
    event, data = entry["event"], entry["data"]
    evidence.num_lines, evidence.time = entry["seq"], entry["time"]
    evidence.signers |= find_signers([line])
    if line.key is not None:
        evidence.signed_by[key_id(line.key)] = line.key
    if event in OF_RUNS and isinstance(data.get("run_id"), str):
        evidence.runs.setdefault(data["run_id"], []).append({**data, "event": event})
    if event in EVENTS:
        evidence.moves.append({**data, "event": event})
    if event == "delivery" and data.get("quarantine_sha256"):
        evidence.kept[f"quarantine/{data['run_id']}.parquet"] = data["quarantine_sha256"]
    if event == "canary":
        evidence.kept[f"canaries/{data['sha256']}.json"] = data["sha256"]
    if event == "retest" and data.get("digests"):
        digests = data["digests"]
        place = f"retests/{digests['model'][:12]}/{digests['evaluation'][:12]}"
        evidence.kept |= {f"{place}/evaluation.json": digests["evaluation"], f"{place}/scan/scan.json": digests["scan"]}
