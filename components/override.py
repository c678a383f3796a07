"""A person lets a model that waits for review become champion, until a date: signed, logged, and over when it is over.

Only a REVIEW: what the gate blocks was shown to be backdoored or failed validation, and what is INVALID or INCONCLUSIVE was not measured.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cbd.audit import Entry, append, now, utc
from cbd.errors import ConfigError, DataError
from cbd.heads import read_log
from components.anchors import close_log
from components.decision import check_latest, read_decision
from components.standing import holder, read_moves, withdrawn
from components.tracking import check_reachable, fetch_model, set_alias

CHAMPION = "champion"
MAX_DAYS = 90
"""The longest that an override may last: then a person looks again."""


def override(run_id: str, workspace: Path, *, reason: str, by: str, expires: datetime) -> dict[str, Any]:
    """Which version is champion until when; the log says so first, then the alias is set.

    Args:
        run_id: the run whose model waits for review.
        workspace: with the log and the registered models.
        reason: why; it stands in the log.
        by: who decides.
        expires: from then on it counts no more; with a time zone.

    Raises:
        ConfigError: no reason is given, or a date that is not within the next 90 days.
        DataError: the run registered no model, its verdict is not REVIEW, it is a trial, was decided again since or was demoted.
        EnvironmentFault: MLflow is out of reach.
    """
    if not reason.strip():
        raise ConfigError("--reason: expected why, found nothing; it stands in the audit log")
    until = _until(expires, read_log(workspace))
    moves = read_moves(workspace)
    registered = [move for move in moves if move["event"] == "register" and move["run_id"] == run_id]
    if not registered:
        raise DataError(f"{run_id}: the log of {workspace} registered no model of this run; give a run whose verdict is REVIEW")
    name, version = str(registered[-1]["name"]), str(registered[-1]["version"])
    moves = [move for move in moves if move["name"] == name]
    signed = read_decision(fetch_model(f"models:/{name}/{version}", workspace), workspace)
    check_latest(signed, workspace)
    if signed.content["trial"] or signed.content["verdict"] != "REVIEW":
        what = "a trial" if signed.content["trial"] else signed.content["verdict"]
        raise DataError(f"{run_id}: its verdict is {what}, only a REVIEW can be overridden: nothing else is a person's to decide")
    if (fallen := withdrawn(moves, version)) and fallen["event"] == "demote":
        raise DataError(f"{name} version {version}: was demoted ({fallen['reason']:.200}); train again")
    check_reachable(workspace)
    told = {"name": name, "alias": CHAMPION, "version": version, "from": holder(moves, CHAMPION), "run_id": run_id}
    told |= {"decision_digest": signed.digest, "model_digest": signed.content["digests"]["model"], "expires": until}
    append(workspace, "override", {**told, "reason": reason, "by": by})
    close_log(workspace)
    if holder(moves := read_moves(workspace, name), CHAMPION) != version:
        if (fallen := withdrawn(moves, version)) and fallen["event"] == "demote":
            raise DataError(f"{name} version {version}: was demoted meanwhile ({fallen['reason']:.200}); train again")
        raise DataError(f"{name} version {version}: another one became {CHAMPION} meanwhile; look at it with: cbd audit show")
    set_alias(workspace, name, CHAMPION, version)
    return {**told, "reason": reason}


def _until(expires: datetime, entries: Sequence[Entry]) -> str:
    """The date as entries have it; raises ConfigError unless it lies ahead, also of the log's last line, and not too far."""
    until = utc(expires)
    latest = utc(datetime.now(UTC) + timedelta(days=MAX_DAYS))
    present = max([now(), *(entry["time"] for entry in entries[-1:])])
    if not present < until <= latest:
        raise ConfigError(f"--expires {until}: expected a date after {present} within the next {MAX_DAYS} days, such as {latest[:10]}")
    return until
