"""Who may stand behind an alias, by the signed log alone: it was put there by `register` or `rollback`, or taken away by `demote`.

MLflow keeps no history of its aliases and lets anyone move them; the log is what counts.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.errors import DataError
from cbd.heads import read_log

EVENTS = ("register", "rollback", "demote")
Move = dict[str, Any]
"""Data of one of the events: `event`, `name`, `alias` (None: registered without one), `version`, and what each event adds."""


def read_moves(workspace: Path, name: str | None = None) -> list[Move]:
    """All events about registered models, oldest first, or those about one; no log, no events.

    Raises:
        DataError: the log was altered.
    """
    moves = [{**entry["data"], "event": entry["event"]} for entry in read_log(workspace) if entry["event"] in EVENTS]
    return [move for move in moves if name in (None, move["name"])]


def holder(moves: Sequence[Move], alias: str) -> str | None:
    """The version of one model that `alias` must point to; None if it must not be there."""
    current = None
    for move in moves:
        if move["alias"] == alias and move["event"] != "demote":
            current = str(move.get("version"))
        elif move["alias"] == alias and move["version"] == current:
            current = None
    return current


def withdrawn(moves: Sequence[Move], version: str) -> Move | None:
    """The demotion of this version of one model, or the rollback from it that was not taken back; None: its verdict stands."""
    found = None
    for move in moves:
        if move["event"] == "demote" and move["version"] == version:
            return move
        if move["event"] == "rollback" and version in (move["from"], move["version"]):
            found = move if move["from"] == version else None
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
