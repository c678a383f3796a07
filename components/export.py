"""A run's evidence in one folder, signed, for whoever has the workspace's public key and nothing else."""

import shutil
from pathlib import Path
from typing import Any

from cbd.attest import STATEMENT, resources, seal
from cbd.bundle import CARD, WEIGHTS
from cbd.chain import BOM, ON_DEMAND
from cbd.decision import DECISION, SIGNATURE, SignedDecision
from cbd.errors import DataError, naming
from cbd.exported import ATTESTATIONS, DATA, EXPORT, MANIFEST, REPORT, expected_files, verify_export
from cbd.files import replacing, sha256_file
from cbd.heads import walk
from cbd.keys import ensure_key, load_public_key
from cbd.log_slice import LOG_SLICE, make_slice
from cbd.model_signature import MODEL_SIGNATURE
from components.anchors import close_log
from components.attestation import folder_of
from components.decision import read_decision
from components.run_checks import SUBJECTS
from components.summary import Run, read_run

_DECIDED = (DECISION, SIGNATURE, MODEL_SIGNATURE, BOM)
"""Files of the artifact `decide/decision`."""


def export_run(run_dir: Path, workspace: Path, out: Path) -> dict[str, Any]:
    """What the export in the folder `out` proves (see `cbd.exported.verify_export`), which was verified before it stands there.

    Closes the log with a new head, so that the slice is up to date.

    Raises:
        DataError: the run has no decision of this workspace, something is missing, or was altered since.
        EnvironmentFault: `out` cannot be written.
    """
    run = read_run(str(run_dir / "records"))
    decision = run.path("decide", "decision")
    if decision is None:
        raise DataError(f"{run_dir}: was not decided on, there is nothing to prove; see {run_dir / REPORT}")
    signed = read_decision(decision, workspace)
    names = expected_files(signed.content["digests"]) - {LOG_SLICE}
    if (folder_of(str(run_dir / "records")) / f"{ON_DEMAND}.json").is_file():
        names.add(f"{ATTESTATIONS}/{ON_DEMAND}.json")
    sources = {name: _source(run, run_dir, name) for name in sorted(names)}
    head = close_log(workspace)
    lines = [line for line in walk(workspace) if line.entry["seq"] <= head["size"]]
    with replacing(out) as temporary:
        for name, source in sources.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, temporary / name)
        (temporary / LOG_SLICE).write_bytes(make_slice(((line.entry, line.leaf) for line in lines), head, signed))
        write_manifest(temporary, signed, workspace)
        with naming({temporary: f"run {signed.content['run_id']} does not hold: {out}"}):
            return verify_export(temporary, [load_public_key(workspace)])


def write_manifest(folder: Path, signed: SignedDecision, workspace: Path) -> None:
    """Writes `manifest.json`: an attestation whose subjects are all other files in the folder."""
    found = [path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST]
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}
    about = {"run_id": signed.content["run_id"], "decision_digest": signed.digest}
    statement = {"_type": STATEMENT, "subject": resources(files), "predicateType": EXPORT, "predicate": about}
    (folder / MANIFEST).write_bytes(seal(statement, ensure_key(workspace)))


def _source(run: Run, run_dir: Path, name: str) -> Path:
    """Where a file of the export lies in the run."""
    folder, _, file = name.rpartition("/")
    if name == REPORT:
        path: Path | None = run_dir / REPORT
    elif folder == ATTESTATIONS:
        path = folder_of(str(run_dir / "records")) / file
    elif folder == DATA:
        path = run.path("ingest", file.removesuffix(".json"), "dataset.json")
    else:
        subject = "model" if file in (WEIGHTS, CARD) else file.removesuffix(".json")
        step, _, artifact = ("decide/decision" if file in _DECIDED else SUBJECTS[subject][0]).partition("/")
        path = run.path(step, artifact, file)
    if path is None or not path.is_file():
        raise DataError(f"{run_dir}: {file} is missing there, it was removed or made by an older version; export a whole run")
    return path
