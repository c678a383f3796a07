"""The evidence of a workspace, checked offline: log, heads, decisions, files. Imports neither torch nor MLflow.

Every check is a generator that yields a sentence for what holds, and raises for the first thing that does not.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbd.audit import LOG, Line, walk_lines
from cbd.bundle import CARD, WEIGHTS
from cbd.chain import BOM, check_chain, read_chain, steps_of
from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import sha256_file
from cbd.heads import HEADS, Matching
from cbd.keys import PublicKey, key_id, load_public_key
from components.anchors import read_anchors
from components.decision import SignedDecision, Signers, check_decision, find_signers
from components.git import git
from components.inventory import Inventory, check_inventory
from components.registered import check_registry
from components.standing import EVENTS, Move, mark_expired

OF_RUNS = ("delivery", "decision", "register", "override", "closed", "report")
"""Events that are about one run, which their data names by `run_id`."""


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


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A run of which everything that was checked before holds."""

    folder: Path
    evidence: Evidence
    inventory: Inventory | None
    """None: the run was never closed."""

    @property
    def run_id(self) -> str:
        return self.folder.name

    def artifact(self, name: str) -> Path | None:
        """Where an artifact (`<step>/<name>`) lies; None where the run has none."""
        place = self.inventory.artifacts.get(name) if self.inventory else None
        return self.folder / place if place else None

    def sha256(self, path: Path) -> str | None:
        """SHA-256 of a file as the inventory, which was checked, says; None if it is not in it."""
        return self.inventory.files.get(path.relative_to(self.folder).as_posix()) if self.inventory else None


def read_evidence(workspace: Path, *, trusted: Sequence[PublicKey] = ()) -> tuple[Evidence, list[str]]:
    """What the log says, and a sentence for each thing that holds: the log itself, and every head that can be reached.

    Raises:
        DataError: there is no log, it or its heads were altered, or none of the `trusted` keys, if there are any, signed a line of it.
        EnvironmentFault: the data registry's origin is out of reach.
    """
    log = workspace / LOG
    anchors = list(read_anchors(workspace))
    if (workspace / HEADS).exists() and not (workspace / HEADS).read_bytes().endswith(b"\n"):
        raise DataError(f"{workspace / HEADS}: its last line is torn; restore it from a copy, or run the pipeline, which tidies it up")
    if not log.is_file():
        raise DataError(f"{log}: no log there; give the workspace of the runs with --workspace")
    evidence = Evidence(workspace, load_public_key(workspace))
    matching = Matching((place, head) for place, heads in anchors for head in heads)
    for line in walk_lines(log, key=evidence.key):
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


def verify_all(workspace: Path, *, trusted: Sequence[PublicKey] = ()) -> Iterator[str]:
    """A sentence for everything in a workspace that holds; runs in the order of their names.

    Raises:
        DataError: names the first thing that is missing or altered.
        EnvironmentFault: the data registry's origin is out of reach.
    """
    evidence, held = read_evidence(workspace, trusted=trusted)
    yield from held
    yield from check_workspace(evidence)
    folders = sorted(path for path in (workspace / "runs").glob("*") if path.is_dir())
    for folder in folders:
        if folder.name in evidence.runs:
            yield from (f"{folder.name}: {sentence}" for sentence in check_run(folder, evidence))
        else:
            yield f"{folder.name}: not checked, it ended before the log heard of it"
    if gone := sorted({name for name in evidence.runs if evidence.last(name, "closed")} - {folder.name for folder in folders}):
        yield f"gone: {len(gone)} runs that the log knows have no folder any more, such as {gone[0]}: their files were not checked"


def verify_run(folder: Path, workspace: Path, *, trusted: Sequence[PublicKey] = ()) -> Iterator[str]:
    """A sentence for everything about one run that holds, the log and its heads first; raises as `verify_all`."""
    evidence, held = read_evidence(workspace, trusted=trusted)
    yield from held
    yield from check_run(folder, evidence)


def check_workspace(evidence: Evidence) -> Iterator[str]:
    """Checks what the log says about the workspace, besides its runs: results of canaries and of later tests, and who is promoted."""
    for check in WORKSPACE_CHECKS:
        yield from check(evidence)


