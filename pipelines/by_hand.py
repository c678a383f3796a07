"""The commands that run one step by hand. Only declarations: what a command does is imported when it is called."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cbd.errors import ConfigError
from pipelines.options import (
    ATTACKS,
    BASELINES,
    MORE_ATTACKS,
    PRESETS,
    VARIANTS,
    as_json,
    load,
    load_policy,
    out_option,
    params_options,
    poison_options,
    split,
    tell,
    workspace_option,
)

if TYPE_CHECKING:
    from cbd.config import Params


@click.command()
@click.option("--data", required=True, help="Delivery: class folders, manifest, Parquet, tar, zip or WebDataset; local or s3://.")
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
    outputs = steps.ingest(data, trusted, out=out, params=load(**options), **taken)
    return tell(outputs, as_json, f"cbd train --data {out / 'dataset'} --out MODELS")


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--attack", "poison__attack", type=click.Choice(ATTACKS + MORE_ATTACKS), required=True, help="Trigger family.")
@out_option
@click.option(
    "--before",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Ground truth of an attack already in DATASET: its images are left alone; may be repeated.",
)
@poison_options
@params_options
@as_json
def poison(dataset: Path, out: Path, before: tuple[Path, ...], as_json: bool, **overrides: Any) -> int:
    """A poisoned copy of a data set in OUT, its ground truth kept apart in OUT/truth."""
    from pipelines import steps

    outputs = steps.poison(dataset, out, params=load(**overrides), before=before)
    return tell(outputs, as_json, f"cbd train --data {out / 'dataset'} --out MODELS")


@click.command()
@click.argument("dataset", type=click.Path(path_type=Path))
@click.option("--trusted", type=click.Path(path_type=Path), required=True, help="Trusted set that `cbd ingest` wrote.")
@out_option
@params_options
@as_json
def validate(dataset: Path, trusted: Path, out: Path, as_json: bool, **overrides: Any) -> int:
    """Whether a data set is fit to be trained on; exit code 11 if not."""
    from pipelines import steps

    outputs = steps.validate(dataset, trusted, out, params=load(**overrides))
    tell(outputs, as_json, f"cbd train --data {dataset} --out MODELS")
    return 0 if outputs["passed"] else 11


@click.command()
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

    outputs = steps.train(data, out, params=load(**overrides), checkpoints=checkpoints or out / "checkpoints")
    return tell(outputs, as_json, f"cbd evaluate {out / 'model'} --trusted TRUSTED")


@click.command()
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

    outputs = steps.evaluate(model, trusted, params=load(**overrides), truth=truth, out=out, workspace=workspace)
    return tell(outputs, as_json, f"cbd predict {model} --data IMAGES --out predictions.parquet")


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--trusted", type=click.Path(path_type=Path), required=True, help="Trusted set that `cbd ingest` wrote.")
@click.option("--confounder", type=click.Path(path_type=Path), help="Also search on this confounder.")
@out_option
@workspace_option
@params_options
@as_json
def scan(model: Path, trusted: Path, confounder: Path | None, out: Path, workspace: Path, as_json: bool, **overrides: Any) -> int:
    """Search MODEL, a bundle folder, for triggers that nobody knows."""
    from pipelines import steps

    outputs = steps.scan(model, trusted, out, confounder=confounder, params=load(**overrides), workspace=workspace)
    return tell(outputs, as_json, f"look at {out / 'triggers.png'}")


@click.command()
@click.argument("subject", metavar="MODEL|RUN")
@click.option("--policy", type=click.Path(path_type=Path), help="Judge RUN again by section `gate` of this file; goes with RUN alone.")
@click.option("--data", type=click.Path(path_type=Path), help="Data set that MODEL was trained on.")
@click.option("--trusted", type=click.Path(path_type=Path), help="Trusted set that it was measured on.")
@click.option("--validation", type=click.Path(path_type=Path), help="What `cbd validate` wrote.")
@click.option("--evaluation", type=click.Path(path_type=Path), help="What `cbd evaluate` wrote.")
@click.option("--canary", type=click.Path(path_type=Path), help="What a run's canary step wrote; may be left out.")
@click.option("--scan", type=click.Path(path_type=Path), help="What `cbd scan` wrote; without it at best REVIEW.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the result.")
@workspace_option
@params_options
@as_json
def gate(subject: str, policy: Path | None, workspace: Path, as_json: bool, **options: Any) -> int:
    """The signed decision on MODEL, or with --policy on RUN again, a run id or its folder; the exit code is its verdict's.

    MODEL, a bundle folder, takes --data, --trusted, --validation, --evaluation and --out. RUN takes --policy: what it recorded is judged by
    another policy, and no alias moves.
    """
    from pipelines import steps
    from pipelines.console import tell_rejudged
    from pipelines.outcome import EXIT_CODES

    if policy is not None:
        _check_run_alone(subject, options)
        return tell_rejudged(steps.rejudge(subject, workspace, policy=load_policy(policy)), as_json)
    names = ("data", "trusted", "validation", "evaluation", "out")
    places = {name: options.pop(name) for name in names}
    missing = [f"--{name}" for name in names if places[name] is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: MODEL goes with all of them; to judge a finished RUN again give --policy FILE")
    places |= {name: options.pop(name) for name in ("canary", "scan")}
    outputs = steps.gate({**places, "model": Path(subject), "workspace": workspace}, load(**options))
    tell(outputs, as_json, f"cbd predict {subject} --data IMAGES --out predictions.parquet")
    return EXIT_CODES[outputs["verdict"]]


def _check_run_alone(subject: str, options: dict[str, Any]) -> None:
    """Refuses --policy on a model bundle, or beside an option that is about one."""
    given = [param.opts[0] for param in click.get_current_context().command.params if options.get(param.name or "") is not None]
    if given:
        raise ConfigError(f"--policy judges a finished RUN again by what it recorded; leave out {', '.join(given)}, or leave out --policy")
    if (Path(subject) / "model.json").is_file():
        raise ConfigError(f"{subject}: is a model bundle, --policy expects a RUN, its id or folder; by hand a MODEL takes --params FILE")


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="Any delivery, or a flat folder of images.")
@out_option
@workspace_option
@as_json
def predict(model: str, data: str, out: Path, workspace: Path, as_json: bool) -> int:
    """Predictions of MODEL, a bundle folder or models:/NAME@champion, as a Parquet table."""
    from pipelines.predict import predict

    outputs = predict(model, data, out, workspace=workspace)
    return tell(outputs, as_json, f"""python -c "import pandas; print(pandas.read_parquet('{out}'))\"""")


