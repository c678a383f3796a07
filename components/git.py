"""git, run without the user's configuration, hooks and environment, and the origin that a repository may share with others."""

import os
import subprocess
from pathlib import Path
from typing import Any

from cbd.errors import EnvironmentFault

_IDENTITY = {
    "GIT_AUTHOR_NAME": "cbd",
    "GIT_AUTHOR_EMAIL": "cbd@localhost",
    "GIT_COMMITTER_NAME": "cbd",
    "GIT_COMMITTER_EMAIL": "cbd@localhost",
}
_PLAIN = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0"}

_PASSED = ("GIT_SSH_COMMAND", "GIT_ASKPASS", "GIT_SSL_CAINFO")
"""How git reaches an origin: of the user's environment only these count."""
ORIGIN = "CBD_REGISTRY_GIT"


def git(folder: Path, *arguments: str) -> str:
    """What git prints, run in the folder without the user's configuration, hooks or environment."""
    plain: dict[str, Any] = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") or name in _PASSED}
    command = ["git", "-C", str(folder), "-c", "core.hooksPath=/dev/null", "-c", "core.quotePath=false", *arguments]
    try:
        done = subprocess.run(command, env=plain | _IDENTITY | _PLAIN, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise EnvironmentFault("git is not installed; the data registry needs it: install git") from None
    except subprocess.CalledProcessError as error:
        text = " ".join((error.stderr or error.stdout).split())
        text = (text.replace(url, "the origin") if (url := origin()) else text)[:160]  # it may hold a token
        raise EnvironmentFault(f"{folder}: git {arguments[0]} failed: {text}; mend or remove the registry") from None
    return done.stdout.strip()


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
