"""Third step: the data set and the trusted set are committed to the data registry and tagged, their shards pushed to the remote."""

import datetime
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.dataset import DatasetInfo, read_truth, verify_dataset
from cbd.errors import DataError
from components.ingest import TRUSTED_SOURCE
from components.records import kfp_component
from components.registry import Place, of_delivery, of_poisoned_copy, of_trusted_set, store


def version(
    dataset: Path,
    *,
    workspace: str,
    supplier: str | None = None,
    trusted_set: Path | None = None,
    truth: Path | None = None,
    date: str | None = None,
) -> dict[str, Any]:
    """Commit (`revision`), `tag` and `digest` of the data set in the workspace's data registry; the same digest is stored once.

    A trial is a poisoned copy and is stored with its truth; a data set that ingest wrote from trusted images is a trusted set.

    Args:
        dataset: folder of the data set.
        workspace: gets `registry/` (git and DVC) and `remote/` (the shards) if they are not there.
        supplier: names the tag `<date>/<supplier>/<first 12 of the digest>`, made safe; None takes the data set's own.
        trusted_set: folder of a trusted set that is stored before it; `trusted_tag` in the result.
        truth: folder with what is known about the poison; not looked at unless the data set is a trial.
        date: YYYY-MM-DD; by default today in UTC.

    Raises:
        DataError: a data set is missing or altered, or a trial without its truth.
        EnvironmentFault: the registry or the remote cannot be written.
    """
    day = date or datetime.datetime.now(datetime.UTC).date().isoformat()
    told: dict[str, Any] = {}
    if trusted_set is not None:
        info = verify_dataset(trusted_set)
        told["trusted_tag"] = store(trusted_set, info, of_trusted_set(day), workspace=Path(workspace)).tag
    info = verify_dataset(dataset)
    place = _place_of(info, supplier, truth, day)
    stored = store(dataset, info, place, workspace=Path(workspace), truth=truth if info.trial else None)
    return {"revision": stored.revision, "tag": stored.tag, "digest": info.digest} | told


def _place_of(info: DatasetInfo, supplier: str | None, truth: Path | None, day: str) -> Place:
    if info.trial:
        known = read_truth(truth) if truth else None
        if known is None:
            raise DataError("a trial is stored with its roles and parameters; give the folder that `cbd poison` wrote with --truth")
        return of_poisoned_copy(known.attack, day)
    return of_trusted_set(day) if supplier is None and info.supplier == TRUSTED_SOURCE else of_delivery(supplier or info.supplier, day)


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
    from components.version import version

    with step(records, "version") as outputs:
        also = {"trusted_set": Path(trusted_set.path), "truth": Path(truth.path)}
        outputs |= version(Path(dataset.path), workspace=workspace, supplier=supplier, **also)
        Path(revision).write_text(outputs["revision"])
