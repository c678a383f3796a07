"""Third step: the data set is committed to the data registry and tagged, its shards pushed to the remote."""

import datetime
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.dataset import verify_dataset
from components.records import kfp_component
from components.registry import store


def version(dataset: Path, *, workspace: str, supplier: str, date: str | None = None) -> dict[str, Any]:
    """Commit (`revision`), `tag` and `digest` of the data set in the workspace's data registry; the same digest is stored once.

    Args:
        dataset: folder of the data set.
        workspace: gets `registry/` (git and DVC) and `remote/` (the shards) if they are not there.
        supplier: names the tag `<date>/<supplier>/<first 12 of the digest>`, made safe.
        date: YYYY-MM-DD; by default today in UTC.

    Raises:
        DataError: the data set is missing or altered.
        EnvironmentFault: the registry or the remote cannot be written.
    """
    info = verify_dataset(dataset)
    day = date or datetime.datetime.now(datetime.UTC).date().isoformat()
    stored = store(dataset, info, workspace=Path(workspace), supplier=supplier, date=day)
    return {"revision": stored.revision, "tag": stored.tag, "digest": info.digest}


@kfp_component
def version_step(records: str, dataset: dsl.Input[dsl.Dataset], workspace: str, supplier: str, revision: dsl.OutputPath(str)):
    """Versions a data set in the data registry.

    Args:
        records: prefix of the step records.
        dataset: the data set.
        workspace: folder of the registry and its remote.
        supplier: who sent the delivery.
        revision: commit of the data set in the registry.
    """
    from pathlib import Path

    from components.records import step
    from components.version import version

    with step(records, "version") as outputs:
        outputs |= version(Path(dataset.path), workspace=workspace, supplier=supplier)
        Path(revision).write_text(outputs["revision"])
