"""The signed decision on disk: `decision.json`, its signature beside it, its digest in the workspace's log."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbd.audit import LOG, Line, append
from cbd.config import canonical_json
from cbd.decision import DECISION, REJUDGES, SIGNATURE, SIGNED_BY, SignedDecision, parse_decision
from cbd.errors import DataError
from cbd.files import replacing
from cbd.heads import read_log, walk
from cbd.keys import PublicKey, ensure_key, is_development, key_id, load_public_key, sign, verify
from cbd.model_signature import MODEL_SIGNATURE, sign_model


def write_decision(decision: dict[str, Any], out: Path, workspace: Path, *, bundle: Path | None = None) -> str:
    """Writes the signed decision into the folder `out` and its digest into the workspace's log; returns the digest.

    With the `bundle` that was decided on, the signature of both together goes there, too.

    A re-judgement (it names what it `rejudges`) stands in the log under an event of its own, so that it is never taken for a decision.
    """
    key = ensure_key(workspace)
    signed_by = {"key_id": key_id(key.public_key()), "development": is_development(workspace)}
    data = canonical_json({**decision, SIGNED_BY: signed_by})
    digest = hashlib.sha256(data).hexdigest()
    with replacing(out) as temporary:
        temporary.mkdir()
        (temporary / DECISION).write_bytes(data)
        (temporary / SIGNATURE).write_text(sign(data, key) + "\n")
        if bundle is not None:
            sign_model(bundle, temporary, temporary / MODEL_SIGNATURE, key)
    entry = {"decision_digest": digest, "digests": decision["digests"], "run_id": decision["run_id"], "attempt": decision["attempt"]}
    entry |= {"trial": decision["trial"], "verdict": decision["verdict"]}
    if REJUDGES in decision:
        entry |= {REJUDGES: decision[REJUDGES], "policy_sha256": decision["policy_sha256"]}
    append(workspace, "rejudged" if REJUDGES in decision else "decision", entry, key=key)
    return digest


Signers = dict[tuple[str, str], PublicKey]
"""Under which key the log names a decision, by event (`decision` or `rejudged`) and digest."""


def find_signers(lines: Iterable[Line]) -> Signers:
    """All decisions that the verified lines of a log name."""
    named = ((line.entry["event"], line.entry["data"].get("decision_digest"), line.key) for line in lines)
    return {(event, digest): key for event, digest, key in named if event in ("decision", "rejudged") and digest and key}


def read_decision(folder: Path, workspace: Path, *, rejudged: bool = False) -> SignedDecision:
    """The decision in `folder`, after checking that the workspace's log names it, and that the key of that time signed it.

    Args:
        folder: with `decision.json` and `decision.sig`.
        workspace: with the log and the key.
        rejudged: a re-judgement is expected, and not a run's own decision.

    Raises:
        DataError: unsigned, signed by another key, malformed, of the other kind, or not in the log; or the log itself was altered.
    """
    find_file(folder, DECISION)
    return check_decision(folder, find_signers(walk(workspace)), key=load_public_key(workspace), rejudged=rejudged)


def check_latest(signed: SignedDecision, workspace: Path) -> None:
    """Raises DataError if the run was decided again since, such as under a stricter policy: an older decision is not brought back."""
    run_id = signed.content["run_id"]
    told = [entry["data"] for entry in read_log(workspace) if entry["event"] == "decision" and entry["data"]["run_id"] == run_id]
    if told and told[-1]["decision_digest"] != signed.digest:
        later = f"{told[-1]['verdict']}, {told[-1]['decision_digest'][:12]}"
        raise DataError(f"decision {signed.digest[:12]} on run {run_id} is an older one: decided again since ({later}); give that one")


def check_decision(folder: Path, signers: Signers, *, key: PublicKey, rejudged: bool = False) -> SignedDecision:
    """As `read_decision`, with a log that was read already; `key` is what signs now."""
    path = find_file(folder, DECISION)
    if not (folder / SIGNATURE).is_file() or (folder / SIGNATURE).is_symlink():
        raise DataError(f"{folder}: unsigned: {SIGNATURE} is missing; only a decision that this workspace signed counts")
    data, event = path.read_bytes(), "rejudged" if rejudged else "decision"
    digest = hashlib.sha256(data).hexdigest()
    named = next((found for found in (event, "decision", "rejudged") if (found, digest) in signers), None)
    signer = signers[named, digest] if named else key
    if not verify(data, (folder / SIGNATURE).read_bytes().decode(errors="replace").removesuffix("\n"), signer):
        raise DataError(f"{path}: the signature is not this workspace's key over these bytes; decide again in this workspace")
    content = parse_decision(path, data, rejudged=rejudged)
    if named is None:
        raise DataError(f"{path}: {LOG} names no {event} {digest[:12]}; decide again in this workspace")
    return SignedDecision(content, digest)


def find_file(path: Path, name: str) -> Path:
    """The file `name` in an artifact's folder, or the artifact itself where it is that file; raises DataError if it is missing."""
    file = path / name if path.is_dir() else path
    if not file.is_file() or file.is_symlink():
        raise DataError(f"{path}: expected {name} there, found none; run the step that writes it again")
    return file


def read_object(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file `name` of an artifact; raises DataError if it is missing or malformed."""
    file = find_file(path, name)
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}; run the step that writes it again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object, found {type(content).__name__}; run the step that writes it again")
    return content
