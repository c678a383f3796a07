"""Single steps by hand: the same functions that the pipeline's components call."""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd.config import Gate, Params
from cbd.errors import DataError
from pipelines.launch import check_uri
from pipelines.outcome import find_artifact, find_run
from pipelines.progress import by_hand, printable

if TYPE_CHECKING:
    from cbd.dataset import Row

SUSPECT_COLUMNS = ["rank", "original_path", "given", "predicted", "sample_weight", "suspect", "sample_id"]


@by_hand()
def ingest(data: str, trusted: str, *, out: Path, params: Params, supplier: str, limit: int, truth: str) -> dict[str, Any]:
    """Counts and digests of a delivery that was taken in to `out`: folders dataset, trusted_set, quarantine and truth."""
    from components.ingest import IngestOptions, IngestPaths
    from components.ingest import ingest as take_in

    check_uri("--data", data)
    check_uri("--trusted", trusted)
    paths = IngestPaths(*(out / name for name in IngestPaths._fields))
    options = IngestOptions(supplier=supplier, limit=limit, truth_source=truth, poison=params.poison, seed=params.seed)
    return take_in(data, trusted, outputs=paths, params=params.ingest, options=options)


@by_hand()
def poison(dataset: Path, out: Path, *, params: Params, before: Sequence[Path]) -> dict[str, Any]:
    """Counts of a poisoned copy of a data set in `out/dataset`; its ground truth is kept apart in `out/truth`."""
    from components.poison import poison as stamp

    return stamp(dataset, out / "dataset", truth=out / "truth", params=params.poison, seed=params.seed, before=before)


@by_hand()
def redteam(data: str, trusted: str, out: Path, *, limit: int, params_of: Callable[..., Params], **chosen: Any) -> dict[str, Any]:
    """The rows of `pipelines.redteam.redteam` on a delivery, which is taken in to `out` once.

    `params_of` gives the parameters of a `preset=` and a `seed=`; the red team itself sets the attack.
    """
    from pipelines import redteam as team
    from pipelines.redteam_table import write_page

    check_uri("--data", data)
    check_uri("--trusted", trusted)
    taken_in = team.take_in(data, trusted, out, limit=limit, params=params_of(preset="none", seed=0).ingest)
    rows = team.redteam(taken_in, out, params_of=params_of, **chosen)
    return {"rows": rows, "table": str(out / team.TABLE), "page": str(write_page(rows, out))}


@by_hand()
def validate(dataset: Path, trusted_set: Path, out: Path, *, params: Params) -> dict[str, Any]:
    """Whether the data set passed, with what failed; the whole is in `out/validation.json`."""
    from components.validate import validate as check

    return check(dataset, out, trusted_set=trusted_set, limits=params.validation)


@by_hand()
def train(dataset: Path, out: Path, *, params: Params, checkpoints: Path) -> dict[str, Any]:
    """Digests and separation of a confounder in `out/confounder` and a deconfounded model in `out/model`, evidence in `out/evidence`."""
    from components.train_confounder import train_confounder
    from components.train_deconfounded import train_deconfounded
    from components.training import training_params

    sections = params.model_dump(mode="json")
    given = (params.seed, params.preset, sections["model"])
    caught = train_confounder(
        dataset,
        out / "confounder",
        params=training_params(*given, confounder=sections["confounder"], training=sections["training"]),
        checkpoints=checkpoints,
    )
    trained = train_deconfounded(
        dataset,
        out / "confounder",
        model=out / "model",
        evidence=out / "evidence",
        params=training_params(*given, deconfounded=sections["deconfounded"], training=sections["training"]),
        checkpoints=checkpoints,
    )
    return {"confounder": caught, **trained}


@by_hand()
def evaluate(model: str, trusted: str, *, params: Params, truth: Path | None, out: Path | None, workspace: Path) -> dict[str, Any]:
    """The measurements of a model, or of all that `train` wrote to a folder; `trusted` is a data set or a delivery.

    Raises:
        DataError: no such model or images, or they do not fit together.
    """
    from cbd.bundle import read_card
    from cbd.dataset import INFO
    from cbd.truth import read_truth
    from components.evaluate import EVALUATION, Compared
    from components.evaluate import evaluate as measure
    from components.tracking import fetch_model

    check_uri("--trusted", trusted)
    trained, known = Path(model), read_truth(truth) if truth else None
    compared, bundle = Compared(truth=known), trained / "model"
    if bundle.is_dir():
        compared = Compared(trained / "confounder", trained / "evidence", truth=known)
    else:
        bundle = fetch_model(model, workspace)
    with tempfile.TemporaryDirectory() as folder:
        trusted_set, place = Path(trusted), out or Path(folder) / "evaluation"
        if not (trusted_set / INFO).is_file():
            trusted_set = Path(folder) / "trusted"
            _take_in(trusted, trusted_set, read_card(bundle).class_names, params)
        controls = _controls(workspace, Path(folder) / "controls", model=bundle, trusted_set=trusted_set, params=params)
        compared = dataclasses.replace(compared, controls=controls)
        measure(bundle, trusted_set, place, policy=params.gate, compared=compared, seed=params.seed)
        measured: dict[str, Any] = json.loads((place / EVALUATION).read_text())
    shown = ("clean_accuracy", "attack_success_rate", "confounder", "detection", "num_images", "model_digest", "trusted_digest")
    return {name: measured[name] for name in shown}


