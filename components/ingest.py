"""First step: a delivery and a trusted set become data sets of the house's format, and a quarantine with reasons.

The data set is the union of what was accepted with earlier deliveries and of what is new in this one.
"""

import contextlib
import difflib
import functools
import itertools
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from kfp import dsl

from cbd.audit import append
from cbd.config import Ingest, Poison
from cbd.dataset import DatasetInfo, read_info, write_dataset
from cbd.errors import DataError
from cbd.files import replacing, sha256_file, write_json
from cbd.truth import read_truth, write_truth
from components.accepted import Earlier, decided, read_earlier
from components.delivery import read_delivery
from components.intake import Intake, Summary, take_in
from components.quarantine import STORE
from components.quarantine import keep as keep_refused
from components.rawfiles import printable
from components.records import kfp_component, progress
from components.tracking import registered_name

TRUSTED_SOURCE = "trusted"


class IngestPaths(NamedTuple):
    """The folders that ingest writes, all of them or none."""

    dataset: Path
    trusted_set: Path
    quarantine: Path
    truth: Path


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """What is asked of one intake beside its limits."""

    supplier: str
    limit: int = 0
    """Take in only the first so many delivered files; 0 for all."""
    truth_source: str = ""
    """A TRUTH folder of the delivery, if someone knows it."""
    poison: Poison = field(default_factory=Poison)
    """An attack here makes the data set a trial: it is poisoned on purpose after it was taken in."""
    seed: int = 0
    workspace: Path | None = None
    """Where earlier deliveries lie; None takes this one for itself, and so does a trial."""
    name: str = "model"
    """Of the registered model, before the digest of its class list: what is accepted is accepted for one model."""
    run_id: str = ""
    again: bool = False
    """Train although the data set would be one that was decided on before."""


def ingest(data: str, trusted: str, *, outputs: IngestPaths, params: Ingest, options: IngestOptions) -> dict[str, Any]:
    """Counts and digests of the delivery `data` and the trusted set `trusted`, taken in and written to `outputs`.

    The classes are the trusted set's: its Parquet metadata's names in their order, else its labels sorted. Equal pixels are kept once;
    under two labels not at all. Images of the trusted set that are exact copies from the delivery are removed from it. With a workspace the
    data set also holds what was accepted before, less what people rejected; what is refused goes to the workspace's quarantine as well.

    `nothing_new` in the result names the run that was decided on the same data set and trusted set before; None if there is none. `model`
    is the full name under which the model would be registered.

    Raises:
        DataError: the delivery or the trusted set is missing, empty or unusable; nothing is written then.
        EnvironmentFault: the disk or the object store is at fault.
    """
    if not trusted:
        raise DataError("no trusted set: expected labelled images that do not come from the supplier; give them with --trusted")
    if options.poison.attack and options.truth_source:
        raise DataError("--poison and --truth exclude each other: the delivery's own poison would be counted as clean; drop one")
    supplier = printable(options.supplier)
    with contextlib.ExitStack() as stack:
        places = IngestPaths(*(stack.enter_context(replacing(path)) for path in outputs))
        places.quarantine.mkdir()
        clean = staged(trusted, "trusted set", params, folder=places.quarantine, source=TRUSTED_SOURCE)
        class_names = classes_of(clean[0], clean[1], trusted)
        model = registered_name(options.name, class_names)
        earlier = _earlier(options, model, class_names, places.quarantine / "accepted")
        folder, limit = places.quarantine, options.limit
        intake, _ = staged(data, "delivery", params, folder=folder, source=supplier, limit=limit, earlier=earlier)
        _check_delivery(intake, earlier, class_names, data, params)
        keep, removed = _without_copies(clean[0], {*intake.digests, *earlier.labels}, params)
        keep = clean[0].evenly(keep, params.trusted_images)
        write = functools.partial(write_dataset, class_names=class_names, shard_images=params.shard_images)
        trusted_info = write(places.trusted_set, clean[0].accepted(class_names, keep), supplier=TRUSTED_SOURCE)
        rows = itertools.chain(earlier.batches(), intake.accepted(class_names, intake.kept()))
        info = write(places.dataset, rows, supplier=_suppliers(earlier, supplier, intake))
        info = _write_truth(places, info, options)
        summary = _write_summary(places.quarantine, intake, clean[0], removed)
        shutil.rmtree(places.quarantine / "accepted", ignore_errors=True)
    nothing_new = None
    if options.workspace and not info.trial:
        about = {"run_id": options.run_id, "supplier": supplier, "model": model}
        keep_refused(outputs.quarantine / "quarantine.parquet", options.workspace, **about)
        digests = {"data": info.digest, "trusted": trusted_info.digest}
        nothing_new = None if options.again else decided(options.workspace, model, **digests)
        kept = options.workspace / STORE / f"{options.run_id}.parquet"
        about |= {"quarantine_sha256": sha256_file(kept) if kept.is_file() else None}
        append(options.workspace, "delivery", {**about, **summary._asdict(), "digests": digests})
    return {
        **summary._asdict(),
        "num_images": info.num_images,
        "left_out": earlier.left_out,
        "base": earlier.base,
        "nothing_new": nothing_new,
        "digest": info.digest,
        "trusted_digest": trusted_info.digest,
        "trusted_images": trusted_info.num_images,
        "trusted_removed": removed,
        "class_names": class_names,
        "model": model,
        "trial": info.trial,
        "paths": {name: str(path) for name, path in outputs._asdict().items()},
    }


