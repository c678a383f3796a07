"""The audit trail: one P-256 key per workspace, signatures, and an append-only log in which each entry seals the one before."""

import base64
import binascii
import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import disk_fault, replacing

LOG = "audit.jsonl"
FIRST = "0" * 64
"""What the first entry names as the hash before it."""
_SEALED = ("seq", "time", "event", "data", "previous")
_BLOCK = 65536

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def ensure_key(workspace: Path) -> PrivateKey:
    """The workspace's signing key, made on first use in `keys/signing.pem` (mode 0600) with `signing.pub` beside it.

    Raises:
        DataError: the key is malformed, not P-256, or readable by others.
        EnvironmentFault: the folder is not writable.
    """
    folder = workspace / "keys"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder / ".lock"):
            if not (folder / "signing.pem").exists():
                _write_key(folder / "signing.pem")
            key = _read_key(folder / "signing.pem")
            if not (folder / "signing.pub").exists():
                with replacing(folder / "signing.pub") as temporary:
                    temporary.write_bytes(_public_bytes(key.public_key()))
    except OSError as error:
        raise disk_fault(folder, error) from None
    return key


def load_public_key(workspace: Path) -> PublicKey:
    """The workspace's public key; where the private key lies beside it, the two must belong together.

    Raises:
        DataError: there is no public key, it is malformed or not P-256, or it is not the private key's.
    """
    path = workspace / "keys" / "signing.pub"
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no such key; give the workspace in which the decision was made") from None
    except ValueError:
        raise DataError(f"{path}: not a public key in PEM form; restore it") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DataError(f"{path}: expected a P-256 key, found another kind; restore it")
    private = path.with_suffix(".pem")
    if private.exists() and _public_bytes(_read_key(private).public_key()) != _public_bytes(key):
        raise DataError(f"{path}: does not belong to {private.name} beside it; restore the pair")
    return key


def sign(data: bytes, key: PrivateKey) -> str:
    """The ECDSA P-256/SHA-256 signature of `data`, in base64."""
    return base64.b64encode(key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()


def verify(data: bytes, signature: str, key: PublicKey) -> bool:
    """Whether `signature` (base64) is `key`'s over exactly these bytes."""
    try:
        key.verify(base64.b64decode(signature, validate=True), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def append(log: Path, event: str, data: dict[str, Any], *, key: PrivateKey) -> dict[str, Any]:
    """The new last entry of `log`, on disk before this returns; processes that append at once wait for each other.

    What a crash left of an unfinished line is cut off and recorded in an entry `torn` of its own, before this one.

    Raises:
        DataError: the last entry was edited.
        EnvironmentFault: the disk is full or the log not writable; the log is as it was.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with locked(log) as file:
            end, torn = _complete_end(file)
            last = _last_entry(file, end, log)
            if torn:
                os.ftruncate(file, end)
                found = {"sha256": hashlib.sha256(torn).hexdigest(), "num_bytes": len(torn), "text": torn[:1000].decode(errors="replace")}
                last = _write_entry(file, _seal("torn", found, last, key))
            return _write_entry(file, _seal(event, data, last, key))
    except OSError as error:
        raise disk_fault(log, error) from None


def verify_log(log: Path, *, key: PublicKey | None = None) -> list[dict[str, Any]]:
    """All entries of `log`, oldest first, after checking that none was removed, reordered or edited; no log, no entries.

    The last entries of a log can be cut off unseen: keep the newest hash elsewhere to notice that.

    Args:
        key: also check that every entry was signed by this key.

    Raises:
        DataError: names the first bad line and what is wrong with it.
    """
    entries: list[dict[str, Any]] = []
    if not log.exists():
        return entries
    previous = FIRST
    with log.open("rb") as file:
        for number, line in enumerate(file, 1):
            fault = _fault(line, number, previous, key)
            if fault:
                raise DataError(f"{log}: line {number} {fault}; restore the log from a copy")
            entries.append(json.loads(line))
            previous = entries[-1]["hash"]
    return entries


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file at `path` (made if absent), open for reading and appending, while no other process holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(file)


def _write_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.PrivateFormat.PKCS8
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with replacing(path) as temporary:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def _read_key(path: Path) -> PrivateKey:
    if path.stat().st_mode & 0o077:
        raise DataError(f"{path}: others may read this private key; expected mode 0600, run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise DataError(f"{path}: not a private key in PEM form without password; restore it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DataError(f"{path}: expected a P-256 key, found another kind; restore it")
    return key


def _public_bytes(key: PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _seal(event: str, data: dict[str, Any], last: dict[str, Any] | None, key: PrivateKey) -> dict[str, Any]:
    time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    seq, previous = (last["seq"] + 1, last["hash"]) if last else (1, FIRST)
    entry = {"seq": seq, "time": time, "event": event, "data": data, "previous": previous}
    digest = _hash(entry)
    return {**entry, "hash": digest, "signature": sign(bytes.fromhex(digest), key)}


def _hash(entry: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json({name: entry[name] for name in _SEALED})).hexdigest()


def _write_entry(file: int, entry: dict[str, Any]) -> dict[str, Any]:
    """Writes one line and waits for the disk; a line that does not fit is taken back whole."""
    line, before = canonical_json(entry) + b"\n", os.lseek(file, 0, os.SEEK_END)
    try:
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
        os.fsync(file)
    except OSError:
        os.ftruncate(file, before)
        raise
    return entry


def _complete_end(file: int) -> tuple[int, bytes]:
    """Where the last complete line ends, and what stands after it."""
    size = end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    return end, os.pread(file, size - end, end)


def _last_entry(file: int, end: int, log: Path) -> dict[str, Any] | None:
    if end == 0:
        return None
    start, line = end - 1, b""
    while start > 0 and b"\n" not in line:
        start = max(0, start - _BLOCK)
        line = os.pread(file, end - 1 - start, start)
    line = line[line.rfind(b"\n") + 1 :]
    fault = _content_fault(line)
    if fault:
        raise DataError(f"{log}: the last line {fault}; restore the log from a copy")
    entry: dict[str, Any] = json.loads(line)
    return entry


def _fault(line: bytes, number: int, previous: str, key: PublicKey | None) -> str | None:
    if not line.endswith(b"\n"):
        return "is torn: a crash in the middle of writing; the next entry will cut it off and record it"
    fault = _content_fault(line)
    if fault:
        return fault
    entry = json.loads(line)
    if entry["seq"] != number or entry["previous"] != previous:
        return f"has number {entry['seq']} and does not follow the line before: entries were removed, reordered or inserted"
    if key is not None and not verify(bytes.fromhex(entry["hash"]), str(entry["signature"]), key):
        return "was not signed by this workspace's key"
    return None


def _content_fault(line: bytes) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return "is no JSON: it was edited"
    if not isinstance(entry, dict) or set(entry) != {*_SEALED, "hash", "signature"}:
        return "is no log entry: it was edited"
    try:
        same = _hash(entry) == entry["hash"] and canonical_json(entry) == line.rstrip(b"\n")
    except ValueError:
        same = False
    return None if same else "was edited: its hash does not match its content"
