"""The data registry: a git repository with DVC pointers and a remote for the shards. The only module that knows DVC.

DVC's hashes are MD5, so they only find what was damaged by accident; `dataset.json`, committed beside each pointer, holds SHA-256.

By default both lie in the workspace. `CBD_REGISTRY_GIT` names a git repository that the registry is cloned from and pushed to, and
`CBD_REGISTRY_REMOTE` the address of the shards (s3://bucket/prefix), for workspaces that share them.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cbd.dataset import INFO, DatasetInfo, verify_dataset
from cbd.errors import DataError, EnvironmentFault
from cbd.files import disk_fault, replacing
from components.git import follow, git, origin, publish

REMOTE = "CBD_REGISTRY_REMOTE"
ATTEMPTS = 5
"""At publishing a version, if others publish at the same time."""

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


class OlderVersion(DataError):
    """A data set whose format is no longer read."""


class Version(NamedTuple):
    """Where a data set lies in the registry: the commit and its tag."""

    revision: str
    tag: str


def store(dataset: Path, info: DatasetInfo, *, workspace: Path, supplier: str, date: str) -> Version:
    """The version under which the data set now lies in the workspace's registry, its shards in the remote.

    The data is in the remote before the commit, and the commit is there before the tag: a killed run leaves nothing that looks whole.

    With an origin the version is published before this returns, and made again on top of what others have published meanwhile.

    Raises:
        EnvironmentFault: the registry, the remote or the origin cannot be written.
    """
    with _locked(workspace) as registry:
        for _ in range(ATTEMPTS):
            _open(workspace)
            stored = _find(registry, info.digest) or _commit(registry, dataset, info, supplier=supplier, date=date)
            if publish(registry, stored.tag):
                return stored
        raise EnvironmentFault(f"{registry}: others keep publishing to {origin()}; run again")


def _commit(registry: Path, dataset: Path, info: DatasetInfo, *, supplier: str, date: str) -> Version:
    place, tag = Path("datasets") / slug(supplier), f"{date}/{slug(supplier)}/{info.digest[:12]}"
    (registry / "datasets").mkdir(exist_ok=True)
    pointer, card = f"{place}.dvc", f"{place}.json"
    _transfer(registry, dataset, place)
    shutil.copyfile(dataset / INFO, registry / card)
    git(registry, "add", "--", pointer, card)
    if git(registry, "status", "--porcelain", "--untracked-files=no"):
        git(registry, "commit", "--quiet", "--message", f"Take in {info.num_images} images\n\ndigest: {info.digest}")
    git(registry, "tag", "--annotate", "--message", f"digest: {info.digest}", "--", tag)
    return Version(git(registry, "rev-parse", "HEAD"), tag)


def find(workspace: Path, digest: str) -> Version | None:
    """The version of the data set with this digest; None if the registry has none."""
    registry = _current(workspace)
    return _find(registry, digest) if registry else None


def _find(registry: Path, digest: str) -> Version | None:
    for tag in git(registry, "tag", "--list", f"*/{digest[:12]}").splitlines():
        if git(registry, "tag", "--list", "--format=%(contents:subject)", "--", tag) == f"digest: {digest}":
            return Version(git(registry, "rev-parse", f"{tag}^{{commit}}"), tag)
    return None


def versions(workspace: Path) -> list[tuple[str, DatasetInfo]]:
    """Tag and description of every data set in the registry, the oldest first; those that an older version wrote are left out.

    Raises:
        DataError: the registry's description of one is malformed.
    """
    registry = _current(workspace)
    if registry is None:
        return []
    found = []
    order = {commit: number for number, commit in enumerate(git(registry, "rev-list", "--reverse", "--topo-order", "HEAD").splitlines())}
    tags = [line.split() for line in git(registry, "tag", "--list", "--format=%(*objectname) %(refname:short)").splitlines()]
    for _, tag in sorted((pair for pair in tags if len(pair) == 2), key=lambda pair: order.get(pair[0], -1)):
        with contextlib.suppress(OlderVersion):
            if (described := _described(registry, tag)) is not None:
                found.append((tag, described[1]))
    return found


def fetch(tag: str, out: Path, *, workspace: Path) -> DatasetInfo:
    """The description of the data set under `tag`, brought to `out` from the remote and verified.

    Raises:
        DataError: no such tag, or an object in the remote is missing or altered.
    """
    from dvc.exceptions import DvcException
    from dvc_data.hashfile.cache import DiskError
    from dvc_data.index import DataIndexError
    from dvc_objects.errors import ObjectDBError, ObjectFormatError

    damage = (DvcException, DataIndexError, DiskError, ObjectDBError, ObjectFormatError, FileNotFoundError, DataError)
    registry = _current(workspace)
    found = _described(registry, tag) if registry and tag in git(registry, "tag", "--list").splitlines() else None
    if registry is None or found is None:
        raise DataError(f"{workspace / 'registry'}: no data set is tagged {tag!r}; `cbd data list` shows all")
    place, told = found
    with replacing(out) as temporary:
        try:
            _dvc().get(str(registry), place, out=str(temporary), rev=tag)
            info = verify_dataset(temporary)
        except damage as error:
            text = " ".join(str(error).split())[:200].replace(str(temporary), "")
            raise DataError(f"{tag}: its shards in the remote are missing or altered: {text}; restore the remote") from None
        if info.digest != told.digest:
            raise DataError(f"{tag}: altered: the remote holds digest {info.digest[:12]}, the registry says {told.digest[:12]}")
    return info


def _described(registry: Path, tag: str) -> tuple[str, DatasetInfo] | None:
    """Path and description of the data set under `tag`; None if the tag is of something else."""
    message = git(registry, "tag", "--list", "--format=%(contents:subject)", "--", tag)
    digest = message.removeprefix("digest: ")
    place = _place(registry, tag, digest)
    if place is None:
        return None
    text = git(registry, "show", f"refs/tags/{tag}:{place}.json")
    if '"schema_version": 1' in text or '"schema_version":1' in text:
        raise OlderVersion(f"{tag}: was written by an older version; start a new --workspace and take its deliveries in again")
    try:
        return place, DatasetInfo.model_validate_json(text)
    except ValueError as error:
        raise DataError(f"{registry}: {place}.json under {tag} is malformed: {str(error).splitlines()[0]}; restore the registry") from None


def _place(registry: Path, tag: str, digest: str) -> str | None:
    """Path of the data set with this digest under `tag`, without an ending."""
    for name in git(registry, "ls-tree", "--name-only", f"refs/tags/{tag}", "datasets/").splitlines():
        if name.endswith(".json") and f'"{digest}"' in git(registry, "show", f"refs/tags/{tag}:{name}"):
            return name.removesuffix(".json")
    return None


def slug(supplier: str) -> str:
    """The supplier's name as a safe part of paths and tags: lower-case letters, digits and dashes.

    A name that lost something gets 8 hex digits of its SHA-256, and so does a name that ends like that: two suppliers never share one.
    """
    safe = re.sub(r"[^a-z0-9]+", "-", supplier.lower()).strip("-")[:40].strip("-")
    if safe and safe == supplier and not re.search(r"-[0-9a-f]{8}$", safe):
        return safe
    return f"{safe or 'supplier'}-{hashlib.sha256(supplier.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _current(workspace: Path) -> Path | None:
    """The registry's folder, as new as its origin if it has one; None if there is none."""
    registry = workspace / "registry"
    if origin():
        with _locked(workspace):
            follow(registry)
    return registry if (registry / ".git").is_dir() else None