def check_run(folder: Path, evidence: Evidence) -> Iterator[str]:
    """Checks all that a run left behind against the log, in the order of `RUN_CHECKS`.

    Raises:
        DataError: names the first thing that is missing or altered.
    """
    if folder.name not in evidence.runs:
        raise DataError(f"{folder}: the log of {evidence.workspace} says nothing of a run {folder.name}; give the run's own workspace")
    closed = evidence.last(folder.name, "closed")
    run = CheckedRun(folder, evidence, check_inventory(folder, closed["inventory_sha256"]) if closed else None)
    if run.inventory:
        yield f"files: {len(run.inventory.files)} are as they were when the run was closed"
    else:
        yield "files: not checked, the run was never closed"
    for check in RUN_CHECKS:
        yield from check(run)


def _check_page(run: CheckedRun) -> Iterator[str]:
    told = run.evidence.last(run.run_id, "closed", "report")
    page = run.folder / "report.html"
    if told and page.is_file():
        if (found := sha256_file(page)) != told["page_sha256"]:
            raise DataError(
                f"{page}: altered: SHA-256 is {found[:12]}, the log says {told['page_sha256'][:12]}; write it again with cbd report"
            )
        yield "report: is the page that the log names"
    elif told:
        raise DataError(f"{page}: missing; restore it, or write it again with: cbd report {run.run_id}")


def _check_decision(run: CheckedRun) -> Iterator[str]:
    told = run.evidence.last(run.run_id, "decision")
    folder = run.artifact("decide/decision")
    if not told or run.inventory is None:
        why = "the run was never closed" if run.inventory is None else "the run ended without one"
        yield f"decision: {'not checked' if told else 'none'}, {why}"
        return
    if folder is None:
        raise DataError(
            f"{run.folder}: the log names decision {told['decision_digest'][:12]}, the run's inventory does not; restore the folder"
        )
    signed = check_decision(folder, run.evidence.signers, key=run.evidence.key)
    if signed.content["run_id"] != run.run_id:
        raise DataError(f"{folder}: is the decision of run {signed.content['run_id']!r}, expected {run.run_id!r}; restore the run's own")
    if signed.digest != told["decision_digest"]:
        raise DataError(
            f"{folder}: an older decision, {signed.digest[:12]}; the log says the run was decided again ({told['decision_digest'][:12]})"
        )
    yield from _check_subjects(run, signed)
    signer = signed.content["signed_by"]
    kind = "a development key, which lies beside what it signs" if signer["development"] else "a key from outside the workspace"
    yield f"decision: {signed.content['verdict']}, signed by {signer['key_id'][:12]}, {kind}"
    yield from _check_attestations(run, signed, folder)
    yield from _check_registered(run, signed)


def _check_attestations(run: CheckedRun, signed: SignedDecision, decision: Path) -> Iterator[str]:
    """That the attestations, which the inventory sealed, are signed, and lead from the data to the decision."""
    folder = run.folder / "attestations"
    if run.sha256(folder / "decide.json") is None:
        yield "attestations: none"
        return
    check_chain(read_chain(folder, signed, list(run.evidence.signed_by.values()), bom=run.sha256(decision / BOM)))
    yield f"attestations: {len(steps_of(signed.content['digests']))}, which lead from the data to the decision"


def _check_subjects(run: CheckedRun, signed: SignedDecision) -> Iterator[str]:
    """That the files of the run are what the decision is about."""
    for name, (artifact, digest_of) in SUBJECTS.items():
        folder, expected = run.artifact(artifact), signed.content["digests"][name]
        found = digest_of(run, folder) if folder is not None else None
        if expected is not None and found != expected:
            raise DataError(
                f"{folder or artifact}: the decision is about {name} {expected[:12]}, found {str(found)[:12]}; restore the run's folder"
            )
        if expected is not None:
            yield f"{name}: is what the decision is about, {expected[:12]}"


def _check_registered(run: CheckedRun, signed: SignedDecision) -> Iterator[str]:
    for told in (told for told in run.evidence.runs[run.run_id] if told["event"] == "register"):
        model = signed.content["digests"]["model"]
        if (told["decision_digest"], told["model_digest"]) != (signed.digest, model):
            raise DataError(f"{run.folder}: the log registered {told['name']} version {told['version']} with another decision or model")
        yield f"registered: as {told['name']} version {told['version']}, {told['alias'] or 'no alias'}"


