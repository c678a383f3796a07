"""Clean controls: harmless models that are trained once, kept in the data registry, and compared with candidates of their configuration."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cbd.bundle import CARD, BundleCard, bundle_digest, read_card
from cbd.config import Ingest, Params
from cbd.control import MIN_CONTROLS, RECORD, TRAINED_ON, config_digest, record_of, trained_on
from cbd.dataset import DatasetInfo, read_batches, read_info, read_manifest, verify_dataset, write_dataset
from cbd.errors import DataError
from cbd.files import sha256_file, write_json
from cbd.rates import rate
from components.places import CONTROL, kind_of
from components.records import progress
from components.registry import fetch, versions
from components.version import version_control

if TYPE_CHECKING:
    from pyarrow import RecordBatch

    from cbd.evaluate import Control


class Found(NamedTuple):
    """The controls of a registry that a candidate may be compared with."""

    bundles: list[Path]
    """At least `MIN_CONTROLS`, or none."""
    unused: dict[str, str]
    """Why each of the others is not used, by its tag."""


def build(trusted_set: Path, data: Path | None, *, params: Params, count: int, workspace: Path) -> list[dict[str, Any]]:
    """Tag, digest and counts of `count` harmless models that are trained with seeds from `params.seed` on, and kept in the registry.

    Without `data` they learn from the half of the trusted set that triggers are inverted on (see `cbd.scan.split`), so that the other half
    is left to measure them on. What they learned from is listed beside their weights.

    Args:
        trusted_set: data set that does not come from the supplier.
        data: another such data set of the same classes; what is in the trusted set too is left out of it.
        params: the seed and the sections `model`, `confounder` and `deconfounded`.
        count: how many.
        workspace: with the registry and the checkpoints.

    Raises:
        DataError: a data set is missing, altered or poisoned on purpose, or of other classes, or a class has no image to learn from.
    """
    built = []
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part"
        info = _write_part(trusted_set, data, part)
        for number in range(count):
            progress("controls", number, count, f"{info.num_images} images")
            seeded = params.model_copy(update={"seed": params.seed + number})
            built.append(_train(part, Path(folder) / str(number), params=seeded, workspace=workspace))
        progress("controls", count, count)
    return built


def take_in_honest(uri: str, out: Path, params: Ingest) -> DatasetInfo:
    """The data set that this writes to `out`: the usable images of a delivery that comes from somebody trusted, equal pixels once."""
    from components.ingest import TRUSTED_SOURCE, classes_of, staged

    with tempfile.TemporaryDirectory() as folder:
        intake, named = staged(uri, "trusted set", params, folder=Path(folder), source=TRUSTED_SOURCE)
        class_names = classes_of(intake, named, uri)
        return write_dataset(out, intake.accepted(class_names, intake.kept()), class_names=class_names, supplier=TRUSTED_SOURCE)


def listed(workspace: Path, params: Params) -> list[dict[str, Any]]:
    """Every control in the registry, the latest first, with whether it was trained with today's parameters."""
    today, rows = config_digest(params.model_dump(mode="json")), []
    for tag, card in _stored(workspace):
        record, config = record_of(card), config_digest(card.params)
        rows.append(
            {"tag": tag, "kind": card.kind, "architecture": card.architecture, "image_size": card.image_size}
            | {"config": config[:12], "trained_on": card.data_digest[:12], "num_images": record.num_images if record else None}
            | {"today": record is not None and config == today}
        )
    return rows[::-1]


def find_controls(workspace: Path, out: Path, *, model: Path, trusted_set: Path, min_images: int) -> Found:
    """The controls to compare a candidate with, brought to `out` and verified: of its classes, image size and configuration.

    Args:
        workspace: with the registry; none is no fault.
        out: gets a folder for each.
        model: the candidate's bundle.
        trusted_set: what they will be measured on.
        min_images: of the policy; a control needs half as many trusted images that it was not trained on.

    Raises:
        DataError: a control in the remote is missing or altered, or is not what the registry says.
    """
    wanted = read_card(model)
    why = {tag: _mismatch(control, wanted) for tag, control in _stored(workspace)}
    unused = {tag: reason for tag, reason in why.items() if reason}
    bundles: dict[str, Path] = {}
    if len(why) - len(unused) >= MIN_CONTROLS:
        for tag in (tag for tag in why if tag not in unused):
            bundle = _fetch(tag, wanted, out / tag.rpartition("/")[2], workspace=workspace)
            if 2 * (left := int(unseen(bundle, trusted_set).sum())) >= min_images:
                bundles[tag] = bundle
            else:
                unused[tag] = f"only {left} trusted images that it was not trained on, expected at least {(min_images + 1) // 2}"
    if len(bundles) >= MIN_CONTROLS:
        return Found(list(bundles.values()), unused)
    left = sorted(set(why) - set(unused))
    return Found([], unused | dict.fromkeys(left, f"one of {len(left)} that match, expected at least {MIN_CONTROLS}"))


def unseen(control: Path, trusted_set: Path) -> Any:
    """bool [N]: which trusted images, by their pixels, the control was not trained on."""
    import numpy as np

    known = trained_on(control)
    return np.array([digest not in known for digest in read_manifest(trusted_set)["pixel_digest"].to_pylist()], bool)


def held_out(trusted_set: Path) -> Any:
    """bool [N]: which trusted images triggers are stamped on; the inversion sees the others. By sample id, or the column `group` if any.

    Raises:
        DataError: all would be on one side.
    """
    import pyarrow.parquet as pq

    from cbd.scan import split

    shards = sorted(read_info(trusted_set).shards)
    grouped = bool(shards) and "group" in pq.read_schema(trusted_set / shards[0]).names
    name = "group" if grouped else "sample_id"
    names = [str(value) for batch in read_batches(trusted_set, columns=[name]) for value in batch[name].to_pylist()]
    test = split(names)
    if test.all() or not test.any():
        raise DataError(f"{trusted_set}: cannot be split in two ({len(set(names))} sample ids or groups); give a larger trusted set")
    return test


