"""The command line `cbd`. Only declarations: what a command does is imported when it is called."""

import errno
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from cbd.errors import CbdError, ConfigError
from cbd.files import disk_fault
from pipelines.local import share_cores
from pipelines.progress import printable

WORKSPACE = Path("cbd-workspace")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
F = Callable[..., Any]

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object as the last line of stdout.")
workspace_option = click.option(
    "--workspace", type=click.Path(path_type=Path), default=WORKSPACE, show_default=True, help="Where all state lives."
)
out_option = click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write the result.")


def params_options(command: F) -> F:
    """Adds the options that choose and override `params.yaml`."""
    options = (
        click.option(
            "--params", "params_path", type=click.Path(path_type=Path), help="Parameter file  [default: ./params.yaml, else the project's]"
        ),
        click.option("--preset", help="Preset of the parameter file: cbd, paper, official or none."),
        click.option("--seed", type=click.IntRange(0), help="Seed of every generator."),
        click.option("--epochs", "deconfounded__epochs", type=click.IntRange(1), help="Passes of the deconfounded model over the data."),
        click.option(
            "--confounder-steps", "confounder__steps", type=click.IntRange(1), help="Budget of the confounder in optimizer steps."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def poison_options(command: F) -> F:
    """Adds the options of an attack."""
    options = (
        click.option(
            "--poison-rate",
            "poison__poison_rate",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="Share that is poisoned.",
        ),
        click.option(
            "--target-label", "poison__target_label", type=click.IntRange(0), help="Index of the class that triggered images are sent to."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


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
@click.option("--clean", is_flag=True, help="With --data-only: an honest supplier, no poison.")
@params_options
@as_json
def demo(out: Path, baseline: bool, data_only: bool, clean: bool, as_json: bool, **overrides: Any) -> int:
    """See it all on scanned digits that a supplier has poisoned."""
    from pipelines import console, demo

    if clean and not data_only:
        raise ConfigError("--clean goes with --data-only; leave one out or add the other")
    if data_only:
        data = demo.write_demo_data(out, poisoned=not clean)
        print(f"next: cbd run --data {data.delivery} --trusted {data.trusted}")
        return 0
    result = demo.run_demo(out, _params(**overrides), baseline=baseline)
    return console.tell_result(result, as_json, following="cbd run --data YOUR_CLASS_FOLDERS --trusted YOUR_TRUSTED_CLASS_FOLDERS")


@cbd.command()
@click.option("--data", help="Delivery: class folders, Parquet (Hugging Face images), local or s3://.  [required]")
@click.option("--trusted", help="Trusted set that does not come from the supplier.  [required]")
@workspace_option
@click.option("--name", default="model", show_default=True, help="Name of the registered model.")
@click.option("--supplier", default="unnamed", show_default=True, help="Who delivered the data.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Take in at most so many images; 0: all.")
@click.option("--truth", type=click.Path(), default="", help="Ground truth of a delivery poisoned on purpose, for measuring only.")
@click.option(
    "--poison", "poison__attack", type=click.Choice(["badnets", "blend"]), help="Poison the taken-in copy: a trial, never promoted."
)
@poison_options
@click.option("--baseline", is_flag=True, help="Also train without defence on the same data.")
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
    ordered = {key: options.pop(key) for key in ("name", "supplier", "limit", "truth", "baseline")}
    order = Order(data, trusted, workspace, **ordered)
    return console.tell_result(launch(order, _params(**options)), as_json)


@cbd.command()
@click.option("--data", required=True, help="Delivery: class folders, Parquet (Hugging Face images), local or s3://.")
@click.option("--trusted", required=True, help="Trusted set that does not come from the supplier.")
@out_option
@click.option("--supplier", default="unnamed", show_default=True, help="Who delivered the data.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Take in at most so many images; 0: all.")
@click.option("--truth", type=click.Path(), default="", help="Ground truth of a delivery poisoned on purpose.")
@params_options
@as_json
def ingest(data: str, trusted: str, out: Path, as_json: bool, **options: Any) -> int:
    """Take a delivery in: data set, trusted set and quarantine in OUT."""
    from pipelines import steps

    taken = {key: options.pop(key) for key in ("supplier", "limit", "truth")}
    outputs = steps.ingest(data, trusted, out=out, params=_params(**options), **taken)
    return _tell(outputs, as_json, f"cbd train --data {out / 'dataset'} --out MODELS")


@cbd.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--attack", "poison__attack", type=click.Choice(["badnets", "blend"]), required=True, help="Trigger family.")
@out_option
@poison_options
@params_options
@as_json
def poison(dataset: Path, out: Path, as_json: bool, **overrides: Any) -> int:
    """A poisoned copy of a data set in OUT, its ground truth kept apart in OUT/truth."""
    from pipelines import steps

    outputs = steps.poison(dataset, out, params=_params(**overrides))
    return _tell(outputs, as_json, f"cbd train --data {out / 'dataset'} --out MODELS")


@cbd.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--trusted", type=click.Path(path_type=Path), required=True, help="Trusted set that `cbd ingest` wrote.")
@out_option
@as_json
def validate(dataset: Path, trusted: Path, out: Path, as_json: bool) -> int:
    """Whether a data set is fit to be trained on; exit code 11 if not."""
    from pipelines import steps

    outputs = steps.validate(dataset, trusted, out)
    _tell(outputs, as_json, f"cbd train --data {dataset} --out MODELS")
    return 0 if outputs["passed"] else 11


@cbd.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data set folder that `cbd ingest` wrote.")
@out_option
@click.option(
    "--checkpoints", type=click.Path(path_type=Path), help="Where to keep checkpoints, to resume from.  [default: OUT/checkpoints]"
)
@params_options
@as_json
def train(data: Path, out: Path, checkpoints: Path | None, as_json: bool, **overrides: Any) -> int:
    """Train a confounder and the deconfounded model on a data set."""
    from pipelines import steps

    outputs = steps.train(data, out, params=_params(**overrides), checkpoints=checkpoints or out / "checkpoints")
    return _tell(outputs, as_json, f"cbd evaluate {out / 'model'} --trusted TRUSTED")


@cbd.command()
@click.argument("model")
@click.option("--trusted", required=True, help="Data set folder, or a delivery in any format.")
@click.option("--truth", type=click.Path(path_type=Path), help="Ground truth of a data set poisoned on purpose.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write evaluation.json.")
@workspace_option
@params_options
@as_json
def evaluate(model: str, trusted: str, truth: Path | None, out: Path | None, workspace: Path, as_json: bool, **overrides: Any) -> int:
    """Measure MODEL, a bundle folder or models:/NAME@champion, on trusted images."""
    from pipelines import steps

    outputs = steps.evaluate(model, trusted, params=_params(**overrides), truth=truth, out=out, workspace=workspace)
    return _tell(outputs, as_json, f"cbd predict {model} --data IMAGES --out predictions.parquet")


@cbd.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Data set that the model was trained on.")
@click.option("--trusted", type=click.Path(path_type=Path), required=True, help="Trusted set that it was measured on.")
@click.option("--validation", type=click.Path(path_type=Path), required=True, help="What `cbd validate` wrote.")
@click.option("--evaluation", type=click.Path(path_type=Path), required=True, help="What `cbd evaluate` wrote.")
@out_option
@workspace_option
@params_options
@as_json
def gate(as_json: bool, **options: Any) -> int:
    """The signed decision on MODEL; the exit code is its verdict's."""
    from pipelines import steps
    from pipelines.outcome import EXIT_CODES

    places = {key: options.pop(key) for key in ("model", "data", "trusted", "validation", "evaluation", "out", "workspace")}
    outputs = steps.gate(places, _params(**options))
    _tell(outputs, as_json, f"cbd predict {places['model']} --data IMAGES --out predictions.parquet")
    return EXIT_CODES[outputs["verdict"]]


@cbd.command()
@click.argument("model")
@click.option("--data", required=True, help="Any delivery, or a flat folder of images.")
@out_option
@workspace_option
@as_json
def predict(model: str, data: str, out: Path, workspace: Path, as_json: bool) -> int:
    """Predictions of MODEL, a bundle folder or models:/NAME@champion, as a Parquet table."""
    from pipelines.predict import predict

    outputs = predict(model, data, out, workspace=workspace)
    return _tell(outputs, as_json, f"""python -c "import pandas; print(pandas.read_parquet('{out}'))\"""")


@cbd.command("compile")
@click.option("--image", help="NAME@sha256:DIGEST of the image that runs the steps.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="File to write.  [default: the project's golden file; with --image ./retrain.yaml]"
)
def compile_command(image: str | None, out: Path | None) -> int:
    """The pipeline as IR YAML for a Kubeflow Pipelines server."""
    from pipelines.compile import GOLDEN, compile_pipeline

    out = out or (Path("retrain.yaml") if image else GOLDEN)
    compile_pipeline(out, image=image)
    print(f"wrote {out}")
    print("next: upload it to a Kubeflow Pipelines server" if image else "next: git diff " + str(out))
    return 0


@cbd.command()
@click.argument("run")
@click.option("--top", type=click.IntRange(1), default=20, show_default=True, help="How many to list.")
@workspace_option
@as_json
def suspects(run: str, top: int, workspace: Path, as_json: bool) -> int:
    """The most suspicious training images of RUN, a run id or its folder."""
    from pipelines import steps

    return _tell(steps.suspects(run, workspace, top=top), as_json, f"cbd report {run}", table="suspects")


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
    _tell(findings, as_json, "cbd demo")
    return 0 if findings["healthy"] else 1


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


def _params(*, params_path: Path | None, preset: str | None, **overrides: Any) -> Any:
    from cbd.config import load_params

    own = Path(__file__).resolve().parent.parent / "params.yaml"
    default = Path("params.yaml") if Path("params.yaml").is_file() else own
    if overrides.get("poison__attack") is None and any(
        overrides.get(f"poison__{key}") is not None for key in ("poison_rate", "target_label")
    ):
        raise ConfigError("--poison-rate and --target-label go with --poison; add --poison badnets or leave them out")
    return load_params(params_path or default, preset=preset, **overrides)


def _tell(outputs: dict[str, Any], as_json: bool, following: str, *, table: str | None = None) -> int:
    from pipelines import console

    return console.tell_outputs(outputs, as_json, following, table=table)


if __name__ == "__main__":
    main()
