"""A finished run judged again, from what it recorded, under another policy: nothing is trained, and no alias moves."""

from pathlib import Path
from typing import Any

from cbd.config import Gate
from cbd.decision import DECISION, REJUDGES, SIGNED_BY, SignedDecision
from cbd.errors import DataError
from components.decide import Subject, weigh
from components.decision import read_decision, write_decision


def rejudge(subject: Subject, decision: Path, out: Path, *, policy: Gate, workspace: Path, run_id: str) -> dict[str, Any]:
    """The verdict before and now, the checks that changed and the policy that changed them.

    The signed re-judgement goes to `out/<first 12 of the policy's digest>`; the same judgement is written and logged once.

    Args:
        subject: what the run recorded.
        decision: folder of the run's own decision.
        out: gets a folder per policy.
        policy: what it is judged by now.
        workspace: of the run, with the key and the log.
        run_id: the run's id, which its decision must name.

    Raises:
        DataError: the decision or anything that it was made on was altered or is another run's, or an earlier re-judgement was altered.
    """
    own = read_decision(decision, workspace)
    if own.content["run_id"] != run_id:
        raise DataError(f"{decision}: is the decision of run {own.content['run_id']!r}, expected {run_id!r}; restore the run's own")
    weighed = weigh(subject, policy=policy, workspace=workspace, run_id=run_id, attempt=own.content["attempt"]) | {REJUDGES: own.digest}
    _check_unaltered(own, weighed)
    place = out / str(weighed["policy_sha256"])[:12]
    digest = _written_before(place, weighed, workspace) or write_decision(weighed, place, workspace)
    return {
        "run_id": run_id,
        "verdict_then": own.content["verdict"],
        "verdict": weighed["verdict"],
        "sentence": weighed["sentence"],
        "changed_checks": _changed_checks(own.content["checks"], weighed["checks"]),
        "changed_policy": _changed_values(own.content["policy"], weighed["policy"]),
        "policy_sha256": weighed["policy_sha256"],
        "decision": str(place),
        "decision_digest": digest,
    }


def _check_unaltered(own: SignedDecision, weighed: dict[str, Any]) -> None:
    """Raises unless what is judged now is, byte for byte, what the run's own decision was made on."""
    for name, digest in own.content["digests"].items():
        found = weighed["digests"].get(name)
        if found != digest:
            told = f"expected {name} {str(digest)[:12]}, found {str(found)[:12]}"
            raise DataError(f"run {own.content['run_id']}: altered since its decision: {told}; restore the run folder")
    if weighed["trial"] != own.content["trial"]:
        raise DataError(f"run {own.content['run_id']}: whether it is a trial was altered since its decision; restore the run folder")


def _written_before(place: Path, weighed: dict[str, Any], workspace: Path) -> str | None:
    """Digest of the re-judgement in `place` if it says the same; None if there is none, or today's code says something else."""
    if not (place / DECISION).exists():
        return None
    try:
        stored = read_decision(place, workspace, rejudged=True)
    except DataError as error:
        raise DataError(f"an earlier re-judgement is in the way: {error}; or remove {place} and judge again") from None
    return stored.digest if stored.content == weighed | {name: stored.content[name] for name in ("created", SIGNED_BY)} else None


def _changed_checks(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every check with another result than then, in today's order; None where there was or is no such check."""
    before, after = ({(check["check"], check["name"]): check for check in checks} for checks in (then, now))
    changed = []
    for key in [*after, *(key for key in before if key not in after)]:
        was, new = before.get(key), after.get(key)
        results = [check and check["result"] for check in (was, new)]
        if results[0] != results[1]:
            about = new or was or {}
            changed.append({"check": key[0], "name": key[1], "then": results[0], "now": results[1], "sentence": about["sentence"]})
    return changed


def _changed_values(then: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return {key: {"then": then.get(key), "now": now.get(key)} for key in keys}
