"""The verdict, signed: what was measured on which bytes, under which policy, and what follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp.dsl import Artifact, Input, Output

from cbd.audit import now
from cbd.bundle import bundle_digest, read_card
from cbd.config import Gate, check_section, section_digest
from cbd.dataset import DatasetInfo, read_info, verify_dataset
from cbd.decision import SCHEMA_VERSION
from cbd.errors import DataError
from cbd.files import sha256_file
from cbd.gate import decide as judge
from components.anchors import close_log
from components.attempts import number_attempt
from components.attestation import attest_decision, write_bom
from components.canary import CANARY, logged
from components.decision import find_file, read_object, write_decision
from components.records import kfp_component, step
from components.scan import SCAN


@dataclass(frozen=True, slots=True)
class Subject:
    """What is decided on: folders of artifacts. Without evaluation and model, validation stopped the run."""

    dataset: Path
    trusted_set: Path
    validation: Path
    evaluation: Path | None = None
    model: Path | None = None
    canary: Path | None = None
    scan: Path | None = None


def decide(subject: Subject, out: Path, *, policy: Gate, workspace: Path, run_id: str) -> dict[str, Any]:
    """Writes the signed decision into the folder `out` and its digest into the workspace's log; returns what it says.

    Raises:
        DataError: the measurements are malformed, or are not about these artifacts.
        EnvironmentFault: the workspace is not writable.
    """
    decision = weigh(subject, policy=policy, workspace=workspace, run_id=run_id)
    digest = write_decision(decision, out, workspace, bundle=subject.model)
    return {"verdict": decision["verdict"], "sentence": decision["sentence"], "decision_digest": digest, "trial": decision["trial"]}


def weigh(subject: Subject, *, policy: Gate, workspace: Path, run_id: str, attempt: dict[str, Any] | None = None) -> dict[str, Any]:
    """The decision, not signed yet, after checking that all measurements are about exactly these artifacts.

    `attempt` is that of the run's own decision, where it is judged again; by default it is counted from the workspace's log.

    Raises:
        DataError: they are malformed, or about others.
    """
    check = verify_dataset if subject.evaluation else read_info
    info, trusted = check(subject.dataset), check(subject.trusted_set)
    validation = read_object(subject.validation, "validation.json")
    evaluation = read_object(subject.evaluation, "evaluation.json") if subject.evaluation else None
    canary = _canary(subject, workspace)
    digests = {
        "data": info.digest,
        "trusted": trusted.digest,
        "model": bundle_digest(subject.model) if subject.model else None,
        "validation": sha256_file(find_file(subject.validation, "validation.json")),
        "evaluation": sha256_file(find_file(subject.evaluation, "evaluation.json")) if subject.evaluation else None,
        "canary": sha256_file(find_file(subject.canary, CANARY)) if subject.canary and canary else None,
        "scan": sha256_file(find_file(subject.scan, SCAN)) if subject.scan else None,
    }
    trial = info.trial
    _check_validation(validation, digests)
    if evaluation is not None:
        trial = _check_subject(evaluation, subject, info, digests) or trial
    scan = read_object(subject.scan, SCAN) if subject.scan else None
    if scan is not None:
        _check_about(scan, ("model", "trusted"), digests, told="scan.json: scanned", fix="scan the model again")
    if canary is not None:
        _check_about(canary, ("trusted",), digests, told=f"{CANARY}: measured", fix="run the pipeline again")
    attempt = attempt or _attempt(subject, digests, policy, workspace)
    judgement = judge(evaluation, validation, policy=policy, trial=trial, canary=canary, scan=scan, attempt=attempt["number"])
    about = {"schema_version": SCHEMA_VERSION, "run_id": run_id, "created": now("seconds")}
    decision = {**about, **judgement, "trial": trial, "digests": digests}
    return decision | {"policy": policy.model_dump(mode="json"), "policy_sha256": section_digest(policy), "attempt": attempt}


def _check_about(content: dict[str, Any], names: Sequence[str], digests: dict[str, str | None], *, told: str, fix: str) -> None:
    """Raises if the content of a file is about other artifacts than these; `told` names the file and what it did to them."""
    for name in names:
        found = str(content.get(f"{name}_digest"))
        if found != digests[name]:
            what = name if name == "model" else f"{name} set"
            raise DataError(f"{told} {what} {found[:12]!r}, found {str(digests[name])[:12]!r}; {fix}")


def _attempt(subject: Subject, digests: dict[str, str | None], policy: Gate, workspace: Path) -> dict[str, Any]:
    if subject.model is None:
        return {"number": 1, "config_sha256": None}
    return number_attempt(workspace, subject.model, digests, policy)


def _canary(subject: Subject, workspace: Path) -> dict[str, Any] | None:
    """The canary's result, after checking that this workspace made it; None where none was trained."""
    if subject.canary is None or not (subject.canary / CANARY).is_file():
        return None
    found = sha256_file(find_file(subject.canary, CANARY))
    if not logged(workspace, found):
        raise DataError(f"{subject.canary}: {CANARY} {found[:12]} is not in the log of {workspace}: it was altered; run the pipeline again")
    return read_object(subject.canary, CANARY)


