"""The champion becomes an earlier version again: one that was promoted by a signed PASS, and that nothing was found against since."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.audit import LOG, append
from cbd.decision import SignedDecision
from cbd.errors import ConfigError, DataError
from components.anchors import close_log
from components.decision import read_decision
from components.standing import Move, holder, lapsed, read_moves, whole_name, withdrawn
from components.tracking import check_reachable, fetch_model, find_aliases, set_alias

CHAMPION = "champion"


def rollback(name: str, workspace: Path, *, to: str | None, reason: str, by: str) -> dict[str, Any]:
    """Which version is champion from now on and which one was; told again, nothing moves and nothing is logged.

    The alias in MLflow is set right too where it is not what the log says.

    Args:
        name: of the registered model, with or without the digest of its class list.
        workspace: with the log and the registered models.
        to: the version; None takes the champion before this one.
        reason: why; it stands in the log.
        by: who decides.

    Raises:
        ConfigError: no reason is given.
        DataError: there is no such version, or it may not be champion: by what its signed decision says, or because it was demoted.
        EnvironmentFault: MLflow is out of reach.
    """
    if not reason.strip():
        raise ConfigError("--reason: expected why, found nothing; it stands in the audit log")
    moves = read_moves(workspace)
    full_name = whole_name(name, moves)
    moves = [move for move in moves if move["name"] == full_name]
    check_reachable(workspace)
    current, over = holder(moves, CHAMPION), lapsed(moves)
    version = to or (over and current) or _previous(moves, full_name)
    signed = _check_version(moves, full_name, version, workspace)
    told = {
        "name": full_name,
        "alias": CHAMPION,
        "version": version,
        "from": str(over["version"]) if over else current,
        "decision_digest": signed.digest,
    }
    if version != current or over:
        append(workspace, "rollback", {**told, "reason": reason, "by": by})
        close_log(workspace)
    if find_aliases(workspace).get((full_name, CHAMPION)) != version:
        set_alias(workspace, full_name, CHAMPION, version)
    return {**told, "moved": version != current or over is not None, "reason": reason}


def _previous(moves: Sequence[Move], name: str) -> str:
    """The champion before this one that nothing was found against; after a rollback, what it set: to go further back takes a version."""
    history = [move for move in moves if move["alias"] == CHAMPION]
    if history and history[-1]["event"] == "rollback":
        return str(history[-1]["version"])
    earlier = [version for version in _fit(moves) if version != holder(moves, CHAMPION)]
    if not earlier:
        raise DataError(f"{name}: expected an earlier champion to go back to, found none that may be one; run the pipeline for a new one")
    return earlier[-1]


def _fit(moves: Sequence[Move]) -> list[str]:
    """Versions that were set as champion and neither demoted nor rolled back from since, in that order."""
    champions = [str(move["version"]) for move in moves if move["alias"] == CHAMPION and move["event"] in ("register", "rollback")]
    return [version for version in champions if withdrawn(moves, version) is None]


def _check_version(moves: Sequence[Move], name: str, version: str, workspace: Path) -> SignedDecision:
    """The signed decision that makes this version fit to be champion; raises DataError if it does not, or anything was altered."""
    fallen = withdrawn(moves, version)
    if fallen and fallen["event"] == "demote":
        _refuse(moves, name, version, f"it was demoted: {fallen['reason']:.300}")
    bundle = fetch_model(f"models:/{name}/{version}", workspace)
    signed = read_decision(bundle, workspace)
    if signed.content["trial"]:
        _refuse(moves, name, version, "it is a trial, which never gets an alias")
    if signed.content["verdict"] != "PASS":
        _refuse(moves, name, version, f"its verdict is {signed.content['verdict']}, a champion needs PASS")
    if not any(move["event"] == "register" and str(move.get("version")) == version for move in moves):
        _refuse(moves, name, version, f"{LOG} never registered it: it was put into MLflow by hand")
    return signed


def _refuse(moves: Sequence[Move], name: str, version: str, why: str) -> None:
    others = list(dict.fromkeys(each for each in _fit(moves) if each != version))
    fix = f"name one of: {', '.join(others)}" if others else "no other version may, run the pipeline for a new one"
    raise DataError(f"{name} version {version}: cannot be champion: {why}; {fix}")
