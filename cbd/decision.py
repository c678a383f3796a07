"""The form of a signed decision: `decision.json` and its signature beside it. Reading one here needs neither torch nor a workspace."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd.errors import DataError
from cbd.keys import PublicKey, key_id, verify

DECISION = "decision.json"
SIGNATURE = "decision.sig"
REJUDGES = "rejudges"
"""In a re-judgement alone, which moves no alias: the digest of the run's own decision."""
SIGNED_BY = "signed_by"
"""`key_id`, and `development`: whether that key was made by cbd and lies beside what it signs."""
SCHEMA_VERSION = 3
_KEYS = {
    "schema_version",
    "run_id",
    "created",
    "verdict",
    "sentence",
    "checks",
    "trial",
    "policy",
    "policy_sha256",
    "digests",
    "attempt",
    SIGNED_BY,
}
_DIGESTS = {"data", "model", "trusted", "evaluation", "validation", "canary", "scan"}


@dataclass(frozen=True, slots=True)
class SignedDecision:
    """A decision whose signature holds."""

    content: dict[str, Any]
    digest: str
    """SHA-256 (hex) of the bytes of `decision.json`."""


def parse_decision(path: Path, data: bytes, *, rejudged: bool = False) -> dict[str, Any]:
    """What a decision of the expected kind says; `path` is how an error names it.

    Raises:
        DataError: it is malformed, of another version, or of the other kind.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON; decide again") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(content, dict) and (REJUDGES in content) != rejudged:
        kinds = ("the run's own decision", "a re-judgement under another policy, which moves no alias")
        raise DataError(f"{path}: expected {kinds[rejudged]}, found {kinds[not rejudged]}; give the other one")
    keys = _KEYS | ({REJUDGES} if rejudged else set())
    digests = content.get("digests") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION or set(content) != keys or not isinstance(digests, dict) or set(digests) != _DIGESTS:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        fix = "read it with the version of cbd that made it" if newer else "decide again with this version"
        raise DataError(f"{path}: schema version {version}, expected a decision of schema version {SCHEMA_VERSION}; {fix}")
    return dict(content)


def open_decision(folder: Path, keys: Sequence[PublicKey]) -> SignedDecision:
    """The run's own decision in `folder`, after checking that one of these keys, the one that it names itself, signed it.

    Whether the workspace's log names it is another question, see `components.decision`.

    Raises:
        DataError: missing, malformed, or signed by no trusted key.
    """
    path, signature = folder / DECISION, folder / SIGNATURE
    for file in (path, signature):
        if not file.is_file() or file.is_symlink():
            raise DataError(f"{file}: missing; expected a signed decision, {DECISION} with {SIGNATURE} beside it")
    data = path.read_bytes()
    content, text = parse_decision(path, data), signature.read_bytes().decode(errors="replace").removesuffix("\n")
    key = find_key(content, keys, told=str(path))
    if not verify(data, text, key):
        raise DataError(f"{path}: altered: {SIGNATURE} is not the signature of key {key_id(key)[:12]} over these bytes; restore both")
    return SignedDecision(content, hashlib.sha256(data).hexdigest())


def find_key(content: dict[str, Any], keys: Sequence[PublicKey], *, told: str) -> PublicKey:
    """Which of these keys a decision says that it was signed by; raises DataError if it is none of them."""
    signed_by = content[SIGNED_BY]
    named = str(signed_by.get("key_id")) if isinstance(signed_by, dict) else "none"
    for key in keys:
        if key_id(key) == named:
            return key
    known = ", ".join(key_id(key)[:12] for key in keys) or "none"
    raise DataError(f"{told}: signed by key {named[:12]!r}, which is not trusted; trusted: {known}")
