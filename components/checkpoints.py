"""Where a killed training goes on: a file of the workspace, or an object of a bucket that the workspace names by its SHA-256."""

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd.errors import ConfigError, DataError
from cbd.files import replacing, sha256_file
from components.records import progress

if TYPE_CHECKING:
    from cbd.training import OnEpoch
    from components.object_store import Store

BUCKET = "CBD_CHECKPOINTS"
"""Address (s3://bucket/prefix) at which checkpoints lie instead; the workspace keeps their digests only."""


def going_on(path: Path, on_epoch: "OnEpoch") -> dict[str, Any]:
    """`checkpoint` and `on_epoch` for a training that goes on from what it saved at `path`, on whatever machine it was.

    With a bucket the training's file is a temporary one. After every epoch it is put there, whole or not at all, under its SHA-256, and
    only then named in `<path>.sha256`: what was killed in between finds the epoch before. Nothing that the workspace does not name is read.

    Raises:
        ConfigError: the bucket's address is none.
        DataError: the object has another SHA-256 than the workspace says.
        EnvironmentFault: the bucket is out of reach.
    """
    store = _bucket(path.parent.name)
    if store is None:
        return {"checkpoint": path, "on_epoch": on_epoch}
    from cbd.distributed import is_first

    folder, named = Path(tempfile.mkdtemp(prefix="cbd-checkpoint-")), path.with_name(f"{path.name}.sha256")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / path.name
    if named.is_file():
        _bring(store, named.read_text().strip(), file)

    def tell(done: int, total: int, measures: dict[str, float]) -> None:
        if is_first():  # of processes that train together, the one that wrote the file
            _keep(store, file, named)
        on_epoch(done, total, measures)

    return {"checkpoint": file, "on_epoch": tell}


def _bucket(place: str) -> "Store | None":
    address = os.environ.get(BUCKET)
    if not address:
        return None
    if not address.startswith("s3://"):
        raise ConfigError(f"{BUCKET}={address}: expected s3://bucket/prefix")
    from components.object_store import open_store

    return open_store(f"{address.rstrip('/')}/{place}", told=f"{BUCKET} {address}")


def _bring(store: "Store", sha256: str, file: Path) -> None:
    """Writes the object of this SHA-256 to `file`, unless it is gone: then the training starts anew."""
    data = store.get(_name(sha256))
    if data is None:
        progress("checkpoint", 0, 1, f"{sha256[:12]} is no longer in the bucket, training starts anew")
        return
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DataError(f"{store.told}: {_name(sha256)[:12]}: altered: SHA-256 is {found[:12]}; delete it, and training starts anew")
    file.write_bytes(data)


def _keep(store: "Store", file: Path, named: Path) -> None:
    sha256, before = sha256_file(file), named.read_text().strip() if named.is_file() else None
    if sha256 == before:
        return
    store.put_once(_name(sha256), file.read_bytes())
    with replacing(named) as temporary:
        temporary.write_text(f"{sha256}\n")
    if before:
        store.delete(_name(before))


def _name(sha256: str) -> str:
    return f"{sha256}.safetensors"
