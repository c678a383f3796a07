"""The remote of the data registry, where shards lie. The only module that knows DVC.

DVC's hashes are MD5, so they only find what was damaged by accident; who fetches compares SHA-256 as well.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbd.errors import DataError, EnvironmentFault

# The remote is named relative to the file's folder, so that a workspace may be moved. Without `verify` DVC checks out tampered objects.
_LOCAL_REMOTE = "../../remote"
_CONFIG = """\
[core]
    analytics = false
    remote = shards
['remote "shards"']
    url = {url}
    verify = true
"""


def start(registry: Path, url: str | None) -> list[str]:
    """Makes a git repository one of DVC's, whose shards lie at `url`, or beside it; the files that are to be committed."""
    _dvc().init(str(registry), force=True).close()
    (registry / ".dvc" / "config").write_text(_CONFIG.format(url=url or _LOCAL_REMOTE))
    return [".dvc/config", ".dvc/.gitignore", ".dvcignore"]


def send(registry: Path, dataset: Path, place: Path) -> None:
    """Copies a folder to the remote and writes the pointer `<place>.dvc`.

    Raises:
        EnvironmentFault: the remote cannot be written.
    """
    from dvc.exceptions import DvcException

    try:
        with _dvc()(str(registry)) as repo:
            repo.add(str(dataset.resolve()), out=str((registry / place).resolve()), to_remote=True, force=True)
        for stray in (registry.parent / "remote" / "files" / "md5").glob(".*.tmp"):
            stray.unlink()  # DVC leaves a second copy of what it moves straight to a local remote
    except DvcException as error:
        text = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{registry}: DVC cannot store the data set: {text}; check the remote and its free space") from None


def bring(registry: Path, tag: str, path: str, out: Path) -> None:
    """Copies what the pointer `<path>.dvc` under `tag` names from the remote to `out`."""
    with told_as_damage(tag, out):
        _dvc().get(str(registry), path, out=str(out), rev=tag)


@contextlib.contextmanager
def told_as_damage(tag: str, out: Path) -> Iterator[None]:
    """Turns what DVC raises over a damaged remote into one line."""
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.cache import DiskError
    from dvc_data.index import DataIndexError
    from dvc_objects.errors import ObjectDBError, ObjectFormatError

    try:
        yield
    except (DvcException, DataIndexError, DiskError, ObjectDBError, ObjectFormatError, FileNotFoundError, DataError) as error:
        text = " ".join(str(error).split())[:200].replace(str(out), "")
        raise DataError(f"{tag}: its shards in the remote are missing or altered: {text}; restore the remote") from None


def _dvc() -> Any:
    """DVC's repository class, with its advice for people at a terminal switched off."""
    import logging

    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    return Repo