def _open(workspace: Path) -> None:
    """Makes the registry and the remote if they are not there, and follows the origin if there is one."""
    registry, url = workspace / "registry", os.environ.get(REMOTE) or _LOCAL_REMOTE
    if url == _LOCAL_REMOTE:
        (workspace / "remote").mkdir(exist_ok=True)
    if origin():
        follow(registry)
    if not (registry / ".git").is_dir():
        git(registry, "init", "--quiet", "--initial-branch=main")
    if git(registry, "ls-files", "--", ".dvc/config"):
        return
    _dvc().init(str(registry), force=True).close()
    (registry / ".dvc" / "config").write_text(_CONFIG.format(url=url))
    git(registry, "add", "--", ".dvc/config", ".dvc/.gitignore", ".dvcignore")
    git(registry, "commit", "--quiet", "--message", "Start the data registry")


def _transfer(registry: Path, dataset: Path, place: Path) -> None:
    """Copies the shards to the remote and writes the pointer `<place>.dvc`."""
    from dvc.exceptions import DvcException

    try:
        with _dvc()(str(registry)) as repo:
            repo.add(str(dataset.resolve()), out=str((registry / place).resolve()), to_remote=True, force=True)
        for stray in (registry.parent / "remote" / "files" / "md5").glob(".*.tmp"):
            stray.unlink()  # DVC leaves a second copy of what it moves straight to a local remote
    except DvcException as error:
        text = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{registry}: DVC cannot store the data set: {text}; check the remote and its free space") from None


@contextlib.contextmanager
def _locked(workspace: Path) -> Iterator[Path]:
    """The registry's folder, for one process at a time."""
    registry = workspace / "registry"
    try:
        registry.mkdir(parents=True, exist_ok=True)
        with (workspace / "registry.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield registry
    except OSError as error:
        raise disk_fault(registry, error) from None


def _dvc() -> Any:
    """DVC's repository class, with its advice for people at a terminal switched off."""
    import logging

    from dvc.repo import Repo

    logging.getLogger("dvc").setLevel(logging.WARNING)
    return Repo
