"""P-256 keys: one that signs for the workspace, public ones that are trusted, signatures, and key ids."""

import base64
import binascii
import contextlib
import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cbd.errors import ConfigError, DataError
from cbd.files import disk_fault, locked, replacing, still
from cbd.token_key import SCHEME, open_token_key

ENVIRONMENT = "CBD_SIGNING_KEY"
"""What signs instead of the key in the workspace: the path of a private key, or a key in a token (`pkcs11:...`, see `cbd.token_key`)."""
KEYS = "keys"
"""Folder of the workspace: `signing.pem` (made here: a development key), `signing.pub`, `trusted/<key id>.pub`."""
PRIVATE, PUBLIC = "signing.pem", "signing.pub"
LOCK = ".lock"
"""Beside the keys: who reads or writes both of them holds it."""

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def ensure_key(workspace: Path) -> PrivateKey:
    """The key that signs for this workspace: what `CBD_SIGNING_KEY` names, a file or a key in a token, else `keys/signing.pem`, which is
    made on first use (0600).

    Its public half lies in `keys/signing.pub` from then on, and another key is refused.

    Raises:
        DataError: the key is malformed, not P-256, readable by others, or not the one that signed here before.
        EnvironmentFault: the folder is not writable.
    """
    folder = workspace / KEYS
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(folder / LOCK):
            named, private = signing_reference(workspace), folder / PRIVATE
            if Path(named).resolve() == private.resolve() and not private.exists() and not (folder / PUBLIC).exists():
                write_private_key(private, generate_key())
            key = open_key(named)
            if not (folder / PUBLIC).exists():
                write_public_key(folder / PUBLIC, key.public_key())
            told = read_public_key(folder / PUBLIC)
    except OSError as error:
        raise disk_fault(folder, error) from None
    if key_id(key.public_key()) != key_id(told):
        raise DataError(
            f"{named}: is key {key_id(key.public_key())[:12]}, which does not belong to {PUBLIC} (key {key_id(told)[:12]}) of {workspace}; "
            "sign with that one, or change over with: cbd keys rotate"
        )
    return key


def load_public_key(workspace: Path) -> PublicKey:
    """The public key that signs for the workspace now; where the private key lies beside it, the two must belong together.

    Raises:
        DataError: there is no public key, it is malformed or not P-256, or it is not the private key's.
    """
    path, private = workspace / KEYS / PUBLIC, workspace / KEYS / PRIVATE
    if not path.exists():
        raise DataError(f"{path}: no such key; give the workspace in which the decision was made")
    lock = path.with_name(LOCK)
    with still(lock) if lock.exists() else contextlib.nullcontext():  # a copy without it is changed by nobody
        key = read_public_key(path)
        if path.read_bytes() != to_pem(key).encode():
            raise DataError(f"{path}: was edited: it is not written as cbd writes keys; restore it")
        if private.exists() and key_id(read_private_key(private).public_key()) != key_id(key):
            raise DataError(f"{path}: does not belong to {private.name} beside it; restore the pair")
    return key


def is_development(workspace: Path) -> bool:
    """Whether the workspace signs with a key that lies in it, beside the data which it signs, however `CBD_SIGNING_KEY` names it."""
    named = signing_reference(workspace)
    return not named.startswith(SCHEME) and Path(named).resolve().is_relative_to(workspace.resolve())


def signing_reference(workspace: Path) -> str:
    """Where the private key lies that signs for the workspace, or will lie; or the reference to a token."""
    return os.environ.get(ENVIRONMENT) or str(workspace / KEYS / PRIVATE)


def key_id(key: PublicKey) -> str:
    """SHA-256 (hex) of the key's DER SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7)."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def sign(data: bytes, key: PrivateKey) -> str:
    """The ECDSA P-256/SHA-256 signature of `data` (DER, RFC 3279), in base64."""
    return base64.b64encode(key.sign(data, ec.ECDSA(hashes.SHA256()))).decode()


def verify(data: bytes, signature: str, key: PublicKey) -> bool:
    """Whether `signature` (canonical base64, RFC 4648 section 3.5) is `key`'s over exactly these bytes."""
    try:
        raw = base64.b64decode(signature, validate=True)
        key.verify(raw, data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return base64.b64encode(raw).decode() == signature


def generate_key() -> PrivateKey:
    """A new P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def open_key(reference: str) -> PrivateKey:
    """The private key in a PEM file or, for `pkcs11:...`, in a token.

    Raises:
        DataError: the key is malformed, not P-256, or readable by others.
        ConfigError: the token does not give it.
    """
    if reference.startswith(SCHEME):
        return open_token_key(reference)
    return read_private_key(Path(reference))


def write_private_key(path: Path, key: PrivateKey) -> None:
    """Writes the key in PEM form (PKCS #8, mode 0600), on disk before this returns."""
    form = serialization.PrivateFormat.PKCS8
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with replacing(path) as temporary:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())


def write_public_key(path: Path, key: PublicKey) -> None:
    """Writes the key in PEM form."""
    with replacing(path) as temporary:
        temporary.write_text(to_pem(key))


def to_pem(key: PublicKey) -> str:
    """The key in PEM form, as SubjectPublicKeyInfo."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def from_pem(text: str | bytes, *, told: str) -> PublicKey:
    """The P-256 public key in `text`; raises DataError, which names it as `told`."""
    try:
        key = serialization.load_pem_public_key(text.encode() if isinstance(text, str) else text)
    except (ValueError, UnsupportedAlgorithm):
        raise DataError(f"{told}: not a public key in PEM form; restore it") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DataError(f"{told}: expected a P-256 key, found another kind; restore it")
    return key


def read_public_key(path: Path) -> PublicKey:
    """The P-256 public key in a PEM file; raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such key; expected a file with a P-256 public key in PEM form")
    return from_pem(path.read_bytes(), told=str(path))


def read_trusted_keys(place: Path) -> list[PublicKey]:
    """The public key in a PEM file, or those in the `.pub` files of a folder; raises DataError if there is none or one is malformed."""
    files = sorted(place.glob("*.pub")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"{place}: no public key there; expected files *.pub with P-256 keys in PEM form")
    return [read_public_key(file) for file in files]


def read_private_key(path: Path) -> PrivateKey:
    """The P-256 private key in a PEM file that nobody else may read; raises DataError.

    A cluster's Secret is mounted for one container, read-only and with modes that nobody in it can change: there they are not looked at.
    """
    if not path.is_file():
        if os.environ.get(ENVIRONMENT) == str(path):
            raise ConfigError(f"{ENVIRONMENT}={path}: no such file; expected a P-256 private key in PEM form")
        raise DataError(f"{path}: no such key; restore it, or name the one that signs with {ENVIRONMENT}")
    if path.stat().st_mode & 0o077 and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise DataError(f"{path}: others may read this private key; expected mode 0600, run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise DataError(f"{path}: not a private key in PEM form without password; restore it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise DataError(f"{path}: expected a P-256 key, found another kind; restore it")
    return key
