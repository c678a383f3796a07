"""The data registry: versions of data sets, models of honest data and lists of suspects in a git repository; their files lie in a remote.

Their description (`dataset.json`, `model.json`, `suspects.json`), committed beside each pointer to files, holds the SHA-256 of these.

By default both lie in the workspace. `CBD_REGISTRY_GIT` names a git repository that the registry is cloned from and pushed to, and
`CBD_REGISTRY_REMOTE` the address of the shards (s3://bucket/prefix), for workspaces that share them.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from cbd.bundle import CARD, BundleCard, bundle_digest, read_card
from cbd.dataset import INFO, DatasetInfo, verify_dataset
from cbd.errors import DataError, EnvironmentFault
from cbd.files import replacing, sha256_file, write_json
from cbd.truth import read_truth
from components.git import ATTEMPTS, follow, git, held, origin, publish
from components.places import CONTROL, DELIVERY, SUSPECTS, Place, kind_of, path_of
from components.shard_store import bring, send, start, told_as_damage
from components.suspect_list import INFO as LIST
from components.suspect_list import SuspectList, read_suspects

REMOTE = "CBD_REGISTRY_REMOTE"
TRUTH = ".truth"
"""Added to the path of a poisoned copy: what is known of it."""
Description = DatasetInfo | BundleCard | SuspectList
_FILES = {CONTROL: CARD, SUSPECTS: LIST}
"""What describes a kind; all others have `dataset.json`."""


class OlderVersion(DataError):
    """A data set whose format is no longer read."""


class Version(NamedTuple):
    """Where something lies in the registry: the commit and its tag."""

    revision: str
    tag: str


def store(folder: Path, digest: str, place: Place, *, workspace: Path, truth: Path | None = None) -> Version:
    """The version under which a data set or model of this digest now lies in the workspace's registry; beside it its `truth`.

    The data is in the remote before the commit, and the commit is there before the tag: a killed run leaves nothing that looks whole.

    With an origin the version is published before this returns, and made again on top of what others have published meanwhile.

    Raises:
        DataError: the same data set lies there with another truth.
        EnvironmentFault: the registry, the remote or the origin cannot be written.
    """
    registry = workspace / "registry"
    with held(registry):
        for _ in range(ATTEMPTS):
            _open(workspace)
            found = _find(registry, digest, kind_of(place.tag))
            if found and truth and _known_sums(registry, found.tag, place.path) != _sums(truth):
                raise DataError(f"{found.tag}: lies there with another truth; a poisoned copy has one, poison another copy to correct it")
            stored = found or _commit(registry, folder, digest, place, truth)
            if publish(registry, stored.tag):
                return stored
        raise EnvironmentFault(f"{registry}: others keep publishing to {origin()}; run again")


def _commit(registry: Path, folder: Path, digest: str, place: Place, truth: Path | None) -> Version:
    path, tag = Path(place.path), f"{place.tag}/{digest[:12]}"
    (registry / path.parent).mkdir(exist_ok=True)
    send(registry, folder, path)
    shutil.copyfile(folder / _FILES.get(kind_of(tag), INFO), registry / f"{path}.json")
    git(registry, "add", "--", f"{path}.dvc", f"{path}.json")
    if truth is not None:
        known = f"{path}{TRUTH}"
        send(registry, truth, Path(known))
        write_json(registry / f"{known}.json", _sums(truth))
        git(registry, "add", "--", f"{known}.dvc", f"{known}.json")
    if git(registry, "status", "--porcelain", "--untracked-files=no"):
        git(registry, "commit", "--quiet", "--message", f"Store a {kind_of(tag)}\n\ndigest: {digest}")
    git(registry, "tag", "--annotate", "--message", f"digest: {digest}", "--", tag)
    return Version(git(registry, "rev-parse", "HEAD"), tag)


def find(workspace: Path, digest: str, *, kind: str = DELIVERY) -> Version | None:
    """The version of what has this digest, by default a supplier's data set; None if the registry has none of this kind."""
    registry = _current(workspace)
    return _find(registry, digest, kind) if registry else None


def _find(registry: Path, digest: str, kind: str) -> Version | None:
    for tag in git(registry, "tag", "--list", f"*/{digest[:12]}").splitlines():
        if kind_of(tag) == kind and _tagged_digest(registry, tag) == digest:
            return Version(git(registry, "rev-parse", f"{tag}^{{commit}}"), tag)
    return None


