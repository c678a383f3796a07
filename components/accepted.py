"""What was delivered before: the data set of the last accepted run, what people rejected or released, and which data sets were decided on.

A run trains on the union of all accepted deliveries. A delivery is accepted by the verdict on the model that was trained with it: PASS and
REVIEW accept it, anything else leaves it out. The signed audit log is what says so.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cbd.audit import LOG, load_public_key, verify_log
from cbd.dataset import DatasetInfo, read_batches, read_manifest
from cbd.errors import DataError
from components import quarantine
from components.rawfiles import RawFile
from components.registry import fetch, find


@dataclass(frozen=True)
class Earlier:
    """What a delivery is compared with; by default nothing."""

    folder: Path | None = None
    """The data set of the last accepted run."""
    info: DatasetInfo | None = None
    labels: dict[bytes, str] = field(default_factory=dict)
    """Class name by pixel digest of all its images but the rejected ones."""
    ids: dict[bytes, str] = field(default_factory=dict)
    """Sample id by pixel digest, of the same."""
    rejected: frozenset[bytes] = frozenset()
    """Pixel digests that people rejected."""
    released: list[RawFile] = field(default_factory=list)
    """Files that people released from the quarantine."""

    @property
    def num_rejected(self) -> int:
        """Images of the accepted data set that are left out from now on."""
        return (self.info.num_images if self.info else 0) - len(self.labels)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The images of the accepted data set, without the rejected ones."""
        if self.folder is None:
            return
        gone = pa.array(sorted(digest.hex() for digest in self.rejected), pa.string())
        for batch in read_batches(self.folder):
            yield batch.filter(pc.invert(pc.is_in(batch["pixel_digest"], gone))) if len(gone) else batch


def read_earlier(workspace: Path, name: str, out: Path) -> Earlier:
    """What this workspace knows; the accepted data set is fetched from the data registry to the folder `out`, and verified.

    Args:
        workspace: with the audit log, the data registry and the quarantine.
        name: the registered model's full name.
        out: gets the data set, if there is one.

    Raises:
        DataError: the log, the registry or the quarantine was altered.
    """
    ruled = quarantine.rulings(workspace)
    digests = (ruling.pixel_digest for ruling in ruled.values() if ruling.action == "reject")
    rejected = frozenset(bytes.fromhex(digest) for digest in digests if digest)
    released = quarantine.released(workspace)
    digest = _last_accepted(workspace, name)
    if digest is None:
        return Earlier(rejected=rejected, released=released)
    stored = find(workspace, digest)
    if stored is None:
        raise DataError(f"{workspace / 'registry'}: the accepted data set {digest[:12]} is not in it; restore the registry")
    info = fetch(stored.tag, out, workspace=workspace)
    manifest = read_manifest(out)
    rows = zip(*(manifest[column].to_pylist() for column in ("pixel_digest", "label", "sample_id")), strict=True)
    kept = [(bytes.fromhex(pixels), label, sample) for pixels, label, sample in rows if bytes.fromhex(pixels) not in rejected]
    labels = {pixels: info.class_names[label] for pixels, label, _ in kept}
    ids = {pixels: sample for pixels, _, sample in kept}
    back = set(ids.values())
    released = [file for file in released if hashlib.sha256(file.data or b"").hexdigest() not in back]
    return Earlier(out, info, labels, ids, rejected, released)


def decided(workspace: Path, name: str, *, data: str, trusted: str) -> dict[str, str] | None:
    """Run id and verdict of the last run of this model that ended with a decision on this data set and trusted set; None: none did."""
    found = None
    for run in _runs(workspace):
        same = run["digests"]["data"] == data and run["digests"]["trusted"] == trusted
        refused = run["digests"]["model"] is None
        if same and not run["trial"] and (refused or run["name"] == name):
            found = {"run_id": run["run_id"], "verdict": run["verdict"]}
    return found


def _last_accepted(workspace: Path, name: str) -> str | None:
    accepted = [run["digests"]["data"] for run in _runs(workspace) if run["name"] == name and run["alias"] and not run["trial"]]
    return accepted[-1] if accepted else None


def _runs(workspace: Path) -> list[dict[str, Any]]:
    """The decisions in the log, oldest first, each with the name and alias that its model was registered under; None where it was not."""
    if not (workspace / LOG).is_file():
        return []
    runs: list[dict[str, Any]] = []
    for entry in verify_log(workspace / LOG, key=load_public_key(workspace)):
        told = entry["data"]
        if entry["event"] == "decision":
            runs.append({**told, "name": None, "alias": None})
        elif entry["event"] == "register":
            for run in runs:
                if run["run_id"] == told["run_id"] and run["decision_digest"] == told["decision_digest"]:
                    run |= {"name": told["name"], "alias": told["alias"]}
    return runs