@by_hand()
def scan(model: Path, trusted_set: Path, out: Path, *, confounder: Path | None, params: Params, workspace: Path) -> dict[str, Any]:
    """What stands out on a model among triggers that are searched for; the whole is in `out/scan.json`, pictures in `out/triggers.png`."""
    from components.scan import scan as search

    with tempfile.TemporaryDirectory() as folder:
        controls = _controls(workspace, Path(folder), model=model, trusted_set=trusted_set, params=params)
        return search(model, confounder, trusted_set, out, policy=params.gate, seed=params.seed, controls=controls)


def _controls(workspace: Path, folder: Path, *, model: Path, trusted_set: Path, params: Params) -> list[Path]:
    """The clean controls of the model's configuration in the workspace, brought to `folder`; others are told on stderr, with the reason."""
    from components.controls import find_controls

    found = find_controls(workspace, folder, model=model, trusted_set=trusted_set, min_images=params.gate.min_images)
    for tag, why in found.unused.items():
        print(f"not compared with {printable(f'{tag}: {why}')}", file=sys.stderr)
    return found.bundles


def _take_in(delivery: str, out: Path, class_names: tuple[str, ...], params: Params) -> None:
    """Writes the usable images of a delivery to `out`, with a model's classes; what is left out is told on stderr."""
    from cbd.dataset import make_row, to_batches, write_dataset
    from cbd.images import Refused
    from components.delivery import read_delivery

    def rows() -> Iterator["Row"]:
        for raw in opened.files:
            try:
                if raw.data is None:
                    raise raw.refusal or Refused("unreadable", "no data")
                if raw.label_name not in class_names:
                    raise DataError(f"--trusted {delivery}: class {raw.label_name!r}, expected the model's: {', '.join(class_names)}")
                label, limit = class_names.index(raw.label_name), params.ingest.max_pixels
                yield make_row(raw.data, label=label, original_path=raw.original_path, source="trusted", max_pixels=limit)
            except Refused as refusal:
                print(f"left out: {printable(raw.original_path)}: {refusal.reason}", file=sys.stderr)

    with read_delivery(delivery, name="trusted set", limits=params.ingest) as opened:
        write_dataset(out, to_batches(rows()), class_names=class_names, supplier="trusted")


@by_hand()
def gate(places: dict[str, Path], params: Params) -> dict[str, Any]:
    """What the decision says that this writes, signed with the workspace's key, to `places["out"]`."""
    from components.decide import Subject, decide

    measured = {name: places[name] for name in ("validation", "evaluation", "model", "canary", "scan")}
    subject = Subject(places["data"], places["trusted"], **measured)
    return decide(subject, places["out"], policy=params.gate, workspace=places["workspace"], run_id=f"by-hand-{places['out'].name}")


@by_hand()
def rejudge(run: str, workspace: Path, *, policy: Gate) -> dict[str, Any]:
    """What a run's recorded measurements come to under another policy, signed in the run's folder `judged/` (see `components.rejudge`)."""
    from components.decide import Subject
    from components.rejudge import rejudge as judge_again

    run_dir = find_run(run, workspace)
    decision = find_artifact(run_dir, "decide", "decision")
    recorded = {
        "dataset": ("ingest", "dataset"),
        "trusted_set": ("ingest", "trusted_set"),
        "validation": ("validate", "validation"),
        "evaluation": ("evaluate", "evaluation"),
        "model": ("train_deconfounded", "model"),
        "canary": ("canary", "canary"),
        "scan": ("scan", "scanned"),
    }
    ended = {name: where for name, where in recorded.items() if (run_dir / "records" / f"{where[0]}.json").is_file()}
    subject = Subject(**{name: find_artifact(run_dir, *where) for name, where in ended.items()})
    return judge_again(subject, decision, run_dir / "judged", policy=policy, workspace=run_dir.parent.parent, run_id=run_dir.name) | {
        "run_dir": str(run_dir)
    }


def suspects(run: str, workspace: Path, *, top: int) -> dict[str, Any]:
    """The `top` most suspicious training images of a run, most suspicious first, with their names of classes."""
    import pyarrow.parquet as pq

    from cbd.dataset import read_info, read_manifest

    run_dir = find_run(run, workspace)
    dataset = find_artifact(run_dir, "ingest", "dataset")
    table = pq.read_table(find_artifact(run_dir, "train_deconfounded", "evidence") / "evidence.parquet")
    names, paths = read_info(dataset).class_names, read_manifest(dataset)
    path_of = dict(zip(paths["sample_id"].to_pylist(), paths["original_path"].to_pylist(), strict=True))
    rows = table.sort_by("rank").slice(0, top).to_pylist()
    for row in rows:
        row |= {"original_path": path_of.get(row["sample_id"]), "given": names[row["label"]], "predicted": names[row["predicted"]]}
    listed = [{column: row[column] for column in SUSPECT_COLUMNS} for row in rows]
    return {"suspects": listed, "total": int(sum(table["suspect"].to_pylist())), "run_dir": str(run_dir)}
