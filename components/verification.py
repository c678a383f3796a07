"""The evidence of a workspace, checked offline: log, heads, decisions, files. Imports neither torch nor MLflow.

Every check is a generator that yields a sentence for what holds, and raises for the first thing that does not.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cbd.errors import DataError
from cbd.files import sha256_file
from cbd.keys import PublicKey
from components.git import git, held
from components.logged import Evidence, Unverified, read_evidence
from components.registered import check_registry
from components.run_checks import check_run
from components.shard_store import local_objects, missing_objects


def verify_all(workspace: Path, *, trusted: Sequence[PublicKey] = ()) -> Iterator[str]:
    """A sentence for everything in a workspace that holds; runs in the order of their names. What cannot be checked is `Unverified`.

    Raises:
        DataError: names the first thing that is missing or altered.
        EnvironmentFault: the data registry's origin is out of reach.
    """
    evidence, held = read_evidence(workspace, trusted=trusted)
    yield from held
    yield from check_workspace(evidence)
    folders = sorted(path for path in (workspace / "runs").glob("*") if path.is_dir())
    for folder in folders:
        if evidence.last(folder.name, "closed"):
            yield from (f"{folder.name}: {sentence}" for sentence in check_run(folder, evidence))
        elif folder.name in evidence.runs:
            yield Unverified(f"{folder.name}: NOT VERIFIED: the run was never closed, nothing sealed its files")
        else:
            yield Unverified(f"{folder.name}: NOT VERIFIED: the run ended before the log heard of it")
    if gone := sorted({name for name in evidence.runs if evidence.last(name, "closed")} - {folder.name for folder in folders}):
        yield Unverified(f"gone: NOT VERIFIED: {len(gone)} runs that the log knows have no folder any more, such as {gone[0]}")


def verify_run(folder: Path, workspace: Path, *, trusted: Sequence[PublicKey] = ()) -> Iterator[str]:
    """A sentence for everything about one run that holds, the log and its heads first; raises as `verify_all`."""
    evidence, held = read_evidence(workspace, trusted=trusted)
    yield from held
    yield from check_run(folder, evidence)


def check_workspace(evidence: Evidence) -> Iterator[str]:
    """Checks what the log says about the workspace, besides its runs: results of canaries and of later tests, and who is promoted."""
    for check in WORKSPACE_CHECKS:
        yield from check(evidence)


def _check_kept(evidence: Evidence) -> Iterator[str]:
    """That results which outlive their runs, where they are still kept, are those that the log names."""
    found = 0
    for name, expected in evidence.kept.items():
        path = evidence.workspace / name
        if path.is_file():
            if (sha256 := sha256_file(path)) != expected:
                raise DataError(f"{path}: altered: SHA-256 is {sha256[:12]}, the log says {expected[:12]}; restore it from a copy")
            found += 1
    if evidence.kept:
        yield f"canaries, quarantines, later tests: {found} of {len(evidence.kept)} results are still there, and as the log names them"


def _check_promoted(evidence: Evidence) -> Iterator[str]:
    """That MLflow's registry is what the log says, and nobody stands there by an override that is over."""
    yield from check_registry(evidence.workspace, evidence.moves, signers=evidence.signers, key=evidence.key)


def _check_registry_files(evidence: Evidence) -> Iterator[str]:
    """That the data registry's files are as committed, and its history is whole."""
    registry = evidence.workspace / "registry"
    if not (registry / ".git").is_dir():
        return
    changed = _uncommitted(registry)
    if changed and os.access(evidence.workspace, os.W_OK):
        with held(registry):  # a step that stores a version may be between file and commit: it ends first
            changed = _uncommitted(registry)
    if changed:
        raise DataError(f"{registry}: not as committed: {changed}; run there: git checkout HEAD -- .")
    git(registry, "fsck", "--no-dangling", "--no-progress")
    yield "data registry: its files are as committed, its history is whole"


def _uncommitted(registry: Path) -> str | None:
    """The first file that is not as committed, by its own bytes: git's index, which `git status` asks, can be told to look away."""
    if not git(registry, "for-each-ref", "--count=1"):
        return None
    for row in git(registry, "ls-tree", "-r", "-z", "HEAD").split("\0")[:-1]:
        told, _, name = row.partition("\t")
        if told.split()[-1] != _blob(registry / name):
            return name
    return None


def _blob(path: Path) -> str | None:
    """git's name of a file's content, https://git-scm.com/book/en/v2/Git-Internals-Git-Objects; None where there is no plain file."""
    if not path.is_file() or path.is_symlink():
        return None
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()


def _check_remote(evidence: Evidence) -> Iterator[str]:
    """That every object in a local DVC remote is what its name, an MD5, says, and none is missing; SHA-256 in the registry seals them."""
    registry, num_objects = evidence.workspace / "registry", 0
    for path, expected in local_objects(registry):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != expected:
            raise DataError(
                f"{path}: altered: this object of the data registry's remote has another content than its name; restore the remote"
            )
        num_objects += 1
    if num_objects:
        yield f"remote: {num_objects} objects of the data registry are what their names say"
    if (registry / ".git").is_dir() and (missing := missing_objects(registry)):
        yield Unverified(
            f"remote: NOT VERIFIED: {len(missing)} objects of versions of the data registry are missing, such as {missing[0]}; restore them"
        )


WORKSPACE_CHECKS: list[Callable[[Evidence], Iterator[str]]] = [
    _check_promoted,
    _check_registry_files,
    _check_kept,
    _check_remote,
]
"""What is checked once."""