def _check_validation(validation: dict[str, Any], digests: dict[str, str | None]) -> None:
    """Raises if what passed validation was something else; a refusal counts whatever it was about."""
    if validation.get("passed") is True:
        _check_about(validation, ("data", "trusted"), digests, told="validation.json: validated", fix="validate this data set")


def _check_subject(evaluation: dict[str, Any], subject: Subject, info: DatasetInfo, digests: dict[str, str | None]) -> bool:
    """Whether the model is a trial's, after checking that the evaluation is about exactly these artifacts."""
    if subject.model is None:
        raise DataError("an evaluation without the model that it measured; give both")
    card = read_card(subject.model)
    if card.kind == "confounder":
        raise DataError(f"{subject.model}: a confounder is never decided on; give the deconfounded model")
    _check_about(evaluation, ("model", "data", "trusted"), digests, told="evaluation.json: measured", fix="evaluate the model again")
    if card.data_digest != info.digest:
        raise DataError(f"{subject.model}: trained on data {card.data_digest[:12]}, found {info.digest[:12]}; train on this data set")
    if list(card.class_names) != evaluation.get("class_names"):
        raise DataError("evaluation.json: class_names are not the model's; evaluate the model again")
    return card.trial


@kfp_component
def decide_step(
    records: str,
    workspace: str,
    run_id: str,
    policy: dict,
    dataset: Input[Artifact],
    trusted_set: Input[Artifact],
    validation: Input[Artifact],
    evaluation: Input[Artifact],
    model: Input[Artifact],
    canary: Input[Artifact],
    scanned: Input[Artifact],
    decision: Output[Artifact],
) -> str:
    """The verdict on the measurements: PASS, REVIEW, BLOCK, INCONCLUSIVE or INVALID.

    Args:
        records: folder of the steps' records.
        workspace: folder of the key and the log.
        run_id: the run whose decision it is.
        policy: section `gate` of params.yaml.
        dataset: the data set that was trained on.
        trusted_set: the trusted set that was measured on.
        validation: the validation result.
        evaluation: the measurements.
        model: the deconfounded model's bundle.
        canary: what stage 1 saw of the canary.
        scanned: what was found of unknown triggers.
        decision: the signed decision.
    """
    from components.decide import decide_recorded

    parts = (dataset.path, trusted_set.path, validation.path, evaluation.path, model.path, canary.path, scanned.path)
    return decide_recorded(records, parts, decision.path, policy=policy, workspace=workspace, run_id=run_id)


@kfp_component
def refuse_step(
    records: str,
    workspace: str,
    run_id: str,
    policy: dict,
    dataset: Input[Artifact],
    trusted_set: Input[Artifact],
    validation: Input[Artifact],
    decision: Output[Artifact],
) -> str:
    """The verdict where validation stopped the run: a signed BLOCK, without training.

    Args:
        records: folder of the steps' records.
        workspace: folder of the key and the log.
        run_id: the run whose decision it is.
        policy: section `gate` of params.yaml.
        dataset: the data set that failed validation.
        trusted_set: the trusted set.
        validation: the validation result.
        decision: the signed decision.
    """
    from components.decide import decide_recorded

    parts = (dataset.path, trusted_set.path, validation.path)
    return decide_recorded(records, parts, decision.path, policy=policy, workspace=workspace, run_id=run_id)


def decide_recorded(records: str, parts: tuple[str, ...], out: str, *, policy: dict[str, Any], workspace: str, run_id: str) -> str:
    """The verdict alone, after `decide` with the step recorded; `parts` are the paths of a `Subject` in its order."""
    with step(records, "decide") as outputs:
        checked = check_section(Gate, policy, name="gate")
        subject = Subject(*(Path(part) for part in parts))
        outputs |= decide(subject, Path(out), policy=checked, workspace=Path(workspace), run_id=run_id)
        close_log(Path(workspace))
        outputs["paths"] = {"decision": out}
        if subject.model and subject.evaluation:
            sets = {"dataset": subject.dataset, "trusted_set": subject.trusted_set}
            write_bom(Path(out), bundle=subject.model, evaluation=subject.evaluation, **sets)
        outputs["attestation"] = attest_decision(records, Path(out), workspace=workspace)
    return str(outputs["verdict"])