def _earlier(options: IngestOptions, model: str, class_names: list[str], out: Path) -> Earlier:
    """What was accepted, rejected and released before; nothing without a workspace, or for a trial."""
    if options.workspace is None or options.poison.attack:
        return Earlier()
    return read_earlier(options.workspace, model, class_names, out)


def _suppliers(earlier: Earlier, supplier: str, intake: Intake) -> str:
    """Whom the union came from."""
    known = earlier.info.supplier.split(", ") if earlier.info else []
    return ", ".join(sorted({*known, *intake.suppliers(supplier)}))


def staged(
    uri: str, name: str, params: Ingest, *, folder: Path, source: str, limit: int = 0, earlier: Earlier | None = None
) -> tuple[Intake, tuple[str, ...] | None]:
    """The staged delivery and the class names in its metadata."""
    prefix = "" if name == "delivery" else "trusted-"
    told = functools.partial(progress, "ingest", note=name)
    with read_delivery(uri, name=name, limits=params, limit=limit) as delivery:
        intake = take_in(delivery, folder=folder, prefix=prefix, source=source, limits=params, told=told, earlier=earlier)
    if intake.delivered == intake.num_released:
        raise DataError(f"{name} {uri!r} is empty: no file in it; check the path")
    if not intake.usable:
        reasons = ", ".join(f"{count} {reason}" for reason, count in intake.summary().reasons.items())
        raise DataError(
            f"{name} {uri!r}: none of {intake.delivered} files is usable ({reasons}); deliver images in class folders or Parquet"
        )
    return intake, delivery.class_names


def classes_of(clean: Intake, named: tuple[str, ...] | None, uri: str) -> list[str]:
    """The classes of a trusted set: its metadata's names in their order, else its labels sorted; raises DataError on one class only."""
    present = [name for name, count in clean.counts().items() if count]
    if len(present) < 2:
        raise DataError(f"trusted set {uri!r}: one class only ({present[0]!r}); expected images of at least 2 classes, one folder each")
    return list(named) if named else sorted(present, key=lambda name: (not name.isdecimal(), len(name) if name.isdecimal() else 0, name))


def _check_delivery(intake: Intake, earlier: Earlier, class_names: Sequence[str], uri: str, params: Ingest) -> None:
    """Refuses a delivery that cannot be trained on, even with all that was accepted before.

    Raises:
        DataError: labels outside the classes, one class only, or too few images of a class.
    """
    used = {intake.label_names[label] for label in set(intake.labels)}
    if strays := sorted(used - set(class_names)):
        close = difflib.get_close_matches(strays[0], class_names, n=1, cutoff=0.5)
        nearest = f"did you mean {close[0]!r}?" if close else f"its classes: {_listed(class_names)}"
        raise DataError(f"delivery {uri!r}: labels outside the trusted set's classes: {_listed(strays)}; {nearest}")
    before, now = Counter(earlier.labels.values()), intake.counts()
    counts = {name: before[name] + now.get(name, 0) for name in class_names if name in before or name in now}
    if len(counts) < 2:
        raise DataError(f"delivery {uri!r}: one class only ({next(iter(counts))!r}); expected at least 2 of {_listed(class_names)}")
    for name, count in counts.items():
        if count < params.min_per_class:
            raise DataError(
                f"delivery {uri!r}: class {name!r} has {count} usable images, expected at least {params.min_per_class}; "
                "deliver more of it, or lower ingest.min_per_class"
            )