def loaded(controls: Sequence[Path], trusted_set: Path) -> "list[Control]":
    """Each control's network with the trusted images that it was not trained on; raises DataError if one was altered."""
    from cbd.models import load_model
    from cbd.training import best_device

    return [(load_model(bundle)[0].to(best_device()), unseen(bundle, trusted_set)) for bundle in controls]


def told(controls: Sequence[Path]) -> dict[str, Any]:
    """The entry `controls` of `evaluation.json`."""
    records = [record for record in (record_of(read_card(bundle)) for bundle in controls) if record]
    suspects, images = sum(record.false_suspects for record in records), sum(record.num_images for record in records)
    return {
        "count": len(records),
        "digests": sorted(bundle_digest(bundle) for bundle in controls),
        "false_suspects": rate(suspects, images),
    }


def _stored(workspace: Path) -> Iterator[tuple[str, BundleCard]]:
    for tag, card in versions(workspace):
        if kind_of(tag) == CONTROL and isinstance(card, BundleCard):
            yield tag, card


def _mismatch(card: BundleCard, wanted: BundleCard) -> str | None:
    """Why a control with this card cannot be compared with the candidate; None if it can."""
    if record_of(card) is None:
        return "was not made by `cbd controls build`: what it was trained on is not known"
    if card.class_names != wanted.class_names:
        return f"classes {list(card.class_names)}, expected {list(wanted.class_names)}"
    if (card.architecture, card.image_size) != (wanted.architecture, wanted.image_size):
        return f"{card.architecture} at {card.image_size} pixels, expected {wanted.architecture} at {wanted.image_size}"
    if (found := config_digest(card.params)) != (expected := config_digest(wanted.params)):
        return f"configuration {found[:12]}, expected {expected[:12]}"
    if card.data_digest == wanted.data_digest:
        return "was trained on the candidate's own data"
    return None


def _fetch(tag: str, wanted: BundleCard, out: Path, *, workspace: Path) -> Path:
    fetch(tag, out, workspace=workspace)
    if why := _mismatch(read_card(out), wanted):
        raise DataError(f"{tag}: altered: the registry tells of another model than the remote holds ({why}); restore the registry")
    try:
        trained_on(out)
    except DataError as error:
        raise DataError(f"{tag}: {str(error).replace(str(out), '').lstrip('/')}") from None
    return out


def _write_part(trusted_set: Path, data: Path | None, out: Path) -> DatasetInfo:
    """Writes what controls learn from: of `data` what is not in the trusted set, or half of the trusted set."""
    source = data or trusted_set
    info, trusted = verify_dataset(source), read_info(trusted_set)
    if info.trial or trusted.trial:
        raise DataError(f"{source if info.trial else trusted_set}: was poisoned on purpose; controls learn from honest data alone")
    if info.class_names != trusted.class_names:
        raise DataError(f"{source}: classes {list(info.class_names)}, expected the trusted set's {list(trusted.class_names)}")
    pixels = read_manifest(trusted_set)["pixel_digest"].to_pylist()
    left_out = {digest for digest, kept in zip(pixels, held_out(trusted_set), strict=True) if data is not None or kept}
    written = write_dataset(out, _without(source, left_out), class_names=info.class_names, supplier=info.supplier)
    if 0 in written.class_counts:
        name = written.class_names[written.class_counts.index(0)]
        raise DataError(f"{source}: no image of class {name!r} to train controls on; give a larger set")
    return written


def _without(folder: Path, left_out: set[str]) -> "Iterator[RecordBatch]":
    import pyarrow as pa

    for batch in read_batches(folder):
        kept = batch.filter(pa.array([digest not in left_out for digest in batch["pixel_digest"].to_pylist()], pa.bool_()))
        if len(kept):
            yield kept


def _train(dataset: Path, place: Path, *, params: Params, workspace: Path) -> dict[str, Any]:
    """One control, trained, described and kept in the registry."""
    from components.train_confounder import train_confounder
    from components.train_deconfounded import train_deconfounded

    checkpoints, model = workspace / "checkpoints", place / "model"
    train_confounder(dataset, place / "confounder", params=params, checkpoints=checkpoints)
    outputs = {"model": model, "evidence": place / "evidence"}
    trained = train_deconfounded(dataset, place / "confounder", params=params, checkpoints=checkpoints, **outputs)
    describe(model, dataset, false_suspects=trained["suspects"])
    stored = version_control(model, workspace=str(workspace))
    return {"tag": stored["tag"], "digest": stored["digest"], "seed": params.seed} | {
        "num_images": trained["num_images"],
        "false_suspects": trained["suspects"],
    }


def describe(bundle: Path, dataset: Path, *, false_suspects: int) -> None:
    """Makes a bundle a control: lists what it was trained on beside its weights, and says so in its card."""
    pixels = sorted(read_manifest(dataset)["pixel_digest"].to_pylist())
    (bundle / TRAINED_ON).write_text("".join(f"{digest}\n" for digest in pixels))
    card = read_card(bundle)
    record = {"trained_on_sha256": sha256_file(bundle / TRAINED_ON), "false_suspects": false_suspects, "num_images": len(pixels)}
    write_json(bundle / CARD, card.model_copy(update={"params": {**card.params, RECORD: record}}).model_dump(mode="json"))
