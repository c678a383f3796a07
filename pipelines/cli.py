"""The command line `cbd`. Only declarations: what a command does is imported when it is called."""

import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from cbd.errors import CbdError, ConfigError
from cbd.files import disk_fault
from pipelines import auditing, by_hand, controls, exchange, holding, on_cluster, standing
from pipelines.local import share_cores
from pipelines.options import ATTACKS, MORE_ATTACKS, as_json, load, params_options, poison_options, tell, workspace_option
from pipelines.progress import printable

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="cbd")
def cbd() -> None:
    """Train image classifiers on data nobody vouches for: defended, measured, gated, with signed evidence.

    Exit codes: 0 PASS, 10 REVIEW, 11 BLOCK, 12 INCONCLUSIVE, 13 INVALID, 14 nothing new, 2 bad input or usage, 1 anything else.
    """


@cbd.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("cbd-demo"), show_default=True, help="Folder for the demo's runs.")
@click.option("--baseline", is_flag=True, help="Also train without defence on the same data.")
@click.option("--data-only", is_flag=True, help="Write the delivery, trusted set and truth into OUT, and stop.")
@click.option("--clean", is_flag=True, help="An honest supplier, no poison.")
@params_options
@as_json
def demo(out: Path, baseline: bool, data_only: bool, clean: bool, as_json: bool, **overrides: Any) -> int:
    """See it all on scanned digits that a supplier has poisoned."""
    from pipelines import console, demo

    if data_only:
        data = demo.write_demo_data(out, poisoned=not clean)
        print(f"next: cbd run --data {data.delivery} --trusted {data.trusted}")
        return 0
    chosen = {name: value for name, value in overrides.items() if value is not None}
    result = demo.run_demo(
        out, load(**{"params_path": None, "preset": None, **demo.TRAINING, **chosen}), baseline=baseline, poisoned=not clean
    )
    return console.tell_result(result, as_json, following="cbd run --data YOUR_CLASS_FOLDERS --trusted YOUR_TRUSTED_CLASS_FOLDERS")


@cbd.command()
@click.option("--data", help="Delivery: class folders, manifest, Parquet, tar, zip or WebDataset; local or s3://.  [required]")
@click.option("--trusted", help="Trusted set that does not come from the supplier.  [required]")
@workspace_option
@click.option("--name", default="model", show_default=True, help="Name of the registered model.")
@click.option("--supplier", default="unnamed", show_default=True, help="Who delivered the data.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Take in at most so many images; 0: all.")
@click.option("--truth", type=click.Path(), default="", help="Ground truth of a delivery poisoned on purpose, for measuring only.")
@click.option(
    "--poison", "poison__attack", type=click.Choice(ATTACKS + MORE_ATTACKS), help="Poison the taken-in copy: a trial, never promoted."
)
@poison_options
@click.option("--baseline", is_flag=True, help="Also train without defence on the same data.")
@click.option("--again", is_flag=True, help="Train although nothing is new since an earlier run.")
@params_options
@as_json
def run(data: str | None, trusted: str | None, workspace: Path, as_json: bool, **options: Any) -> int:
    """From a delivery to a verdict, a model and evidence."""
    from pipelines import console
    from pipelines.launch import Order, launch

    if not data:
        raise ConfigError("--data is missing: name the delivery: class folders of images, Parquet, or s3://bucket/prefix")
    if not trusted:
        raise ConfigError(
            "--trusted is missing: nothing can be judged without images that do not come from the supplier; name a folder of them"
        )
    ordered = {key: options.pop(key) for key in ("name", "supplier", "limit", "truth", "baseline", "again")}
    order = Order(data, trusted, workspace, **ordered)
    return console.tell_result(launch(order, load(**options)), as_json)


@cbd.command("compile")
@click.argument("pipeline", type=click.Choice(["retrain", "redteam"]), default="retrain")
@click.option("--overlay", help="Kind of cluster: gke, eks or onprem; with its pool of GPU nodes, such as gke:POOL.")
@click.option("--image", help="NAME@sha256:DIGEST of the image that runs the steps.")
@click.option(
    "--gpus", type=click.IntRange(0), default=1, show_default=True, help="Of each training step: as many as `training.processes`."
)
@click.option("--manifest", is_flag=True, help="Write resources Pipeline and PipelineVersion, for GitOps.")
@click.option("--namespace", help="Namespace of these resources.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write.  [default: the golden files; with anything else ./PIPELINE.yaml]",
)
def compile_command(
    pipeline: str, overlay: str | None, image: str | None, gpus: int, manifest: bool, namespace: str | None, out: Path | None
) -> int:
    """PIPELINE (retrain, or redteam) as IR YAML for a Kubeflow Pipelines server."""
    from pipelines.compile import compile_pipeline, write_golden

    if (pipeline, overlay, image, gpus, manifest, out) == ("retrain", None, None, 1, False, None):
        for path in write_golden():
            print(f"wrote {path}")
        print("next: git diff")
        return 0
    out = out or Path(f"{pipeline}.yaml")
    compile_pipeline(out, pipeline, image=image, overlay=overlay, gpus=gpus, manifest=manifest, namespace=namespace)
    print(f"wrote {out}")
    print(f"next: {'kubectl apply --filename ' + str(out) if manifest else 'cbd submit, or upload it to a Kubeflow Pipelines server'}")
    return 0


@cbd.command()
@click.argument("run")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="How many to list.")
@workspace_option
@as_json
def suspects(run: str, top: int, workspace: Path, as_json: bool) -> int:
    """The most suspicious training images of RUN, a run id or its folder."""
    from pipelines import steps

    return tell(steps.suspects(run, workspace, top=top), as_json, f"cbd report {run}", table="suspects")


@cbd.command()
@click.argument("run")
@workspace_option
def report(run: str, workspace: Path) -> int:
    """Write the report of RUN, a run id or its folder, again from its records."""
    from pipelines import outcome

    page = outcome.write_report(outcome.find_run(run, workspace))
    print(f"report: {page}")
    print(f"next: cbd suspects {run}")
    return 0


@cbd.command()
@workspace_option
@as_json
def doctor(workspace: Path, as_json: bool) -> int:
    """Whether this machine can run it all: versions, device, disk, git, tracking."""
    from pipelines.doctor import examine

    findings = examine(workspace)
    tell(findings, as_json, "cbd demo")
    return 0 if findings["healthy"] else 1


for module in (by_hand, standing, holding, controls, exchange, auditing, on_cluster):
    for command in module.COMMANDS:
        cbd.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code; every mistake is told in one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    share_cores()
    try:
        code = cbd.main(list(arguments), prog_name="cbd", standalone_mode=False) or 0
    except click.UsageError as error:
        code = _fail(f"{error.format_message()} See: {error.ctx.command_path if error.ctx else 'cbd'} --help", 2, arguments)
    except CbdError as error:
        run_dir = getattr(error, "run_dir", None)
        if run_dir is not None:
            print(printable(f"report: {run_dir / 'report.html'}"), file=sys.stderr)
        code = _fail(str(error), error.exit_code, arguments, run_dir=run_dir)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted; run again to resume", 1, arguments)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = _fail(str(disk_fault(Path(str(error.filename or ".")), error)), 1, arguments)
    sys.exit(code)


def _fail(message: str, code: int, arguments: Sequence[str], *, run_dir: Path | None = None) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    if "--json" in arguments:
        where = str(run_dir) if run_dir else None
        print(json.dumps({"verdict": None, "error": message, "exit_code": code, "run_dir": where}))
    return code


if __name__ == "__main__":
    main()
