"""What the steps attest: one signed statement per step in `attestations/` beside the run's records."""

import functools
import importlib.metadata
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from cbd import attest
from cbd.audit import now
from cbd.bundle import bundle_digest, read_card
from cbd.chain import BOM
from cbd.config import Gate, Validation, canonical_json, check_section, section_digest
from cbd.dataset import read_info
from cbd.decision import DECISION
from cbd.errors import EnvironmentFault
from cbd.files import replacing, sha256_file
from cbd.gate.known import check_triggers
from cbd.gate.unknown import check_unknown
from cbd.keys import ensure_key
from cbd.measurements import read_evaluation
from cbd.scan_record import read_scan
from components.bom import bill
from components.decision import read_decision, read_object
from components.git import commit_of

ATTESTATIONS = "attestations"
IMAGE = "CBD_IMAGE"
"""Where a cluster tells each step the image that runs it, NAME@sha256:DIGEST; unset on this machine."""
_ROOT = Path(__file__).resolve().parent.parent


def attest_version(records: str, dataset: Path, trusted_set: Path, *, revision: str, workspace: str) -> str:
    """The digest of the attestation that these data sets were committed to the data registry as `revision`."""
    subjects = {"dataset": read_info(dataset).digest, "trusted set": read_info(trusted_set).digest}
    return _attest_made(records, "version", workspace, subjects, {"data registry": revision}, {"supplier": read_info(dataset).supplier})


def attest_validation(
    records: str, result: Path, *, dataset: Path, trusted_set: Path, limits: Validation, suite: str, workspace: str
) -> str:
    """The digest of the attestation that the data set was validated by the suite of this digest; the result is in the file `result`."""
    told = read_object(result, result.name)["checks"]
    named = [f"{check['name']} ({check['column']})" if check["column"] else check["name"] for check in told]
    results = ["PASS" if check["success"] else "BLOCK" if check["severity"] == "critical" else "REVIEW" for check in told]
    checks = [{"name": name, "result": found} for name, found in zip(named, results, strict=True)]
    configuration = made_with() | {"limits": section_digest(limits), "suite": suite, "trusted set": read_info(trusted_set).digest}
    subjects = {"dataset": read_info(dataset).digest, result.name: sha256_file(result)}
    statement = attest.test_result("validate", subjects=subjects, configuration=configuration, checks=checks, **_about(records))
    return _write(records, "validate", workspace, statement)


def attest_canary(records: str, result: Path, *, parameters: Mapping[str, Any], workspace: str) -> str:
    """The digest of the attestation that the canary's models were trained and measured, by this run or an earlier one, as `result` says."""
    told = read_object(result, result.name)
    materials = {"dataset": told.get("data_digest"), "canary": told.get("canary_digest"), "trusted set": told["trusted_digest"]}
    about = {**parameters, "config_sha256": told["config_sha256"], "trained_by": told.get("run_id", "")}
    return _attest_made(records, "canary", workspace, {result.name: sha256_file(result)}, materials, about)


def attest_training(records: str, step: str, bundle: Path, *, workspace: str, confounder: Path | None = None) -> str:
    """The digest of the attestation that this bundle was trained as its card says, with the help of `confounder`."""
    card = read_card(bundle)
    materials = {"dataset": card.data_digest, "confounder": bundle_digest(confounder) if confounder else None}
    return _attest_made(records, step, workspace, {"model": bundle_digest(bundle)}, materials, {"seed": card.seed, **card.params})


def attest_evaluation(records: str, result: Path, *, model: Path, trusted_set: Path, policy: dict[str, Any], workspace: str) -> str:
    """The digest of the attestation that the model's evaluation on the trusted set is in the file `result`.

    Its tests are the gate's on the known triggers, at the policy's own confidence, whatever attempt the run turns out to be.
    """
    checked = check_section(Gate, policy, name="gate")
    checks = check_triggers(read_evaluation(read_object(result, result.name)), checked)
    return _attest_measured(records, "evaluate", result, (model, trusted_set), checked, checks, workspace)


