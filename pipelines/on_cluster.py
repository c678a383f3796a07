"""The commands `submit` and `schedule`. Only declarations: what a command does is imported when it is called."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cbd.errors import ConfigError
from pipelines.options import as_json, load, params_options, tell

if TYPE_CHECKING:
    from pipelines.launch import Order
    from pipelines.submit import Cluster

ORDERED = ("data", "trusted", "name", "supplier", "limit", "baseline")
PLACED = ("image", "overlay", "namespace", "service_account")
namespace_option = click.option("--namespace", default="", help="Yours, on a server that serves several users.")


def order_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say what to run on and where."""
    options = (
        click.option("--data", help="Delivery: s3://bucket/prefix, or a path under /workspace.  [required]"),
        click.option("--trusted", help="Trusted set that does not come from the supplier, likewise.  [required]"),
        click.option("--name", default="model", show_default=True, help="Name of the registered model."),
        click.option("--supplier", default="unnamed", show_default=True, help="Who delivered the data."),
        click.option("--limit", type=click.IntRange(0), default=0, help="Take in at most so many images; 0: all."),
        click.option("--baseline", is_flag=True, help="Also train without defence on the same data."),
        click.option("--image", help="NAME@sha256:DIGEST of the image that runs the steps.  [required]"),
        click.option("--overlay", help="Kind of cluster: gke, eks or onprem; with its pool of GPU nodes, such as gke:POOL.  [required]"),
        click.option("--service-account", help="Kubernetes service account that runs the steps."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@order_options
@namespace_option
@click.option("--again", is_flag=True, help="Train although nothing is new since an earlier run.")
@click.option("--run-id", default="", help="Id of the run; one that is there already is followed.  [default: the time]")
@click.option("--no-wait", is_flag=True, help="Return when the server has taken the run.")
@params_options
@as_json
def submit(run_id: str, no_wait: bool, again: bool, as_json: bool, **options: Any) -> int:
    """One run on the Kubeflow Pipelines server at KF_PIPELINES_ENDPOINT, followed to its verdict."""
    from pipelines import console
    from pipelines.submit import submit as send

    order, cluster = _taken(options, again=again)
    result = send(order, load(**options), cluster, run_id=run_id, wait=not no_wait)
    if no_wait:
        return tell(result, as_json, f"cbd submit ... --run-id {result['run_id']}")
    return console.tell_result(result, as_json, following=f"look at {result['report']}")


@click.group(invoke_without_command=True)
@order_options
@namespace_option
@click.option("--cron", help="When: 5 fields, or 6 with seconds first, in the server's time zone.")
@click.option("--every", help="How often, such as 12h or 7d.")
@params_options
@as_json
@click.pass_context
def schedule(context: click.Context, cron: str | None, every: str | None, as_json: bool, **options: Any) -> int:
    """Runs that recur on the server, one at a time; the same command again changes nothing."""
    if context.invoked_subcommand:
        return 0
    from pipelines.schedule import schedule as apply

    order, cluster = _taken(options)
    return tell(apply(order, load(**options), cluster, cron=cron, every=every), as_json, "cbd schedule list")


@schedule.command("list")
@namespace_option
@as_json
def list_schedules(namespace: str, as_json: bool) -> int:
    """All schedules."""
    from pipelines.schedule import schedules

    return tell({"schedules": schedules(namespace)}, as_json, "cbd schedule pause NAME", table="schedules")


@schedule.command()
@click.argument("name")
@namespace_option
@as_json
def pause(name: str, namespace: str, as_json: bool) -> int:
    """Start no run of schedule NAME until it is resumed."""
    from pipelines import schedule as schedules

    return tell(schedules.pause(name, paused=True, namespace=namespace), as_json, f"cbd schedule resume {name}")


@schedule.command()
@click.argument("name")
@namespace_option
@as_json
def resume(name: str, namespace: str, as_json: bool) -> int:
    """Let schedule NAME go on."""
    from pipelines import schedule as schedules

    return tell(schedules.pause(name, paused=False, namespace=namespace), as_json, "cbd schedule list")


@schedule.command()
@click.argument("name")
@namespace_option
@as_json
def delete(name: str, namespace: str, as_json: bool) -> int:
    """Delete schedule NAME; its runs and what they left stay."""
    from pipelines import schedule as schedules

    return tell(schedules.delete(name, namespace=namespace), as_json, "cbd schedule list")


def _taken(options: dict[str, Any], **more: Any) -> "tuple[Order, Cluster]":
    """What to run on and where, taken out of the options; raises ConfigError where something is missing."""
    from pipelines.launch import Order
    from pipelines.submit import WORKSPACE, Cluster

    for option in ("data", "trusted", "image", "overlay"):
        if not options[option]:
            raise ConfigError(f"--{option} is missing; see --help")
    ordered, placed = ({name: options.pop(name) for name in names} for names in (ORDERED, PLACED))
    return Order(workspace=Path(WORKSPACE), **ordered, **more), Cluster(**placed)


COMMANDS = (submit, schedule)