@click.command()
@click.option("--data", required=True, help="Clean delivery to be poisoned, in any form that `cbd run` reads.")
@click.option("--trusted", required=True, help="Trusted set.")
@click.option(
    "--attacks", default="badnets", show_default=True, help=f"Comma-separated, or all: {', '.join(ATTACKS)}. Also {', '.join(VARIANTS)}."
)
@click.option(
    "--presets",
    default="none,cbd",
    show_default=True,
    help="Comma-separated: none (plain training), official, paper, cbd; and abl, vb, random-filter, perfect-filter.",
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many seeds, from 0 on.")
@click.option("--limit", type=click.IntRange(0), default=0, help="Take in at most so many images; 0: all.")
@click.option(
    "--group-by", help="Regular expression on paths: trusted images with the same match are one group, such as frames of a video."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("cbd-redteam"),
    show_default=True,
    help="Where all of it is kept; on a cluster /workspace/redteam/OUT.",
)
@click.option("--overlay", help="Run on the Kubeflow Pipelines server at KF_PIPELINES_ENDPOINT: gke, eks or onprem, also gke:POOL.")
@click.option("--image", help="NAME@sha256:DIGEST of the image that runs it there.")
@click.option("--namespace", default="", help="Yours, on a server that serves several users.")
@click.option("--service-account", help="Kubernetes service account that runs it there.")
@click.option("--run-id", default="", help="Id of the run there; one that is there already is followed.  [default: the time]")
@click.option("--no-wait", is_flag=True, help="Return when the server has taken the run.")
@poison_options
@params_options
@as_json
def redteam(data: str, trusted: str, attacks: str, presets: str, seeds: int, out: Path, as_json: bool, **overrides: Any) -> int:
    """The defence against known attacks: poison, train, measure; resumes where it was stopped.

    A delivery that was taken in to OUT before is not read again.
    """
    from pipelines import steps
    from pipelines.redteam_table import render

    limit, group_by = (overrides.pop(name) for name in ("limit", "group_by"))
    placed = {name: overrides.pop(name) for name in ("overlay", "image", "namespace", "service_account")}
    followed = {"run_id": overrides.pop("run_id"), "wait": not overrides.pop("no_wait")}
    for name, instead in (("preset", "--presets"), ("seed", "--seeds")):
        if overrides[name] is not None:
            raise ConfigError(f"--{name} is one of several here; use {instead}")

    def params_of(*, preset: str, seed: int) -> "Params":
        return load(**{**overrides, "preset": preset, "seed": seed, "poison__attack": ATTACKS[0]})  # the red team itself sets the attack

    about: dict[str, Any] = {
        "params_of": params_of,
        "attacks": split(attacks, ATTACKS, "--attacks", more=VARIANTS),
        "presets": split(presets, PRESETS, "--presets", more=BASELINES),
        "seeds": range(seeds),
    }
    if placed["overlay"] or placed["image"]:
        return _redteam_on_cluster(placed, followed, as_json, data=data, trusted=trusted, out=out, limit=limit, group_by=group_by, **about)
    outputs = steps.redteam(data, trusted, out, limit=limit, group_by=group_by, **about)
    if not as_json:
        print(render(outputs.pop("rows")))
    return tell(outputs, as_json, "cbd run --data DELIVERY --trusted TRUSTED")


def _redteam_on_cluster(placed: dict[str, Any], followed: dict[str, Any], as_json: bool, **order: Any) -> int:
    """Submits the pipeline `redteam`; raises ConfigError where something is missing."""
    from pipelines.submit import WORKSPACE, Cluster, submit_redteam
    from pipelines.trials import arguments

    if not (placed["overlay"] and placed["image"]):
        raise ConfigError("--overlay and --image go together: a cluster runs what is compiled for it")
    delivery = {name: order.pop(name) for name in ("data", "trusted", "limit")}
    out, group_by = WORKSPACE / "redteam" / order.pop("out").resolve().name, order.pop("group_by") or ""
    given = {"out": str(out), "group_by": group_by, **arguments(delivery, **order)}
    told = submit_redteam(given, Cluster(**placed), **followed)
    return tell(told, as_json, f"look at {told.get('page', told['run'])}")


COMMANDS = (ingest, poison, validate, train, evaluate, scan, gate, predict, redteam)
"""In the order of the pipeline's steps."""