def _dataset_digest(run: CheckedRun, folder: Path) -> str | None:
    """The digest of a data set whose shards are those that its description names."""
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    for name, expected in content["shards"].items():
        if run.sha256(folder / name) != expected:
            raise DataError(f"{folder / name}: is not the shard that {path.name} names; restore the data set")
    return hashlib.sha256(canonical_json({key: value for key, value in content.items() if key != "digest"})).hexdigest()


def _bundle_digest(run: CheckedRun, folder: Path) -> str | None:
    files = {name: run.sha256(folder / name) for name in (WEIGHTS, CARD)}
    return None if None in files.values() else hashlib.sha256(canonical_json(files)).hexdigest()


def _digest_of_file(name: str) -> Callable[[CheckedRun, Path], str | None]:
    return lambda run, folder: run.sha256(folder / name if folder.is_dir() else folder)


SUBJECTS: dict[str, tuple[str, Callable[[CheckedRun, Path], str | None]]] = {
    "data": ("ingest/dataset", _dataset_digest),
    "trusted": ("ingest/trusted_set", _dataset_digest),
    "model": ("train_deconfounded/model", _bundle_digest),
    "evaluation": ("evaluate/evaluation", _digest_of_file("evaluation.json")),
    "validation": ("validate/validation", _digest_of_file("validation.json")),
    "canary": ("canary/canary", _digest_of_file("canary.json")),
    "scan": ("scan/scanned", _digest_of_file("scan.json")),
}
"""What a decision is about: by its name there, the artifact and how its digest is found."""


def _check_kept(evidence: Evidence) -> Iterator[str]:
    """That results which outlive their runs, where they are still kept, are those that the log names."""
    found = 0
    for name, expected in evidence.kept.items():
        path = evidence.workspace / name
        if path.is_file():
            if (sha256 := sha256_file(path)) != expected:
                raise DataError(f"{path}: altered: SHA-256 is {sha256[:12]}, the log says {expected[:12]}; restore it from a copy")
            found += 1
    if evidence.kept:
        yield f"canaries, quarantines, later tests: {found} of {len(evidence.kept)} results are still there, and as the log names them"


def _check_promoted(evidence: Evidence) -> Iterator[str]:
    """That MLflow's registry is what the log says, and nobody stands there by an override that is over."""
    yield from check_registry(evidence.workspace, evidence.moves, signers=evidence.signers, key=evidence.key)


def _check_registry_files(evidence: Evidence) -> Iterator[str]:
    """That the data registry's files are as committed, and its history is whole."""
    registry = evidence.workspace / "registry"
    if not (registry / ".git").is_dir():
        return
    if changed := git(registry, "status", "--porcelain", "--untracked-files=no"):
        raise DataError(f"{registry}: not as committed: {' '.join(changed.split()[1:2])}; run there: git checkout -- .")
    git(registry, "fsck", "--no-dangling", "--no-progress")
    yield "data registry: its files are as committed, its history is whole"


def _check_remote(evidence: Evidence) -> Iterator[str]:
    """That every object in a local DVC remote is what its name, an MD5, says; what it stands for is sealed by SHA-256 in the registry."""
    objects = [path for path in sorted((evidence.workspace / "remote").glob("files/md5/*/*")) if path.is_file()]
    for path in objects:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != path.parent.name + path.name.removesuffix(".dir"):
            raise DataError(
                f"{path}: altered: this object of the data registry's remote has another content than its name; restore the remote"
            )
    if objects:
        yield f"remote: {len(objects)} objects of the data registry are what their names say"


RUN_CHECKS: list[Callable[[CheckedRun], Iterator[str]]] = [_check_page, _check_decision]
"""What is checked of each run, after its files."""
WORKSPACE_CHECKS: list[Callable[[Evidence], Iterator[str]]] = [
    _check_promoted,
    _check_registry_files,
    _check_kept,
    _check_remote,
]
"""What is checked once."""


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
