"""git, run without the user's configuration, hooks and environment, and the origin that a repository may share with others."""

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from cbd.errors import DataError, EnvironmentFault
from cbd.files import disk_fault, locked

_IDENTITY = {
    "GIT_AUTHOR_NAME": "cbd",
    "GIT_AUTHOR_EMAIL": "cbd@localhost",
    "GIT_COMMITTER_NAME": "cbd",
    "GIT_COMMITTER_EMAIL": "cbd@localhost",
}
_PLAIN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}

_FLAGS = ("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "core.quotePath=false", "-c", "gc.autoDetach=false")

_OURS = {
    *(f"core.{name}" for name in ("repositoryformatversion", "filemode", "bare", "logallrefupdates", "ignorecase", "symlinks")),
    *("core.precomposeunicode", "remote.origin.url", "remote.origin.fetch"),
}
"""What `git init` and `git remote add` set. Many of the others name a program: core.fsmonitor, filter.*, diff.*.textconv."""

AS_THEY_ARE = ("--patch", "--text", "--no-textconv", "--no-ext-diff", "--no-color")
"""How `git log` shows what was changed, whatever attributes of the files say."""

_PASSED = ("GIT_SSH_COMMAND", "GIT_ASKPASS", "GIT_SSL_CAINFO")
"""How git reaches an origin: of the user's environment only these count."""
ORIGIN = "CBD_REGISTRY_GIT"
ATTEMPTS = 5
"""At publishing, if others publish at the same time."""


def git(registry: Path, *arguments: str) -> str:
    """What git prints, run in the repository at `registry` and in none above it, without the user's configuration, hooks or environment.

    Whoever may write to the repository must not run programs here by that: its own configuration is read first.

    Raises:
        DataError: the repository's own configuration has another setting than cbd's.
        EnvironmentFault: git is not installed, or says no.
    """
    _check_settings(registry / ".git")
    return _run(registry, *arguments, GIT_DIR=".git", GIT_COMMON_DIR=".git")


def commit_of(code: Path) -> str:
    """The commit that the working tree of a program has, whose settings are its developer's; raises EnvironmentFault if there is none."""
    return _run(code, "rev-parse", "HEAD")


def _check_settings(place: Path) -> None:
    config = place / "config"
    if place.exists() and not place.is_dir():
        raise DataError(f"{place}: expected the repository's folder, found a file that leads elsewhere; restore the registry from a copy")
    if foreign := sorted(_settings(place.parent, config.read_bytes()) - _OURS) if config.is_file() else []:
        raise DataError(
            f"{config}: sets {foreign[0]}, which cbd does not, and which may run a program here; expected only what git init "
            f"writes; ask who added it, then: git config --file {config} --unset-all {foreign[0]}"
        )


@functools.cache
def _settings(folder: Path, config: bytes) -> frozenset[str]:
    """Names of all that a configuration file sets, as git itself reads it."""
    names = _run(folder, "config", "--file", "-", "--no-includes", "--list", "--name-only", "-z", given=config, GIT_DIR=os.devnull)
    return frozenset(name for name in names.split("\0") if name)


def _run(folder: Path, *arguments: str, given: bytes = b"", **environment: str) -> str:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _PASSED}
    command = ["git", "-C", str(folder), *_FLAGS, *arguments]
    try:
        done = subprocess.run(command, env=plain | _IDENTITY | _PLAIN | environment, input=given, capture_output=True, check=True)
    except FileNotFoundError:
        raise EnvironmentFault("git is not installed; the data registry needs it: install git") from None
    except subprocess.CalledProcessError as error:
        text = " ".join((error.stderr or error.stdout).decode(errors="replace").split())
        text = (text.replace(url, "the origin") if (url := origin()) else text)[:160]  # it may hold a token
        raise EnvironmentFault(f"{folder}: git {arguments[0]} failed: {text}; mend or remove the registry") from None
    return done.stdout.decode(errors="replace").strip()


@contextlib.contextmanager
def held(registry: Path) -> Iterator[None]:
    """The repository, whose folder is made if it is not there, for one process at a time. git's own locks, which a kill left, are removed.

    Raises:
        EnvironmentFault: it cannot be written.
    """
    try:
        registry.mkdir(parents=True, exist_ok=True)
        with locked(registry.with_name(f"{registry.name}.lock")):
            for left in (*(registry / ".git").glob("*.lock"), *(registry / ".git" / "refs").rglob("*.lock")):
                left.unlink()  # who writes holds the repository, and nothing of git goes on afterwards
            yield
    except OSError as error:
        raise disk_fault(registry, error) from None


def origin() -> str | None:
    """The repository that `CBD_REGISTRY_GIT` names."""
    return os.environ.get(ORIGIN) or None


def follow(registry: Path) -> None:
    """Makes the registry as new as its origin; without a registry it is cloned.

    Raises:
        EnvironmentFault: the origin is out of reach, or has gone another way.
    """
    url = str(origin())
    if not (registry / ".git").is_dir():
        git(registry, "init", "--quiet", "--initial-branch=main")
    known = git(registry, "remote").splitlines()
    git(registry, "remote", *(("set-url", "origin") if "origin" in known else ("add", "origin")), "--", url)
    git(registry, "fetch", "--quiet", "--tags", "--force", "origin")
    if not git(registry, "branch", "--remotes", "--list", "origin/main"):
        return
    try:
        git(registry, "merge", "--quiet", "--ff-only", "origin/main")
    except EnvironmentFault:
        raise EnvironmentFault(
            f"{registry}: holds what its origin does not, and the other way round; move it away, it is fetched again"
        ) from None


def publish(registry: Path, tag: str) -> bool:
    """Whether the origin, if there is one, has the version now; else it is taken back here, since others were faster."""
    if not origin():
        return True
    try:
        git(registry, "push", "--quiet", "--atomic", "origin", "main", f"refs/tags/{tag}")
    except EnvironmentFault:
        git(registry, "fetch", "--quiet", "origin")
        if not git(registry, "rev-list", "--max-count=1", "HEAD..origin/main"):
            raise
        git(registry, "tag", "--delete", tag)
        git(registry, "reset", "--quiet", "--hard", "origin/main")
        return False
    return True
