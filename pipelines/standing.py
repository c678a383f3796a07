"""The commands about models that were promoted. Only declarations: what a command does is imported when it is called."""

from pathlib import Path

import click

from pipelines.holding import by_option, reason_option
from pipelines.options import as_json, load, tell, workspace_option

SHOWN = ("name", "version", "alias", "verdict_then", "verdict", "demoted", "sentence")


@click.command()
@click.option("--demote", is_flag=True, help="Take the alias from every model that would no longer get it.")
@click.option("--params", "params_path", type=click.Path(path_type=Path), help="Parameter file with the policy, as of `cbd run`.")
@workspace_option
@as_json
def retest(demote: bool, params_path: Path | None, workspace: Path, as_json: bool) -> int:
    """Measure and judge every champion and candidate again, with today's code and policy.

    Exit code 0: all still pass; 11: one is BLOCK now; 10: one would not get its alias today, or could not be judged.
    """
    from components import retest as again
    from pipelines.progress import by_hand

    params = load(params_path=params_path, preset=None)
    with by_hand():
        rows = again.retest(workspace.resolve(), policy=params.gate, seed=params.seed, demote=demote)
    fallen = [row for row in rows if not row["passes"]]
    lost = any(row["demoted"] and row["alias"] == "champion" for row in fallen)
    following = "cbd retest --demote" if fallen else "cbd predict models:/NAME@champion --data IMAGES --out predictions.parquet"
    if any(row["demoted"] for row in fallen):
        following = f"cbd rollback {fallen[0]['name']} --reason WHY" if lost else "cbd run --data DELIVERY --trusted TRUSTED"
    shown = rows if as_json else [{name: "-" if row[name] is None else row[name] for name in SHOWN} for row in rows]
    tell({"models": shown}, as_json, following, table="models")
    return (11 if any(row["verdict"] == "BLOCK" for row in fallen) else 10) if fallen else 0


@click.command()
@click.argument("name")
@click.option("--to", "version", type=click.IntRange(1), help="Version to go back to.  [default: the champion before this one]")
@reason_option
@by_option
@workspace_option
@as_json
def rollback(name: str, version: int | None, reason: str, by: str, workspace: Path, as_json: bool) -> int:
    """Make an earlier version of model NAME champion again, if its signed decision still holds."""
    from components import rollback as back
    from pipelines.progress import printable

    given = {"reason": printable(reason), "by": printable(by)}
    outputs = back.rollback(name, workspace.resolve(), to=str(version) if version else None, **given)
    return tell(outputs, as_json, f"cbd predict models:/{outputs['name']}@champion --data IMAGES --out predictions.parquet")


COMMANDS = (retest, rollback)
