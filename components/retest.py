"""Every promoted model, measured and judged again with today's code and policy; one that would no longer pass can lose its alias."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from cbd.audit import append
from cbd.config import Gate, section_digest
from cbd.decision import SignedDecision
from cbd.errors import DataError
from cbd.files import replacing, sha256_file
from cbd.gate import VERDICTS, judge_again
from cbd.signed_model import DEMANDED
from components.anchors import close_log
from components.controls import find_controls
from components.decision import read_decision, read_object
from components.evaluate import EVALUATION, Compared, evaluate
from components.places import TRUSTED
from components.registry import fetch, find
from components.scan import SCAN, scan
from components.standing import Move, demanded, holder, read_moves
from components.tracking import check_reachable, drop_alias, fetch_model, find_aliases

Row = dict[str, Any]


def retest(workspace: Path, *, policy: Gate, seed: int, demote: bool) -> list[Row]:
    """One row per alias `champion` and `candidate`: the verdict then and now, whether it still passes, and whether it was demoted.

    A champion is judged by itself, as a first one is; a candidate beside the champion. What cannot be judged (the model, its decision or
    its trusted set is missing or altered) does not pass, but keeps its alias: a fault of the storage takes no good model out of service,
    and an altered one is not given out.

    Args:
        workspace: with the log, the registered models and the data registry.
        policy: what they are judged by.
        seed: of the harmless triggers.
        demote: take the alias from those that were judged and would no longer get it, and one that was set by hand against the log.

    Raises:
        DataError: no model was ever registered here, or the log was altered.
        EnvironmentFault: MLflow is out of reach.
    """
    moves = read_moves(workspace)
    if not moves:
        raise DataError(f"{workspace}: no model was ever registered here; give the runs' workspace with --workspace")
    check_reachable(workspace)
    rows: list[Row] = []
    champions: dict[str, tuple[Path, str]] = {}
    for name, alias, version in _promoted(workspace, moves):
        row: Row = {"name": name, "version": version, "alias": alias, "verdict_then": None, "verdict": None, "passes": False}
        row |= {"demoted": False, "decision_digest": None, "digests": None}
        try:
            bundle = fetch_model(f"models:/{name}@{alias}", workspace)
            row |= _judge(bundle, read_decision(bundle, workspace), workspace, policy=policy, seed=seed, champion=champions.get(name))
            row["passes"] = VERDICTS.index(row["verdict"]) <= VERDICTS.index(_worst(moves, name, alias))
            if alias == "champion" and (row["passes"] or not demote):
                champions[name] = (bundle, version)
        except DataError as error:
            row["sentence"] = f"Not judged: {error}"
        _log(workspace, "retest", row, policy=policy.model_dump(mode="json"), policy_sha256=section_digest(policy))
        if demote and not row["passes"]:
            row["demoted"] = _demote(workspace, row)
        rows.append(row)
    return rows


def _worst(moves: list[Move], name: str, alias: str) -> str:
    """The worst verdict with which a version keeps its alias."""
    return demanded([move for move in moves if move["name"] == name], alias) or DEMANDED[alias]


def _promoted(workspace: Path, moves: list[Move]) -> list[tuple[str, str, str]]:
    """Name, alias and version of each alias that is in the log, or in MLflow on a model that the log knows, champions first."""
    found, names = [], sorted({move["name"] for move in moves})
    in_mlflow = find_aliases(workspace)
    for name in names:
        for alias in DEMANDED:
            told = holder([move for move in moves if move["name"] == name], alias)
            if version := in_mlflow.get((name, alias), told):
                found.append((name, alias, version))
    return found


def _judge(
    bundle: Path, signed: SignedDecision, workspace: Path, *, policy: Gate, seed: int, champion: tuple[Path, str] | None
) -> dict[str, Any]:
    """Today's verdict on a verified bundle, beside the clean controls of its configuration if the workspace has them.

    The measurements are kept in `retests/<first 12 of the model's digest>/<theirs>`.
    """
    digests = signed.content["digests"]
    with tempfile.TemporaryDirectory() as folder:
        stored = find(workspace, digests["trusted"], kind=TRUSTED)
        if stored is None:
            raise DataError(
                f"{workspace / 'registry'}: trusted set {digests['trusted'][:12]} is not in it; restore it, or: cbd data add --kind trusted"
            )
        fetch(stored.tag, Path(folder) / "trusted", workspace=workspace)
        place, trusted = Path(folder) / "evaluation", Path(folder) / "trusted"
        about = {"model": bundle, "trusted_set": trusted, "min_images": policy.min_images}
        controls = find_controls(workspace, Path(folder) / "controls", **about).bundles
        compared = Compared(champion=champion, controls=controls)
        evaluate(bundle, trusted, place, policy=policy, compared=compared, seed=seed)
        evaluation = read_object(place, EVALUATION)
        scan(bundle, None, trusted, place / "scan", policy=policy, seed=seed, controls=controls)
        scanned, measured = read_object(place / "scan", SCAN), sha256_file(place / EVALUATION)
        searched = sha256_file(place / "scan" / SCAN)
        with replacing(workspace / "retests" / digests["model"][:12] / measured[:12]) as temporary:
            shutil.copytree(place, temporary)
    judgement = judge_again(evaluation, scanned, signed.content["checks"], policy=policy)
    return {
        "verdict_then": signed.content["verdict"],
        "verdict": judgement["verdict"],
        "decision_digest": signed.digest,
        "digests": {"model": digests["model"], "trusted": digests["trusted"], "evaluation": measured, "scan": searched},
        "sentence": judgement["sentence"],
    }


def _demote(workspace: Path, row: Row) -> bool:
    """Whether the alias was taken away; the log says so first, so that a kill between leaves an alias that nobody is given a model by.

    Not taken away is what was not judged, and what another version has got meanwhile.
    """
    told = holder(read_moves(workspace, row["name"]), row["alias"])
    if told not in (None, row["version"]) or (told and row["verdict"] is None):
        return False
    if told:
        entry = {key: row[key] for key in ("name", "alias", "version", "verdict", "decision_digest")}
        append(workspace, "demote", {**entry, "reason": row["sentence"]})
        close_log(workspace)
    drop_alias(workspace, row["name"], row["alias"])
    return True


def _log(workspace: Path, event: str, row: Row, **more: Any) -> None:
    told = {key: value for key, value in row.items() if key not in ("passes", "demoted")}
    append(workspace, event, {**told, **more})
