"""Recurring runs on a Kubeflow Pipelines server: one at a time, none made up for, applied as often as one likes.

A schedule is the server's recurring run named `retrain-<model>`. Its description holds a digest of all that it was made from, so that
applying it again changes nothing. The server cannot change one, so another is made before the first is deleted: whatever fails
between, something is scheduled, and applying again leaves one.
"""

import contextlib
import hashlib
import re
from typing import TYPE_CHECKING, Any

from cbd.config import Params, canonical_json
from cbd.errors import ConfigError
from pipelines.kubeflow import Missing, asked, connect, created, experiment_of, listed, named
from pipelines.launch import Order
from pipelines.submit import WORKSPACE, Cluster, arguments, compiled, has_ended

if TYPE_CHECKING:
    from kfp import Client

MACRO = "[[ScheduledTime]]"
"""What the server replaces by the time for which a run was due, 14 digits in UTC: so each run has an id and a folder of its own."""
EVERY = re.compile(r"([1-9][0-9]{0,4})([mhd])")
SECONDS = {"m": 60, "h": 3600, "d": 86400}
CRON_FIELD = re.compile(r"[0-9A-Za-z*/,?#-]+")


def schedule(order: Order, params: Params, cluster: Cluster, *, cron: str | None = None, every: str | None = None) -> dict[str, Any]:
    """What became of the schedule: its `name`, `change` (created, replaced, unchanged), `when` and whether it is `paused`.

    A schedule that was paused stays so.

    Args:
        order: what each run is to be run on.
        params: of each run.
        cluster: where.
        cron: 5 fields, or 6 with seconds first, in the server's time zone.
        every: a number and m, h or d, such as 12h.

    Raises:
        ConfigError: refused at the door or by the server; or a run of the schedule that would be replaced is going on.
        EnvironmentFault: the server is out of reach.
    """
    trigger = _trigger(cron, every)
    name = f"retrain-{order.name}"
    given = arguments(order, params, name)
    given |= {"run_id": f"{name}-{MACRO}", "records": str(WORKSPACE / "runs" / f"{name}-{MACRO}" / "records")}
    with compiled(cluster, gpus=params.training.gpus) as package:
        about = [trigger, given, cluster.service_account, package.read_text()]
        mark = f"cbd schedule sha256:{hashlib.sha256(canonical_json(about)).hexdigest()}"
        client = connect(cluster.namespace)
        experiment = experiment_of(client, cluster.namespace)
        before = _find(client, experiment, name)
        kept = next((found for found in before if found.description == mark), None)
        paused = bool(before) and all(found.mode == "DISABLE" for found in before)
        stale = [found for found in before if found is not kept]
        _check_idle(client, experiment, stale)
        if kept is None:
            wanted = {"description": mark, "params": given, "enabled": not paused, "service_account": cluster.service_account, **trigger}
            kept = _create(client, experiment, name, wanted | {"pipeline_package_path": str(package)})
    _delete(client, stale)
    change = "replaced" if stale else "unchanged" if kept in before else "created"
    return {"name": name, "change": change, "when": cron or f"every {every}", "paused": kept.mode == "DISABLE"}


def schedules(namespace: str = "") -> list[dict[str, Any]]:
    """All schedules: name, when, whether paused, at most how many at a time, and whether missed ones are made up for."""
    client = connect(namespace)
    return [
        {
            "name": found.display_name,
            "when": _when(found.trigger),
            "paused": found.mode == "DISABLE",
            "at_a_time": int(found.max_concurrency or 0),
            "catches_up": not found.no_catchup,
        }
        for found in _listed(client, experiment_of(client, namespace))
    ]


def pause(name: str, *, paused: bool, namespace: str = "") -> dict[str, Any]:
    """Pauses a schedule or lets it go on; a run that is going on goes on. Raises ConfigError if there is none of this name."""
    client = connect(namespace)
    for found in _known(client, namespace, name):
        change = client.disable_recurring_run if paused else client.enable_recurring_run
        asked(lambda found=found, change=change: change(found.recurring_run_id))  # type: ignore[misc]
    return {"name": name, "paused": paused}


def delete(name: str, *, namespace: str = "") -> dict[str, Any]:
    """Deletes a schedule. Raises ConfigError if there is none of this name, or if a run of it is going on, which would be ended with it."""
    client = connect(namespace)
    found = _known(client, namespace, name)
    _check_idle(client, experiment_of(client, namespace), found)
    _delete(client, found)
    return {"name": name, "deleted": True}


def _trigger(cron: str | None, every: str | None) -> dict[str, Any]:
    """How the client is told when; raises ConfigError."""
    if (cron is None) == (every is None):
        raise ConfigError("expected --cron, such as '0 3 * * 1' (Mondays at 3), or --every, such as 12h, and not both")
    if every is not None:
        parts = EVERY.fullmatch(every)
        if not parts:
            raise ConfigError(f"--every {every!r}: expected a number and m, h or d, such as 90m, 12h or 7d")
        return {"interval_second": int(parts[1]) * SECONDS[parts[2]]}
    fields = (cron or "").split()
    if len(fields) not in (5, 6) or not all(CRON_FIELD.fullmatch(text) for text in fields):
        raise ConfigError(f"--cron {cron!r}: expected 5 fields (minute, hour, day, month, weekday), or 6 with seconds first")
    return {"cron_expression": " ".join(fields if len(fields) == 6 else ["0", *fields])}


def _create(client: "Client", experiment: str, name: str, wanted: dict[str, Any]) -> Any:
    return created(
        lambda: client.create_recurring_run(experiment, name, max_concurrency=1, no_catchup=True, **wanted),
        lambda: next((found for found in _find(client, experiment, name) if found.description == wanted["description"]), None),
    )


def _delete(client: "Client", stale: list[Any]) -> None:
    for found in stale:
        with contextlib.suppress(Missing):  # an earlier attempt may have done it, and its answer was lost
            asked(lambda found=found: client.delete_recurring_run(found.recurring_run_id))  # type: ignore[misc]


def _listed(client: "Client", experiment: str, name: str | None = None) -> list[Any]:
    """All recurring runs of the experiment."""
    about = {"experiment_id": experiment, "filter": named(name) if name else None}
    return list(listed(client.list_recurring_runs, "recurring_runs", **about))


def _find(client: "Client", experiment: str, name: str) -> list[Any]:
    return [found for found in _listed(client, experiment, name) if found.display_name == name]


def _known(client: "Client", namespace: str, name: str) -> list[Any]:
    experiment = experiment_of(client, namespace)
    found = _find(client, experiment, name)
    if not found:
        names = ", ".join(sorted({str(each.display_name) for each in _listed(client, experiment)}))
        raise ConfigError(f"{name}: no such schedule; there are: {names or 'none'}")
    return found


def _check_idle(client: "Client", experiment: str, stale: list[Any]) -> None:
    """Raises ConfigError while a run of one of these is going on: the server ends it together with what started it."""
    ids = {found.recurring_run_id for found in stale}
    if not ids:
        return
    for run in listed(client.list_runs, "runs", sort_by="created_at desc", experiment_id=experiment):
        if run.recurring_run_id in ids and not has_ended(run):
            raise ConfigError(f"{stale[0].display_name}: its run {run.display_name} is going on and would end; pause it, try again later")


def _when(trigger: Any) -> str:
    if trigger and trigger.cron_schedule:
        return str(trigger.cron_schedule.cron)
    return f"every {trigger.periodic_schedule.interval_second} s" if trigger and trigger.periodic_schedule else "-"