def attest_scan(records: str, result: Path, *, model: Path, trusted_set: Path, policy: dict[str, Any], workspace: str) -> str:
    """The digest of the attestation that what was found of unknown triggers is in the file `result`; its tests are the gate's on them."""
    checked = check_section(Gate, policy, name="gate")
    checks = check_unknown(read_scan(read_object(result, result.name)), checked)
    return _attest_measured(records, "scan", result, (model, trusted_set), checked, checks, workspace)


def attest_decision(records: str, decision: Path, *, workspace: str) -> str:
    """The digest of the attestation of the verdict, which names all attestations of the run that were there, and the bill of materials."""
    signed = read_decision(decision, Path(workspace))
    content, digests = signed.content, signed.content["digests"]
    subjects = {DECISION: signed.digest, "dataset": digests["data"], "model": digests["model"]}
    if (decision / BOM).is_file():
        subjects[BOM] = sha256_file(decision / BOM)
    inputs = {path.name: sha256_file(path) for path in folder_of(records).glob("*.json") if path.stem != "decide"}
    about = {"run_id": content["run_id"], "created": content["created"], "version": importlib.metadata.version("cbd")}
    judged = {"verdict": content["verdict"], "policy_sha256": content["policy_sha256"]}
    return _write(records, "decide", workspace, attest.summary(subjects=subjects, inputs=inputs, **judged, **about))


def write_bom(decision: Path, *, bundle: Path, dataset: Path, trusted_set: Path, evaluation: Path) -> None:
    """Writes the model's bill of materials beside its decision, which it is about."""
    sets = {"dataset": read_info(dataset), "trusted set": read_info(trusted_set)}
    told = {"evaluation": read_object(evaluation, "evaluation.json"), "decision": read_object(decision, DECISION)}
    found = bill(read_card(bundle), sets, **told, made_with=made_with(), lock=_ROOT / "requirements.lock")
    with replacing(decision / BOM) as temporary:
        temporary.write_bytes(canonical_json(found))


def folder_of(records: str) -> Path:
    """Where the attestations of a run lie, one `<step>.json` each."""
    return Path(records).parent / ATTESTATIONS


@functools.cache
def made_with() -> dict[str, str | None]:
    """Digests of what runs here: git commit and sources of cbd, the locked packages, the image; None where there is none."""
    files = [path for name in ("cbd", "components", "pipelines") for path in _files(_ROOT / name)]
    sources = {str(path.relative_to(_ROOT)): sha256_file(path) for path in files}
    lock, image = _ROOT / "requirements.lock", re.fullmatch(r".+@sha256:([0-9a-f]{64})", os.environ.get(IMAGE, ""))
    return {
        "code": sha256(canonical_json(sources)).hexdigest(),
        "commit": _commit(),
        "requirements.lock": sha256_file(lock) if lock.is_file() else None,
        "image": image and image[1],
    }


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".py", ".j2", ".css"))


def _commit() -> str | None:
    """The commit of the working tree that this file lies in; None where it is installed."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        return commit_of(_ROOT)
    except EnvironmentFault:
        return None


def _attest_made(
    records: str, step: str, workspace: str, subjects: attest.Digests, materials: dict[str, str | None], parameters: Mapping[str, Any]
) -> str:
    about = {"parameters": parameters, **_about(records)}
    statement = attest.provenance(step, subjects=subjects, materials=materials | made_with(), **about)
    return _write(records, step, workspace, statement)


def _attest_measured(
    records: str, step: str, result: Path, measured: tuple[Path, Path], policy: Gate, checks: Sequence[Mapping[str, Any]], workspace: str
) -> str:
    model, trusted_set = measured
    configuration = made_with() | {"policy": section_digest(policy), "trusted set": read_info(trusted_set).digest}
    subjects = {"model": bundle_digest(model), result.name: sha256_file(result)}
    statement = attest.test_result(step, subjects=subjects, configuration=configuration, checks=checks, **_about(records))
    return _write(records, step, workspace, statement)


def _about(records: str) -> dict[str, str]:
    """Run id and time."""
    return {"run_id": Path(records).resolve().parent.name, "finished": now("seconds")}


def _write(records: str, step: str, workspace: str, statement: attest.Statement) -> str:
    """Writes the sealed statement and returns the digest of its envelope."""
    path, data = folder_of(records) / f"{step}.json", attest.seal(statement, ensure_key(Path(workspace)))
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return sha256(data).hexdigest()