def versions(workspace: Path) -> list[tuple[str, Description]]:
    """Tag and description of all that is in the registry, the oldest first; data sets that an older version wrote are left out.

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


def fetch(tag: str, out: Path, *, workspace: Path, truth: Path | None = None) -> Description:
    """The description of what lies under `tag`, which is brought to `out` from the remote and verified; its truth is brought to `truth`.

    Raises:
        DataError: no such tag, or an object in the remote is missing or altered, or there is no truth.
    """
    registry = _current(workspace)
    found = _described(registry, tag) if registry and tag in git(registry, "tag", "--list").splitlines() else None
    if registry is None or found is None:
        raise DataError(f"{workspace / 'registry'}: no data set is tagged {tag!r}; `cbd data list` shows all")
    path, about = found
    told = _tagged_digest(registry, tag)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(out))
        bring(registry, tag, path, temporary)
        with told_as_damage(tag, temporary):
            digest = _digest_of(temporary, kind_of(tag))
        if digest != told:
            raise DataError(f"{tag}: altered: the remote holds digest {digest[:12]}, the registry says {told[:12]}")
        if truth is not None:
            _fetch_truth(registry, tag, path, stack.enter_context(replacing(truth)))
    return about


def _fetch_truth(registry: Path, tag: str, path: str, out: Path) -> None:
    known = _known_sums(registry, tag, path)
    if known is None:
        raise DataError(f"{tag}: no truth is stored with it; only poisoned copies have one")
    bring(registry, tag, f"{path}{TRUTH}", out)
    if _sums(out) != known:
        raise DataError(f"{tag}: its truth in the remote is altered; restore the remote")
    for one in [out] if any(path.is_file() for path in out.iterdir()) else out.iterdir():
        read_truth(one)


def _digest_of(folder: Path, kind: str) -> str:
    """The digest of what lies in a folder, after it was verified."""
    if kind == CONTROL:
        read_card(folder)
        return bundle_digest(folder)
    return read_suspects(folder).digest if kind == SUSPECTS else verify_dataset(folder).digest


def _known_sums(registry: Path, tag: str, path: str) -> dict[str, str] | None:
    """SHA-256 of the files of the truth of what lies at `path`, as committed; None if there is none."""
    if (text := _committed(registry, tag, f"{path}{TRUTH}.json")) is None:
        return None
    try:
        known: dict[str, str] = json.loads(text)
    except ValueError:
        raise DataError(f"{registry}: {path}{TRUTH}.json under {tag} is malformed; restore the registry") from None
    return known


def _sums(truth: Path) -> dict[str, str]:
    """SHA-256 of every file of a truth, or of a folder of several."""
    return {path.relative_to(truth).as_posix(): sha256_file(path) for path in sorted(truth.rglob("*")) if path.is_file()}


def _tagged_digest(registry: Path, tag: str) -> str | None:
    """The digest of what lies under a tag of ours; None for a tag of somebody else."""
    message = git(registry, "tag", "--list", "--format=%(contents:subject)", "--", tag)
    return message.removeprefix("digest: ") if message.startswith("digest: ") else None


def _committed(registry: Path, tag: str, path: str) -> str | None:
    """The text of a file under a tag; None if there is none."""
    if not git(registry, "ls-tree", "--name-only", f"refs/tags/{tag}", "--", path):
        return None
    return git(registry, "show", f"refs/tags/{tag}:{path}")


def _described(registry: Path, tag: str) -> tuple[str, Description] | None:
    """Path and description of what lies under `tag`; None if the tag is of something else."""
    path, digest = path_of(tag), _tagged_digest(registry, tag)
    text = _committed(registry, tag, f"{path}.json") if path and digest else None
    if path is None or text is None:
        return None
    if kind_of(tag) == CONTROL:
        return path, _parsed(BundleCard, text, registry, f"{path}.json under {tag}")
    listed = kind_of(tag) == SUSPECTS
    if not listed and ('"schema_version": 1' in text or '"schema_version":1' in text):
        raise OlderVersion(f"{tag}: was written by an older version; start a new --workspace and take its deliveries in again")
    info = _parsed(SuspectList if listed else DatasetInfo, text, registry, f"{path}.json under {tag}")
    return (path, info) if info.digest == digest else None


def _parsed(kind: type[Any], text: str, registry: Path, told: str) -> Any:
    try:
        return kind.model_validate_json(text)
    except ValueError as error:
        raise DataError(f"{registry}: {told} is malformed: {str(error).splitlines()[0]}; restore the registry") from None


def _current(workspace: Path) -> Path | None:
    """The registry's folder, as new as its origin if it has one; None if there is none."""
    registry = workspace / "registry"
    if origin():
        with held(registry):
            follow(registry)
    return registry if (registry / ".git").is_dir() else None


def _open(workspace: Path) -> None:
    """Makes the registry and the remote if they are not there, and follows the origin if there is one."""
    registry = workspace / "registry"
    if not os.environ.get(REMOTE):
        (workspace / "remote").mkdir(exist_ok=True)
    if origin():
        follow(registry)
    if not (registry / ".git").is_dir():
        git(registry, "init", "--quiet", "--initial-branch=main")
    if git(registry, "ls-files", "--", ".dvc/config"):
        return
    git(registry, "add", "--", *start(registry, os.environ.get(REMOTE)))
    git(registry, "commit", "--quiet", "--message", "Start the data registry")
