"""The remote of the data registry, where shards lie. The only module that knows DVC.

DVC's hashes are MD5, so they only find what was damaged by accident; who fetches compares SHA-256 as well.
"""

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbd.errors import DataError, EnvironmentFault
from components.git import AS_THEY_ARE, git

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
        for stray in _local(registry).glob("**/.*.tmp"):
            stray.unlink()  # a second copy of what DVC moves straight to a local remote, or what a kill left
    except DvcException as error:
        text = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{registry}: DVC cannot store the data set: {text}; check the remote and its free space") from None


def local_objects(registry: Path) -> Iterator[tuple[Path, str]]:
    """Each object of a remote beside the registry, and the MD5 that its name says; without what DVC has not finished."""
    for path in sorted(_local(registry).glob("*/*")):
        if path.is_file() and not path.name.startswith("."):
            yield path, path.parent.name + path.name.removesuffix(".dir")


def missing_objects(registry: Path) -> list[Path]:
    """What versions in the registry, also earlier ones, consist of and the remote beside it lacks; nothing if the remote is elsewhere."""
    config = registry / ".dvc" / "config"
    if not config.is_file() or f"url = {_LOCAL_REMOTE}\n" not in config.read_text():
        return []
    history = git(registry, "log", "--format=", *AS_THEY_ARE, "--all", "--", "*.dvc")
    wanted = {_local(registry) / name[:2] / name[2:] for name in re.findall(r"^\+- md5: ([0-9a-f]{32}(?:\.dir)?)$", history, re.M)}
    for folder in [path for path in wanted if path.suffix == ".dir" and path.is_file()]:
        names = re.findall(r'"md5": "([0-9a-f]{32})"', folder.read_text())
        wanted |= {_local(registry) / name[:2] / name[2:] for name in names}
    return sorted(path for path in wanted if not path.is_file())


def _local(registry: Path) -> Path:
    return registry.parent / "remote" / "files" / "md5"


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
    """DVC's repository class, with its advice for people at a terminal switched off.

    It reads pickles from its caches, which lie where everybody may write, or where the registry's own settings say: it gets new ones.
    """
    import logging

    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    os.environ["DVC_SITE_CACHE_DIR"] = _new_caches().name
    return Repo


@functools.cache
def _new_caches() -> tempfile.TemporaryDirectory[str]:
    """Of this process alone, with which they go."""
    return tempfile.TemporaryDirectory(prefix="cbd-")
