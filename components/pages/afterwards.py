"""What became of the run's verdict and model since: what the workspace's signed log says of them."""

from collections.abc import Callable
from typing import Any

from cbd.decision import REJUDGES
from cbd.errors import DataError
from cbd.heads import read_log
from cbd.log_store import LOG, open_log
from components.pages import View, absent
from components.pages.text import clip
from components.standing import EVENTS
from components.summary import Run

Told = dict[str, Any]
"""The data of one entry of the log."""


def afterwards(run: Run) -> View:
    """One row per event, oldest first: when, what, and the verdict in it if there is one; None without a workspace to look it up in."""
    if run.workspace is None:
        return {"rows": None}
    decided = run.outputs("decide").get("decision_digest")
    if decided is None:
        raise absent(run, "decide", "decision")
    if not open_log(run.workspace).exists():
        raise DataError(f"the workspace has no {LOG}")
    registered, rows, leads = run.outputs("register"), [], False
    for entry in read_log(run.workspace):
        event, told = entry["event"], entry["data"]
        own = decided in (told.get("decision_digest"), told.get(REJUDGES))
        displaced = leads and _moves_champion(event, told, registered) and str(told["version"]) != str(registered.get("version"))
        if event in SAID and (own or displaced):
            said = SAID[event](told) if own else _displaced(told)
            verdict = None if event == "demote" else told.get("verdict")
            when, style = entry["time"][:16].replace("T", " "), str(verdict or "none").lower()
            rows.append({"time": when, "said": clip(said, 600), "verdict": verdict, "style": style})
        if _moves_champion(event, told, registered):
            leads = event != "demote" and str(told["version"]) == str(registered.get("version"))
    return {"rows": rows}


def _moves_champion(event: str, told: Told, registered: Told) -> bool:
    """Whether the event puts a version of the run's model behind the alias `champion`, or takes it away."""
    return event in EVENTS and (told.get("name"), told.get("alias")) == (registered.get("name"), "champion")


def _registered(told: Told) -> str:
    return f"Registered as version {told['version']} of {told['name']}, {told['alias'] or 'without an alias'}."


def _rejudged(told: Told) -> str:
    return f"Judged again under the policy {str(told['policy_sha256'])[:12]}, without a new measurement."


def _retested(told: Told) -> str:
    return f"Measured again as {told['alias']}. {told['sentence']}"


def _demoted(told: Told) -> str:
    return f"Lost the alias {told['alias']}. {told['reason']}"


def _rolled_back(told: Told) -> str:
    return f"Champion again, by {told['by']}: {told['reason']}"


def _overridden(told: Told) -> str:
    return f"Champion until {str(told['expires'])[:16].replace('T', ' ')} all the same, by {told['by']}: {told['reason']}"


def _displaced(told: Told) -> str:
    why = f", by {told['by']}: {told['reason']}" if "reason" in told else "."
    return f"No longer champion: version {told['version']} took its place{why}"


SAID: dict[str, Callable[[Told], str]] = {
    "register": _registered,
    "rejudged": _rejudged,
    "retest": _retested,
    "demote": _demoted,
    "rollback": _rolled_back,
    "override": _overridden,
}
"""Events of the log that are about a verdict or its model, each with what the page says of it."""
