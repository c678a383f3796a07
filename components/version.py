"""Third step: the data set and the trusted set are committed to the data registry and tagged, their shards pushed to the remote."""

import datetime
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.dataset import read_manifest, read_truth, verify_dataset
from cbd.errors import DataError
from components.records import kfp_component
from components.registry import of_delivery, of_poisoned_copy, of_trusted_set, store


def version(
    dataset: Path,
    *,
    workspace: str,
    supplier: str | None = None,
    truth: Path | None = None,
    date: str | None = None,
) -> dict[str, Any]:
    """Commit (`revision`), `tag` and `digest` of the data set in the workspace's data registry; the same digest is stored once.

    A trial is a poisoned copy and is stored with its truth.

    Args:
        dataset: folder of the data set.
        workspace: gets `registry/` (git and DVC) and `remote/` (the shards) if they are not there.
        supplier: names the tag `<date>/<supplier>/<first 12 of the digest>`, made safe; None takes the data set's own.
        truth: folder with what is known about the poison; not looked at unless the data set is a trial.
        date: YYYY-MM-DD; by default today in UTC.

    Raises:
        DataError: the data set is missing or altered, or a trial whose truth is missing or another one's.
        EnvironmentFault: the registry or the remote cannot be written.
    """
    info, day = verify_dataset(dataset), date or _today()
    place = of_poisoned_copy(_attack_on(dataset, truth), day) if info.trial else of_delivery(supplier or info.supplier, day)
    stored = store(dataset, info, place, workspace=Path(workspace), truth=truth if info.trial else None)
    return {"revision": stored.revision, "tag": stored.tag, "digest": info.digest}


def version_trusted_set(trusted_set: Path, *, workspace: str, date: str | None = None) -> dict[str, Any]:
    """As `version`, of a trusted set; its tag is `trusted/<date>/<first 12 of the digest>`."""
    info = verify_dataset(trusted_set)
    stored = store(trusted_set, info, of_trusted_set(date or _today()), workspace=Path(workspace))
    return {"revision": stored.revision, "tag": stored.tag, "digest": info.digest}


def _attack_on(dataset: Path, truth: Path | None) -> str:
    """The attack that made a trial; raises DataError unless the truth is about these samples."""
    known = read_truth(truth) if truth else None
    if known is None:
        raise DataError("a trial is stored with its roles and parameters; give the folder that `cbd poison` wrote with --truth")
    if sorted(known.sample_ids) != sorted(read_manifest(dataset)["sample_id"].to_pylist()):
        raise DataError(f"{truth}: is about other samples than {dataset}; give the truth that was written with it")
    return known.attack


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

    from components.records import step
    from components.version import version, version_trusted_set

    with step(records, "version") as outputs:
        outputs["trusted_tag"] = version_trusted_set(Path(trusted_set.path), workspace=workspace)["tag"]
        outputs |= version(Path(dataset.path), workspace=workspace, supplier=supplier, truth=Path(truth.path))
        Path(revision).write_text(outputs["revision"])
