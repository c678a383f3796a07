"""Who may stand behind an alias, by the signed log alone: put there by `register`, `rollback` or `override`, taken away by `demote`.

MLflow keeps no history of its aliases and lets anyone move them; the log is what counts.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.audit import now
from cbd.errors import DataError
from cbd.heads import read_log
from cbd.signed_model import DEMANDED

EVENTS = ("register", "rollback", "override", "demote")
Move = dict[str, Any]
"""Data of one of the events: `event`, `name`, `alias` (None: registered without one), `version`, and what each event adds; `expired`: an
override that is over."""


def read_moves(workspace: Path, name: str | None = None) -> list[Move]:
    """All events about registered models, oldest first, or those about one; no log, no events.

    Raises:
        DataError: the log was altered.
    """
    entries = read_log(workspace)
    moves = [{**entry["data"], "event": entry["event"]} for entry in entries if entry["event"] in EVENTS]
    mark_expired(moves, last=entries[-1]["time"] if entries else "")
    return [move for move in moves if name in (None, move["name"])]


def mark_expired(moves: Sequence[Move], *, last: str) -> None:
    """Marks the overrides that are over now; `last` is the time of the log's last entry, behind which a clock set back does not go."""
    present = max(now(), last)
    for move in moves:
        if move["event"] == "override" and str(move["expires"]) <= present:
            move["expired"] = True


def holder(moves: Sequence[Move], alias: str) -> str | None:
    """The version of one model that `alias` must point to; None if it must not be there."""
    move = standing(moves, alias)
    return str(move.get("version")) if move else None


def standing(moves: Sequence[Move], alias: str) -> Move | None:
    """The event by which one model's version stands behind `alias`; None if none does.

    An expired override never does, and what was there before is again. Neither does a version that was demoted: what moves it afterwards,
    having looked at the log a moment too early, moves nothing.
    """
    current: Move | None = None
    demoted: set[str] = set()
    for move in moves:
        version = str(move.get("version"))
        if move["event"] == "demote":
            demoted.add(version)
        if move["alias"] != alias or move.get("expired"):
            continue
        if move["event"] == "demote" and current and version == str(current.get("version")):
            current = None
        elif version not in demoted:
            current = move
    return current


def lapsed(moves: Sequence[Move]) -> Move | None:
    """The override by which one model's champion stands although it is over; None if something else was decided since."""
    last = [move for move in moves if move["alias"] == "champion"][-1:]
    return last[0] if last and last[0].get("expired") else None


def demanded(moves: Sequence[Move], alias: str) -> str | None:
    """The worst verdict that the model behind `alias` may have."""
    move = standing(moves, alias)
    return "REVIEW" if move and move["event"] == "override" else DEMANDED.get(alias)


def withdrawn(moves: Sequence[Move], version: str) -> Move | None:
    """The demotion of this version of one model, or the rollback from it that was not taken back; None: its verdict stands."""
    found = None
    for move in moves:
        if move["event"] == "demote" and move["version"] == version:
            return move
        if move["event"] == "rollback" and version in (move["from"], move["version"]):
            found = move if move["from"] == version else None
        if move["event"] == "override" and move["version"] == version:
            found = None
    return found


def whole_name(name: str, moves: Sequence[Move]) -> str:
    """The registered model's full name, given that or what stands before the digest of its class list.

    Raises:
        DataError: no model is called that, or several are.
    """
    known = list(dict.fromkeys(str(move["name"]) for move in moves))
    if name in known:
        return name
    hits = [full for full in known if re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{8}}", full)]
    if len(hits) > 1:
        raise DataError(f"{name}: several models are called that, with other classes; name one of: {', '.join(hits)}")
    if not hits:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}; give its workspace with --workspace"
        raise DataError(f"{name}: no model of that name is registered here; {hint}")
    return hits[0]
