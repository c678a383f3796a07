"""The registry follows the signed decision, and nothing else: it is verified before anything is done."""

from pathlib import Path
from typing import Any

from kfp.dsl import Artifact, Input

from cbd.audit import append
from cbd.bundle import BundleCard, bundle_digest, read_card
from cbd.decision import SignedDecision
from cbd.errors import DataError
from cbd.files import locked
from components.accepted import last_accepted
from components.anchors import TAG, close_log, told
from components.decision import check_latest, read_decision
from components.records import kfp_component, step
from components.standing import holder, read_moves, withdrawn
from components.tracking import check_reachable, find_version, log_run, register_bundle, registered_name, set_alias
from components.train_deconfounded import EVIDENCE
from components.version import version_suspects

LOCK = ".register.lock"
BRANCHES = {"PASS": "promote", "REVIEW": "hold"}
"""Which branch of the pipeline a verdict demands; every other verdict demands `record`."""
ALIASES = {"PASS": "champion", "REVIEW": "candidate"}
"""Which alias a verdict sets; a trial sets none."""


def register(
    bundle: Path, decision: Path, *, branch: str, workspace: Path, name: str, run_id: str, revision: str = "", base: str | None = None
) -> dict[str, Any]:
    """Registers the model as its decision demands; the same model with the same decision stays one version.

    The log says so before the alias is set: if it is never set, `cbd rollback` or the same step sets it.

    Args:
        branch: the branch of the pipeline that calls: `promote`, `hold` or `record`.
        name: registered name before the digest of the class list.
        revision: the data registry's revision of the data set, for the record.
        base: digest of the accepted data set that this one was added to; None: it was added to none, and none is asked for.

    Raises:
        DataError: the decision is not signed by this workspace, not in its log, about another model or run, or demands another branch; or
            another delivery was accepted meanwhile, which would be lost.
        EnvironmentFault: MLflow is out of reach.
    """
    signed, card = read_decision(decision, workspace), read_card(bundle)
    model_digest = bundle_digest(bundle)
    _check_decision(signed, card, branch=branch, run_id=run_id, model_digest=model_digest)
    check_latest(signed, workspace)
    check_reachable(workspace)
    alias = None if signed.content["trial"] else ALIASES.get(signed.content["verdict"])
    full_name = registered_name(name, card.class_names)
    tags = {"cbd.model_digest": model_digest, "cbd.data_digest": card.data_digest, "cbd.revision": revision}
    tags |= {"cbd.verdict": signed.content["verdict"], "cbd.run_id": run_id, "cbd.decision_digest": signed.digest}
    with locked(workspace / LOCK):  # so that of two runs on one base the second sees that the first was accepted
        if alias and base is not None and (accepted := last_accepted(workspace, full_name)) not in (base, card.data_digest):
            raise DataError(
                f"another run was accepted meanwhile, or one demoted: this one was added to data set {base[:12] or 'none'}, "
                f"the accepted one is {accepted[:12] or 'none'}; run again"
            )
        version = find_version(workspace, full_name, tags)
        if version and alias and (fallen := withdrawn(read_moves(workspace, full_name), version)):
            raise DataError(
                f"{full_name} version {version}: lost its alias since by {fallen['event']} ({fallen['reason']:.200}); "
                "it does not come back by registering it again, train again"
            )
        version = version or register_bundle(bundle, decision, workspace=workspace, name=full_name, tags=tags)
        told = {"name": full_name, "version": version, "alias": alias, "model_digest": model_digest, "branch": branch}
        _log_once(workspace, {**told, "decision_digest": signed.digest, "run_id": run_id})
        if alias:
            set_alias(workspace, full_name, alias, version)
    return told


def _check_decision(signed: SignedDecision, card: BundleCard, *, branch: str, run_id: str, model_digest: str) -> None:
    """Raises unless the decision is about this model and run, and demands this branch."""
    content = signed.content
    demanded = BRANCHES.get(content["verdict"], "record")
    if card.kind == "confounder":
        raise DataError("a confounder holds the backdoor by design and is never registered; give the deconfounded model")
    if content["digests"]["model"] != model_digest:
        found = str(content["digests"]["model"])[:12]
        raise DataError(f"the decision is about model {found}, not about {model_digest[:12]}; give the decision on this model")
    if content["digests"]["data"] != card.data_digest:
        raise DataError("the decision is about other training data than the model's; decide again on this model")
    if card.trial and not content["trial"]:
        raise DataError("the model was trained on purposely poisoned data, the decision does not say so; decide again on this model")
    if content["run_id"] != run_id:
        raise DataError(f"the decision is of run {content['run_id']!r}, not of {run_id!r}; give this run's decision")
    if branch != demanded:
        raise DataError(f"the verdict {content['verdict']} demands the branch {demanded!r}, but {branch!r} ran; the pipeline was altered")


def _log_once(workspace: Path, told: dict[str, Any]) -> None:
    """Appends the event `register`, unless the log says the same and the alias, if any, stands there still."""
    moves = read_moves(workspace, told["name"])
    if {**told, "event": "register"} not in moves or (told["alias"] and holder(moves, told["alias"]) != told["version"]):
        append(workspace, "register", told)


@kfp_component
def register_step(
    records: str,
    branch: str,
    workspace: str,
    name: str,
    run_id: str,
    revision: str,
    base: str,
    model: Input[Artifact],
    decision: Input[Artifact],
    evidence: Input[Artifact],
):
    """Registers the model as its signed decision demands.

    Args:
        records: folder of the steps' records.
        branch: promote, hold or record: the branch that runs this step.
        workspace: folder of the key, the log and the tracking store.
        name: registered name before the digest of the class list.
        run_id: the run whose decision it is.
        revision: the data registry's revision of the data set.
        base: digest of the accepted data set that it was added to, or `none`.
        model: the deconfounded model's bundle.
        decision: the signed decision.
        evidence: the evidence table, kept with the tracking run.
    """
    from components.register import register_recorded

    parts = (model.path, decision.path, evidence.path)
    about = {"name": name, "run_id": run_id, "revision": revision, "base": "" if base == "none" else base}
    register_recorded(records, parts, branch=branch, workspace=workspace, **about)


def register_recorded(
    records: str, parts: tuple[str, str, str], *, branch: str, workspace: str, name: str, run_id: str, revision: str, base: str
) -> None:
    """`register` with the step recorded; `parts` are the paths of bundle, decision and evidence."""
    bundle, decision, evidence = (Path(part) for part in parts)
    with step(records, "register") as outputs:
        place = Path(workspace)
        about = {"name": name, "run_id": run_id, "revision": revision, "base": base}
        outputs |= register(bundle, decision, branch=branch, workspace=place, **about)
        content = read_decision(decision, place).content
        checks = {check["name"]: check["value"] for check in content["checks"] if check["value"] is not None}
        tags = {"cbd.verdict": content["verdict"], "cbd.revision": revision, "cbd.data_digest": content["digests"]["data"]}
        tags[TAG] = told(close_log(place))
        log_run(place, run_id, metrics=checks, tags=tags, artifacts=[decision, evidence])
        listed = {"data_digest": content["digests"]["data"], "model_digest": content["digests"]["model"], "run_id": run_id}
        outputs["suspects_tag"] = version_suspects(evidence / EVIDENCE, workspace=workspace, **listed)["tag"]
