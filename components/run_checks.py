"""The evidence that a run left, checked against what the log says of it. Imports neither torch nor MLflow."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cbd.bundle import CARD, WEIGHTS, digest_of_files
from cbd.chain import BOM, check_chain, read_chain
from cbd.config import description_digest
from cbd.decision import SignedDecision
from cbd.errors import DataError
from cbd.files import sha256_file
from components.decision import check_decision
from components.inventory import Inventory, check_inventory
from components.logged import Evidence
from components.records import ARTIFACTS


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A run of which everything that was checked before holds."""

    folder: Path
    evidence: Evidence
    inventory: Inventory

    @property
    def run_id(self) -> str:
        return self.folder.name

    def artifact(self, name: str) -> Path | None:
        """Where an artifact (`<step>/<name>`) lies; None where the run has none."""
        place = self.inventory.artifacts.get(name)
        return self.folder / place if place else None

    def sha256(self, path: Path) -> str | None:
        """SHA-256 of a file as the inventory, which was checked, says; None if it is not in it."""
        return self.inventory.files.get(path.relative_to(self.folder).as_posix())


def check_run(folder: Path, evidence: Evidence) -> Iterator[str]:
    """Checks all that a run left behind against the log, in the order of `RUN_CHECKS`.

    Raises:
        DataError: names the first thing that is missing or altered; or the run was never closed, so that nothing sealed its files.
    """
    if folder.name not in evidence.runs:
        raise DataError(f"{folder}: the log of {evidence.workspace} says nothing of a run {folder.name}; give the run's own workspace")
    closed = evidence.last(folder.name, "closed")
    if not closed:
        raise DataError(f"{folder}: was never closed: nothing sealed its files, and they prove nothing; let it end, or run it again")
    run = CheckedRun(folder, evidence, check_inventory(folder, closed["inventory_sha256"]))
    yield f"files: {len(run.inventory.files)} are as they were when the run was closed"
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
    if not told:
        yield "decision: none, the run ended without one"
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
    chain = read_chain(folder, signed, list(run.evidence.signed_by.values()), bom=run.sha256(decision / BOM))
    check_chain(chain)
    yield f"attestations: {len(chain.statements)}, which lead from the data to the decision"


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
            apart = folder and digest_of is _dataset_digest and _is_kept(run, folder)
            yield f"{name}: is what the decision is about, {expected[:12]}{', its shards lie in the data registry' if apart else ''}"


def _check_registered(run: CheckedRun, signed: SignedDecision) -> Iterator[str]:
    for told in (told for told in run.evidence.runs[run.run_id] if told["event"] == "register"):
        model = signed.content["digests"]["model"]
        if (told["decision_digest"], told["model_digest"]) != (signed.digest, model):
            raise DataError(f"{run.folder}: the log registered {told['name']} version {told['version']} with another decision or model")
        yield f"registered: as {told['name']} version {told['version']}, {told['alias'] or 'no alias'}"


def _dataset_digest(run: CheckedRun, folder: Path) -> str | None:
    """The digest of a data set whose shards, as far as the run's folder kept them, are those that its description names."""
    path = folder / "dataset.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_bytes())
    for name, expected in content["shards"].items():
        found = run.sha256(folder / name)
        if found != expected and (found is not None or not _is_kept(run, folder)):
            raise DataError(f"{folder / name}: is not the shard that {path.name} names; restore the data set")
    return description_digest(content)


def _is_kept(run: CheckedRun, folder: Path) -> bool:
    """Whether the step ran elsewhere and kept here what is not in the data registry."""
    return folder.is_relative_to(run.folder / ARTIFACTS)


def _bundle_digest(run: CheckedRun, folder: Path) -> str | None:
    files = {name: digest for name in (WEIGHTS, CARD) if (digest := run.sha256(folder / name))}
    return digest_of_files(files) if len(files) == 2 else None


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


RUN_CHECKS: list[Callable[[CheckedRun], Iterator[str]]] = [_check_page, _check_decision]
"""What is checked of each run, after its files."""