def _without_copies(clean: Intake, delivered: set[bytes], params: Ingest) -> tuple[npt.NDArray[np.bool_], int]:
    """Which trusted images stay when exact copies of what was ever delivered go, by pixel digest, and how many go.

    Raises:
        DataError: so many go that the trusted set was not held apart.
    """
    kept = clean.kept()
    copies = kept & np.array([digest in delivered for digest in clean.digests], bool)
    removed, total = int(copies.sum()), int(kept.sum())
    if removed > params.max_trusted_overlap * total:
        raise DataError(
            f"trusted set: {removed} of its {total} images are exact copies from the delivery, expected at most "
            f"{params.max_trusted_overlap:.1%}; hold apart images that the supplier has never had"
        )
    return kept & ~copies, removed


def _write_truth(places: IngestPaths, info: DatasetInfo, options: IngestOptions) -> DatasetInfo:
    """Writes what is known about the poison; for a trial the data set is poisoned first and its new description returned."""
    if options.poison.attack is None:
        write_truth(places.truth, read_truth(Path(options.truth_source)) if options.truth_source else None)
        return info
    from components.poison import poison

    clean = places.dataset.rename(places.dataset.with_name("clean"))
    poison(clean, places.dataset, truth=places.truth, params=options.poison, seed=options.seed)
    return read_info(places.dataset)


def _write_summary(folder: Path, intake: Intake, clean: Intake, removed: int) -> Summary:
    """Writes `summary.json` after checking that no file was lost, and removes the stages."""
    told = []
    for one in (intake, clean):
        one.stage.unlink()
        summary = one.summary()
        if summary.accepted + summary.duplicates + summary.quarantined != summary.delivered:
            raise RuntimeError(f"files were lost on the way: {summary}")
        told.append(summary)
    write_json(folder / "summary.json", told[0]._asdict() | {"trusted": told[1]._asdict() | {"removed": removed}})
    return told[0]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@kfp_component
def ingest_step(
    data: str,
    trusted: str,
    records: str,
    workspace: str,
    run_id: str,
    name: str,
    supplier: str,
    limit: int,
    again: bool,
    truth_source: str,
    seed: int,
    params: dict,
    poison: dict,
    dataset: dsl.Output[dsl.Dataset],
    trusted_set: dsl.Output[dsl.Dataset],
    quarantine: dsl.Output[dsl.Artifact],
    truth: dsl.Output[dsl.Artifact],
    digest: dsl.OutputPath(str),
    base: dsl.OutputPath(str),
) -> bool:
    """Takes a delivery and a trusted set in; the unnamed output says whether there is anything new to train on.

    Args:
        data: delivery; local path or s3://bucket/prefix.
        trusted: trusted set; the same forms.
        records: prefix of the step records.
        workspace: folder of the data registry, the audit log and the quarantine.
        run_id: the run that takes it in.
        name: name of the registered model, before the digest of its class list.
        supplier: who sent the delivery.
        limit: take in only the first so many files; 0 for all.
        again: train although nothing is new.
        truth_source: TRUTH folder of the delivery, or empty.
        seed: seed of the poison of a trial.
        params: section `ingest` of params.yaml.
        poison: section `poison` of params.yaml.
        dataset: the data set.
        trusted_set: the trusted set, as a data set of its own.
        quarantine: refused files with reasons.
        truth: what is known about the poison.
        digest: digest of the data set.
        base: digest of the accepted data set that it was added to, or `none`.
    """
    from pathlib import Path

    from cbd.config import Ingest, Poison, check_section
    from components.ingest import IngestOptions, IngestPaths, ingest
    from components.records import step

    with step(records, "ingest") as outputs:
        attack = check_section(Poison, poison, name="poison")
        known = {"workspace": Path(workspace), "name": name, "run_id": run_id, "again": again}
        options = IngestOptions(supplier, int(limit), truth_source, attack, int(seed), **known)
        places = IngestPaths(*(Path(artifact.path) for artifact in (dataset, trusted_set, quarantine, truth)))
        outputs |= ingest(data, trusted, outputs=places, params=check_section(Ingest, params, name="ingest"), options=options)
        Path(digest).write_text(outputs["digest"])
        Path(base).write_text(outputs["base"] or "none")
    return outputs["nothing_new"] is None
