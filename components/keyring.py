"""The keys of a workspace: which one signs, which ones did, and which public keys of others are trusted."""

import os
import shlex
from pathlib import Path
from typing import Any

from cbd.audit import ROTATE, rotate
from cbd.errors import ConfigError, DataError
from cbd.heads import walk
from cbd.keys import (
    ENVIRONMENT,
    KEYS,
    PublicKey,
    generate_key,
    is_development,
    key_id,
    load_public_key,
    open_key,
    read_public_key,
    write_public_key,
)
from cbd.log_store import ENVIRONMENT as LOG_ADDRESS
from cbd.token_key import SCHEME
from components.anchors import close_log

TRUSTED = "trusted"
"""Folder beside the keys: `<key id>.pub` of others whose proofs are believed here."""


def rotate_key(workspace: Path, *, to: Path | str | None, reason: str, by: str) -> dict[str, Any]:
    """Hands over to another key: the old one is revoked from that line of the log on, and what it signed before stays valid.

    Args:
        workspace: with the log and the key.
        to: the new private key, a file or `pkcs11:...`; None makes one in the workspace, a development key.
        reason: why; it stands in the log.
        by: who decides.

    Raises:
        ConfigError: no reason is given, or no key for a log that several workspaces write.
        DataError: the log was altered, or the new key signed here already.
        EnvironmentFault: a place where heads are kept is out of reach; the new key signs from now on all the same.
    """
    if not reason.strip():
        raise ConfigError("--reason: expected why, found nothing; it stands in the audit log")
    if to is None and os.environ.get(LOG_ADDRESS):
        raise ConfigError("--to: expected the new key, found none; a log that many write is signed by a key outside their workspaces")
    known = {row["key_id"] for row in list_keys(workspace)}
    new = open_key(str(to)) if to else generate_key()
    if (found := key_id(new.public_key())) in known:
        raise DataError(f"{to}: key {found[:12]} signs here or did before, and a revoked key never signs again; give a new one")
    entry = rotate(workspace, new, {"reason": reason, "by": by}, own=to is None)
    close_log(workspace, new)  # a rotation that no head knows could be cut off again, and the old key go on
    named = str(to) if str(to).startswith(SCHEME) else str(Path(str(to)).resolve())
    following = f"export {ENVIRONMENT}={shlex.quote(named)}" if to else f"unset {ENVIRONMENT}"
    return {"key_id": found, "line": entry["seq"], "time": entry["time"], "development": to is None, "following": following}


def list_keys(workspace: Path) -> list[dict[str, Any]]:
    """One row per key: those that signed here, oldest first, with the lines of the log that each may sign; then the trusted ones.

    Raises:
        DataError: the log was altered, or there is no key yet.
    """
    current = load_public_key(workspace)
    rows: list[dict[str, Any]] = []
    for line in walk(workspace):
        if not rows and line.key is not None:
            rows.append(_row(line.key, "signs", since=1))
        if line.entry["event"] == ROTATE and line.following is not None:
            rows[-1] |= {"state": "revoked", "until": line.entry["seq"], "revoked": line.entry["time"]}
            rows.append(_row(line.following, "signs", since=line.entry["seq"] + 1))
    rows = rows or [_row(current, "signs", since=1)]
    rows[-1]["development"] = is_development(workspace)
    return rows + [_row(key, "trusted", since=None) for key in trusted_keys(workspace)]


def trust_key(workspace: Path, file: Path, *, remove: bool = False) -> dict[str, Any]:
    """Believes, or believes no more, what the public key in `file` signed; it signs nothing here by that.

    Raises:
        DataError: it is no P-256 public key, or was not trusted.
    """
    key = read_public_key(file)
    path = workspace / KEYS / TRUSTED / f"{key_id(key)}.pub"
    if remove:
        if not path.exists():
            raise DataError(f"{file}: key {key_id(key)[:12]} is not trusted here; see: cbd keys list")
        path.unlink()
    else:
        write_public_key(path, key)
    return {"key_id": key_id(key), "trusted": not remove}


def trusted_keys(workspace: Path) -> list[PublicKey]:
    """The public keys of others that are trusted here, by key id.

    Raises:
        DataError: a file holds another key than its name says.
    """
    found = []
    for path in sorted((workspace / KEYS / TRUSTED).glob("*.pub")):
        key = read_public_key(path)
        if key_id(key) != path.stem:
            raise DataError(f"{path}: holds key {key_id(key)[:12]}, not the one that its name says; remove it")
        found.append(key)
    return found


def _row(key: PublicKey, state: str, *, since: int | None) -> dict[str, Any]:
    return {"key_id": key_id(key), "state": state, "since": since, "until": None, "revoked": None, "development": False}
