"""An exported run, verified: one folder in which everything is signed, every file is named, and each digest leads to the next.

Needs no torch, no network and no workspace; all that is in the folder may be an attacker's. The keys come from somewhere else.
"""

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cbd.attest import MAX_BYTES, Statement, digests_in, unseal
from cbd.bundle import CARD
from cbd.chain import BOM, ON_DEMAND, check_chain, match, read_chain, steps_of
from cbd.config import canonical_json, description_digest
from cbd.decision import DECISION, SignedDecision, open_decision
from cbd.errors import DataError
from cbd.files import sha256_file
from cbd.keys import PublicKey
from cbd.log_slice import LOG_SLICE, check_slice, open_slice
from cbd.signed_model import check_model

MANIFEST = "manifest.json"
EXPORT = "urn:cbd:export:v1"
"""Predicate type of the manifest, whose subjects are all other files."""
MODEL, ATTESTATIONS, MEASUREMENTS, DATA = "model", "attestations", "measurements", "data"
"""Folders of the export; without a model the decision lies in `model` alone."""
REPORT = "report.html"
MEASURED = ("validation", "evaluation", "scan", "canary")
"""Files of measurements that a decision is made on, `<name>.json`."""
SETS = {"data": "dataset", "trusted": "trusted_set"}
"""Descriptions of the data sets by their name in a decision, `<name>.json`."""
MAX_FILES = 1000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")

Files = dict[str, str]
"""Path in the export, with slashes: SHA-256 (hex)."""


def verify_export(folder: Path, keys: Sequence[PublicKey]) -> dict[str, Any]:
    """What the export proves: run, verdict, digests, head of the log; after checking every byte in it.

    Args:
        folder: what `cbd audit export` wrote.
        keys: who may have signed; they must not come from the folder. A key that signed here before, and handed over to one of these,
            is believed, too.

    Raises:
        DataError: names the first file that is missing, too many, altered, of another run or not signed by a trusted key.
    """
    found = _list(folder)
    manifest = unseal(_read(folder, MANIFEST), keys, told=str(folder / MANIFEST))
    files = _manifest_files(manifest, folder)
    _check_files(folder, found, files)
    log = open_slice(_read(folder, LOG_SLICE), keys, told=str(folder / LOG_SLICE))
    place = folder / MODEL
    has_model = f"{MODEL}/{CARD}" in files
    signed = check_model(place, log.keys) if has_model else open_decision(place, log.keys)
    content = signed.content
    run_id, decided = (manifest["predicate"].get(name) for name in ("run_id", "decision_digest"))
    if (run_id, decided) != (content["run_id"], signed.digest):
        raise DataError(f"{folder / MANIFEST}: of run {run_id!r}, its decision is of {content['run_id']!r}; export the run again")
    if (content["digests"]["model"] is not None) != has_model:
        raise DataError(f"{place / CARD}: {'the decision is on no model' if has_model else 'missing'}; export the run again")
    _check_evidence(folder, files, signed)
    check_chain(read_chain(folder / ATTESTATIONS, signed, log.keys, bom=files.get(BOM)))
    told = {"run_id": run_id, "verdict": content["verdict"], "trial": content["trial"], "decided": content["created"]}
    told |= {"decision_digest": signed.digest, "model_digest": content["digests"]["model"], "data_digest": content["digests"]["data"]}
    told |= {"key_id": content["signed_by"]["key_id"], "development_key": content["signed_by"]["development"]}
    return told | check_slice(log, signed) | {"num_files": len(files) + 1}


def expected_files(digests: Mapping[str, Any]) -> set[str]:
    """All files of the export of a decision with these digests, but the manifest and the attestation of `ON_DEMAND`."""
    measured = {f"{MEASUREMENTS}/{name}.json" for name in MEASURED if digests[name] is not None}
    has_model = digests["model"] is not None
    model = {"decision.json", "decision.sig"} | ({"model.safetensors", "model.json", "model.sig"} if has_model else set())
    files = {f"{MODEL}/{name}" for name in model} | measured | {f"{DATA}/{name}.json" for name in SETS.values()}
    files |= {f"{ATTESTATIONS}/{name}.json" for name in steps_of(digests)} | {LOG_SLICE, REPORT}
    return files | ({BOM} if has_model else set())


def _list(folder: Path) -> dict[str, Path]:
    """All files under the folder by their path in it; raises DataError for a link, a special file or a name that cbd never writes."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give what `cbd audit export` wrote")
    found: dict[str, Path] = {}
    waiting = [folder]
    while waiting:
        inside = sorted(os.scandir(place := waiting.pop()), key=lambda entry: entry.name)
        for entry in inside:
            path, kind = Path(entry.path), entry.stat(follow_symlinks=False).st_mode
            name = path.relative_to(folder).as_posix()
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise DataError(f"{path}: a link or a special file; an export holds plain files only, get it again")
            if not _NAME.fullmatch(entry.name) or name.count("/") > 1 or len(found) >= MAX_FILES:
                raise DataError(f"{str(path)!r}: not part of an export; get it again")
            if stat.S_ISDIR(kind):
                waiting.append(path)
            else:
                found[name] = path
        if not inside:
            raise DataError(f"{place}: an empty folder, which no export has; get it again")
    return found


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file() or (size := path.stat().st_size) > MAX_BYTES:
        what = "missing" if not path.is_file() else f"{size} bytes, expected at most {MAX_BYTES}"
        raise DataError(f"{path}: {what}; get the export again")
    return path.read_bytes()


def _manifest_files(manifest: Statement, folder: Path) -> Files:
    subjects = digests_in(manifest["subject"])
    if manifest["predicateType"] != EXPORT or len(subjects) != len(manifest["subject"]):
        raise DataError(f"{folder / MANIFEST}: expected {EXPORT}, found {manifest['predicateType']!r}; get the export again")
    return subjects


def _check_files(folder: Path, found: Mapping[str, Path], files: Files) -> None:
    """Raises unless the folder holds exactly the manifest's files, each with its digest."""
    for name in sorted({*files, MANIFEST} ^ set(found)):
        what = f"not in {MANIFEST}" if name in found else "missing"
        raise DataError(f"{folder / name}: {what}; get the export again")
    for name, digest in sorted(files.items()):
        if (now := sha256_file(found[name])) != digest:
            raise DataError(f"{found[name]}: altered: SHA-256 is {now[:12]}, {MANIFEST} says {digest[:12]}; get the export again")


def _check_evidence(folder: Path, files: Files, signed: SignedDecision) -> None:
    """Raises unless what the decision was made on is there, byte for byte, and nothing else."""
    content, digests = signed.content, signed.content["digests"]
    for name in sorted(expected_files(digests) ^ (set(files) - {f"{ATTESTATIONS}/{ON_DEMAND}.json"})):
        what = "not part of the export of this decision" if name in files else f"not in {MANIFEST}"
        raise DataError(f"{folder / name}: {what}; export the run again")
    for name in MEASURED:
        if digests[name] is not None:
            measured = f"{MEASUREMENTS}/{name}.json"
            match(folder / measured, files[measured], digests[name])
    for name, file in SETS.items():
        path = folder / DATA / f"{file}.json"
        match(path, _description_digest(path), digests[name])
    match(folder / MODEL / DECISION, sha256(canonical_json(content["policy"])).hexdigest(), content["policy_sha256"], what="policy")


def _description_digest(path: Path) -> str | None:
    """The digest that a data set's description has and claims; None where the two differ."""
    try:
        values = json.loads(path.read_bytes())
        digest = description_digest(values)
    except (ValueError, RecursionError, AttributeError):
        return None
    return digest if values.get("digest") == digest else None
