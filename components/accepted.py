"""What was delivered before: the data set of the last accepted run, what people rejected or released, and which data sets were decided on.

A run trains on the union of all accepted deliveries. A delivery is accepted by the last verdict on the model that was trained with it: PASS
and REVIEW accept it, anything else leaves it out. A demotion brings a new verdict. The signed audit log is what says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cbd.dataset import DatasetInfo, read_batches, read_manifest
from cbd.errors import DataError
from cbd.heads import read_log
from cbd.images import Refused
from components import quarantine
from components.quarantine import Held, Rulings
from components.rawfiles import RawFile
from components.registry import fetch, find

ACCEPTING = ("PASS", "REVIEW")
"""Verdicts on a model that accept the delivery that it was trained with."""


@dataclass(frozen=True)
class Earlier:
    """What a delivery is compared with; by default nothing."""

    folder: Path | None = None
    """The data set of the last accepted run."""
    info: DatasetInfo | None = None
    labels: dict[bytes, str] = field(default_factory=dict)
    """Class name by pixel digest of all its images that stay."""
    ids: dict[bytes, str] = field(default_factory=dict)
    """Sample id by pixel digest, of the same."""
    rejected: frozenset[bytes] = frozenset()
    """Pixel digests that people rejected."""
    rejected_ids: frozenset[str] = frozenset()
    """SHA-256 of files that people rejected."""
    num_released: int = 0
    """Files that people released from the quarantine and that are not back yet."""
    released: Iterator[RawFile] = field(default_factory=lambda: iter(()))
    """These, with their bytes; can be walked once."""

    @property
    def base(self) -> str:
        """Digest of the accepted data set; empty without one."""
        return self.info.digest if self.info else ""

    @property
    def left_out(self) -> int:
        """Images of the accepted data set that are rejected, or come back under another label."""
        return (self.info.num_images if self.info else 0) - len(self.labels)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The images of the accepted data set that stay."""
        if self.folder is None:
            return
        kept = pa.array(sorted(self.ids.values()), pa.string()) if self.left_out else None
        for batch in read_batches(self.folder):
            yield batch if kept is None else batch.filter(pc.is_in(batch["sample_id"], kept))


def read_earlier(workspace: Path, name: str, class_names: Sequence[str], out: Path) -> Earlier:
    """What this workspace knows; the accepted data set is fetched from the data registry to the folder `out`, and verified.

    Args:
        workspace: with the audit log, the data registry and the quarantine.
        name: the registered model's full name.
        class_names: its classes; a file that was released under another label goes back to the quarantine.
        out: gets the data set, if there is one.

    Raises:
        DataError: the log, the registry or the quarantine was altered.
    """
    ruled = quarantine.rulings(workspace)
    rejected = frozenset(map(bytes.fromhex, ruled.rejected_pixels()))
    rejected_ids = frozenset(sample for sample in ruled.of_file if ruled.rejects_file(sample))
    info, kept = _accepted(workspace, name, out, ruled)
    back_again = ruled.released()
    relabelled = {
        ruling.pixel_digest
        for ruling in back_again.values()
        if (old := kept.get(str(ruling.pixel_digest))) and ruling.label_name not in (None, old[0])
    }
    kept = {digest: image for digest, image in kept.items() if digest not in relabelled}
    samples = {sample for _, sample in kept.values()}
    files = [
        held
        for held in quarantine.listed(workspace, ruled)
        if held.model == name and held.id in back_again and held.id not in samples and back_again[held.id].pixel_digest not in kept
    ]
    return Earlier(
        out if info else None,
        info,
        {bytes.fromhex(digest): label for digest, (label, _) in kept.items()},
        {bytes.fromhex(digest): sample for digest, (_, sample) in kept.items()},
        rejected,
        rejected_ids,
        len(files),
        _released(workspace, files, ruled, class_names),
    )


def decided(workspace: Path, name: str, *, data: str, trusted: str) -> dict[str, str] | None:
    """Run id and verdict of the last run of this model that ended with a decision on this data set and trusted set; None: none did.

    What validation refused counts whatever the model: its name is not known, and the same data would be refused again. A run whose model
    was demoted does not count: its verdict stands no more, and the same data must be trained on and judged anew.
    """
    found = None
    for run in _runs(workspace):
        same = run["digests"]["data"] == data and run["digests"]["trusted"] == trusted
        refused = run["digests"]["model"] is None
        if same and not run["trial"] and not run["demoted"] and (refused or run["name"] == name):
            found = {"run_id": run["run_id"], "verdict": run["verdict"]}
    return found


def last_accepted(workspace: Path, name: str) -> str:
    """Digest of the data set of the last accepted run of this model; empty if none was.

    Raises:
        DataError: the audit log was altered.
    """
    runs = [run for run in _runs(workspace) if run["name"] == name and run["alias"] and not run["trial"]]
    accepted = [run["digests"]["data"] for run in runs if run["demoted"] in (None, *ACCEPTING)]
    return str(accepted[-1]) if accepted else ""


def _accepted(workspace: Path, name: str, out: Path, ruled: Rulings) -> tuple[DatasetInfo | None, dict[str, tuple[str, str]]]:
    """The accepted data set, and label and sample id of each of its images that was not rejected, by pixel digest."""
    digest = last_accepted(workspace, name)
    if not digest:
        return None, {}
    stored = find(workspace, digest)
    if stored is None:
        raise DataError(f"{workspace / 'registry'}: the accepted data set {digest[:12]} is not in it; restore the registry")
    info, rejected = fetch(stored.tag, out, workspace=workspace), ruled.rejected_pixels()
    manifest = read_manifest(out)
    rows = zip(*(manifest[column].to_pylist() for column in ("pixel_digest", "label", "sample_id")), strict=True)
    kept = {
        pixels: (info.class_names[label], sample)
        for pixels, label, sample in rows
        if pixels not in rejected and not ruled.rejects_file(sample)
    }
    return info, kept


def _released(workspace: Path, files: Sequence[Held], ruled: Rulings, class_names: Sequence[str]) -> Iterator[RawFile]:
    known = {held.id: held for held in files}
    for name, data in quarantine.read_bytes(workspace, known):
        held = known[name]
        label = ruled.of_file[name].label_name or held.label_name
        refusal = None if label in class_names else Refused("no-class", f"released as {label!r}, which is no class of the trusted set")
        yield RawFile(held.original_path, label, data, held.num_bytes, refusal, held.supplier)


def _runs(workspace: Path) -> list[dict[str, Any]]:
    """The decisions in the log, oldest first, each with the name and alias that its model was registered under; None where it was not.

    `demoted` is the verdict for which the model lost its alias later; None where it did not.
    """
    runs: list[dict[str, Any]] = []
    for entry in read_log(workspace):
        told = entry["data"]
        if entry["event"] == "decision":
            runs.append({**told, "name": None, "alias": None, "demoted": None})
        elif entry["event"] == "register":
            for run in runs:
                if run["run_id"] == told["run_id"] and run["decision_digest"] == told["decision_digest"]:
                    run |= {"name": told["name"], "alias": told["alias"]}
        elif entry["event"] == "demote":
            for run in runs:
                if (run["name"], run["decision_digest"]) == (told["name"], told["decision_digest"]):
                    run["demoted"] = told["verdict"]
    return runs
