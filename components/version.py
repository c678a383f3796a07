"""Third step: the data set and the trusted set are committed to the data registry and tagged, their shards pushed to the remote."""

import contextlib
import datetime
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.bundle import bundle_digest, read_card
from cbd.dataset import read_manifest, verify_dataset
from cbd.errors import DataError
from cbd.truth import read_truth
from components.places import Place, of_canary, of_control, of_delivery, of_poisoned_copy, of_suspects, of_trusted_set
from components.records import kfp_component
from components.registry import store
from components.suspect_list import write_suspects


def version(
    dataset: Path, *, workspace: str, supplier: str | None = None, truths: Sequence[Path] = (), date: str | None = None
) -> dict[str, Any]:
    """Commit (`revision`), `tag` and `digest` of the data set in the workspace's data registry; the same digest is stored once.

    A trial is a poisoned copy and is stored with its truths.

    Args:
        dataset: folder of the data set.
        workspace: gets `registry/` (git and DVC) and `remote/` (the shards) if they are not there.
        supplier: names the tag `<date>/<supplier>/<first 12 of the digest>`, made safe; None takes the data set's own.
        truths: what is known about the poison, one folder for each attack; not looked at unless the data set is a trial.
        date: YYYY-MM-DD; by default today in UTC.

    Raises:
        DataError: the data set is missing or altered, or a trial whose truth is missing or another one's.
        EnvironmentFault: the registry or the remote cannot be written.
    """
    info, day = verify_dataset(dataset), date or _today()
    if not info.trial:
        return _keep(dataset, info.digest, of_delivery(supplier or info.supplier, day), workspace)
    return _keep(dataset, info.digest, of_poisoned_copy("-".join(_attacks_on(dataset, truths)), day), workspace, truths)


def version_canary(dataset: Path, *, workspace: str, truths: Sequence[Path], date: str | None = None) -> dict[str, Any]:
    """As `version`, of a poisoned copy that shows what a test can see; its tag is `canary/<date>/<first 12 of the digest>`."""
    info = verify_dataset(dataset)
    if not info.trial:
        raise DataError(f"{dataset}: is no canary, for no attack was put in; make one with `cbd poison`")
    _attacks_on(dataset, truths)
    return _keep(dataset, info.digest, of_canary(date or _today()), workspace, truths)


def version_trusted_set(trusted_set: Path, *, workspace: str, date: str | None = None) -> dict[str, Any]:
    """As `version`, of a trusted set; its tag is `trusted/<date>/<first 12 of the digest>`."""
    info = verify_dataset(trusted_set)
    if info.trial:
        raise DataError(f"{trusted_set}: was poisoned on purpose, which no trusted set is; add it with its truth")
    return _keep(trusted_set, info.digest, of_trusted_set(date or _today()), workspace)


def version_control(bundle: Path, *, workspace: str, date: str | None = None) -> dict[str, Any]:
    """As `version`, of a model of honest data; its tag is `control/<date>/<first 12 of the digest>`."""
    card = read_card(bundle)
    if card.trial or card.kind == "confounder":
        raise DataError(
            f"{bundle}: no clean control: {'a confounder' if card.kind == 'confounder' else 'of poisoned data'}; train on trusted data"
        )
    digest = bundle_digest(bundle)
    return _keep(bundle, digest, of_control(digest, date or _today()), workspace)


def version_suspects(table: Path, *, workspace: str, date: str | None = None, **about: str) -> dict[str, Any]:
    """As `version`, of the list of suspects in an evidence table; its tag is `suspects/<date>/<first 12 of the digest>`.

    Without a suspect nothing is stored, and all three are None.

    Args:
        table: the evidence table.
        workspace: as for `version`.
        date: as for `version`.
        about: `run_id`, `data_digest` and `model_digest`.
    """
    with tempfile.TemporaryDirectory() as folder:
        listed = write_suspects(table, Path(folder) / "list", **about)
        if not listed.num_suspects:
            return dict.fromkeys(("revision", "tag", "digest"))
        return _keep(Path(folder) / "list", listed.digest, of_suspects(date or _today()), workspace)


def _keep(folder: Path, digest: str, place: Place, workspace: str, truths: Sequence[Path] = ()) -> dict[str, Any]:
    with _in_one(truths) as truth:
        stored = store(folder, digest, place, workspace=Path(workspace), truth=truth)
    return {"revision": stored.revision, "tag": stored.tag, "digest": digest}


def _attacks_on(dataset: Path, truths: Sequence[Path]) -> list[str]:
    """The attacks that made a trial; raises DataError unless each truth is about samples of it."""
    known = [read_truth(truth) for truth in truths]
    if not known or None in known:
        raise DataError("a trial is stored with its roles and parameters; give the folder that `cbd poison` wrote with --truth")
    samples = set(read_manifest(dataset)["sample_id"].to_pylist())
    for truth, one in zip(truths, known, strict=True):
        marked = one.samples_with("poison", "cover") if one else set()
        if not marked or not marked <= samples:
            raise DataError(f"{truth}: is about other samples than {dataset}; give the truth that was written with it")
    return [one.attack for one in known if one]


@contextlib.contextmanager
def _in_one(truths: Sequence[Path]) -> Iterator[Path | None]:
    """The truth, a folder of several, numbered in their order, or None."""
    if len(truths) < 2:
        yield truths[0] if truths else None
        return
    with tempfile.TemporaryDirectory() as folder:
        for number, truth in enumerate(truths, 1):
            shutil.copytree(truth, Path(folder) / str(number))
        yield Path(folder)


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


@kfp_component
def version_step(
    records: str,
    dataset: dsl.Input[dsl.Dataset],
    trusted_set: dsl.Input[dsl.Dataset],
    truth: dsl.Input[dsl.Artifact],
    workspace: str,
    supplier: str,
    revision: dsl.OutputPath(str),
):
    """Versions a data set, its trusted set and the truth of a trial in the data registry.

    Args:
        records: prefix of the step records.
        dataset: the data set.
        trusted_set: the trusted set.
        truth: what is known about the poison.
        workspace: folder of the registry and its remote.
        supplier: who sent the delivery.
        revision: commit of the data set in the registry.
    """
    from pathlib import Path

    from components.attestation import attest_version
    from components.records import step
    from components.version import version, version_trusted_set

    with step(records, "version") as outputs:
        outputs["trusted_tag"] = version_trusted_set(Path(trusted_set.path), workspace=workspace)["tag"]
        outputs |= version(Path(dataset.path), workspace=workspace, supplier=supplier, truths=[Path(truth.path)])
        sets = (Path(dataset.path), Path(trusted_set.path))
        outputs["attestation"] = attest_version(records, *sets, revision=outputs["revision"], workspace=workspace)
        Path(revision).write_text(outputs["revision"])
