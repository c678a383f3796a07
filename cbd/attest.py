"""Attestations: in-toto statements about a step, sealed in DSSE envelopes. Pure: digests in, bytes out.

Statement v1 (in-toto/attestation, spec/v1/statement.md) with the predicates SLSA Provenance v1 for what is made, Test Result v0.1 for what
is measured, SLSA Verification Summary v1 for what is decided. Envelopes follow DSSE v1.0 (secure-systems-lab/dsse, protocol.md).
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from cbd.config import canonical_json, parse_canonical
from cbd.errors import DataError
from cbd.keys import PrivateKey, PublicKey, key_id

STATEMENT = "https://in-toto.io/Statement/v1"
PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
SUMMARY = "https://slsa.dev/verification_summary/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_BYTES = 16 * 2**20
"""A larger envelope is refused unread."""

Statement = dict[str, Any]
Digests = Mapping[str, str | None]
"""Name: SHA-256 (hex), or a git commit (40 hex digits); what is None is left out."""


def provenance(step: str, *, subjects: Digests, materials: Digests, parameters: Mapping[str, Any], run_id: str, finished: str) -> Statement:
    """The statement that `step` of a run made the subjects from the materials with these parameters, at `finished` (RFC 3339)."""
    definition = {
        "buildType": f"urn:cbd:step:{step}:v1",
        "externalParameters": dict(parameters),
        "resolvedDependencies": resources(materials),
    }
    details = {"builder": {"id": "urn:cbd:pipeline:retrain"}, "metadata": {"invocationId": run_id, "finishedOn": finished}}
    return _statement(subjects, PROVENANCE, {"buildDefinition": definition, "runDetails": details})


def test_result(
    step: str, *, subjects: Digests, configuration: Digests, checks: Sequence[Mapping[str, Any]], run_id: str, finished: str
) -> Statement:
    """The statement that the subjects were measured under this configuration, with the names of the checks by result.

    `checks` are the gate's (`name`, `result`): PASS is passed, BLOCK and INVALID are failed, everything between is warned.
    """
    named: dict[str, list[str]] = {"passedTests": [], "warnedTests": [], "failedTests": []}
    for check in checks:
        kind = {"PASS": "passedTests", "BLOCK": "failedTests", "INVALID": "failedTests"}.get(check["result"], "warnedTests")
        named[kind].append(check["name"])
    result = "FAILED" if named["failedTests"] else "WARNED" if named["warnedTests"] else "PASSED"
    about = {"cbd_step": step, "cbd_invocationId": run_id, "cbd_finishedOn": finished}
    return _statement(subjects, TEST_RESULT, {"result": result, "configuration": resources(configuration), **named, **about})


def summary(*, subjects: Digests, verdict: str, policy_sha256: str, inputs: Digests, run_id: str, created: str, version: str) -> Statement:
    """The statement that the gate came to `verdict` on the subjects: PASSED for PASS and nothing else.

    Args:
        subjects: what was decided on, and the decision.
        verdict: the gate's.
        policy_sha256: digest of the policy.
        inputs: file names of the attestations that were there, with the digests of their bytes.
        run_id: the run that was decided on.
        created: when (RFC 3339).
        version: of cbd.
    """
    passed = verdict == "PASS"
    predicate = {
        "verifier": {"id": "urn:cbd:gate", "version": {"cbd": version}},
        "timeVerified": created,
        "resourceUri": f"urn:cbd:run:{run_id}",
        "policy": {"uri": "urn:cbd:policy", "digest": {"sha256": policy_sha256}},
        "inputAttestations": [{"uri": name, "digest": {"sha256": digest}} for name, digest in sorted(inputs.items())],
        "verificationResult": "PASSED" if passed else "FAILED",
        "verifiedLevels": ["CBD_PASS"] if passed else ["FAILED"],
        "slsaVersion": "1.0",
        "cbd_verdict": verdict,
        "cbd_invocationId": run_id,
    }
    return _statement(subjects, SUMMARY, predicate)


def resources(digests: Digests) -> list[dict[str, Any]]:
    """The resource descriptors (in-toto/attestation, spec/v1/resource_descriptor.md) of what is known, in alphabetical order."""
    known = sorted((name, digest) for name, digest in digests.items() if digest is not None)
    return [{"name": name, "digest": {"gitCommit" if len(digest) == 40 else "sha256": digest}} for name, digest in known]


def digests_in(listed: Any) -> dict[str, str]:
    """Name and digest of each resource descriptor in a verified statement; empty for what is no such list."""
    found = {}
    for each in listed if isinstance(listed, list) else []:
        digest = each.get("digest") if isinstance(each, dict) else None
        if isinstance(digest, dict) and len(digest) == 1:
            found[str(each.get("name", each.get("uri")))] = str(next(iter(digest.values())))
    return found


def seal(statement: Statement, key: PrivateKey) -> bytes:
    """The statement in a DSSE envelope with one signature, both as canonical JSON."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

    envelope = Envelope(canonical_json(statement), PAYLOAD_TYPE, {})
    public = key.public_key()
    envelope.sign(CryptoSigner(key, SSlibKey.from_crypto(public, keyid=key_id(public))))
    return canonical_json(envelope.to_dict())


def unseal(data: bytes, keys: Sequence[PublicKey], *, told: str) -> Statement:
    """The statement in a DSSE envelope, after checking its signature and that every byte of it is the only one possible.

    Args:
        data: the envelope.
        keys: who may have signed it.
        told: how an error names it.

    Raises:
        DataError: no envelope, no canonical JSON or base64, another payload type, not exactly one signature, or none of a trusted key.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import Key, SSlibKey

    values = _canonical(data, told)
    if set(values) != {"payload", "payloadType", "signatures"} or values["payloadType"] != PAYLOAD_TYPE:
        raise DataError(f"{told}: expected a DSSE envelope of type {PAYLOAD_TYPE}, found another; restore it")
    signatures = values["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1 or not _is_signature(signatures[0]):
        raise DataError(f"{told}: expected exactly one signature with keyid and sig; restore it")
    payload, _ = (_decode(text, told) for text in (values["payload"], signatures[0]["sig"]))
    trusted: list[Key] = [SSlibKey.from_crypto(key, keyid=key_id(key)) for key in keys]
    if signatures[0]["keyid"] not in {key.keyid for key in trusted}:
        raise DataError(f"{told}: signed by key {signatures[0]['keyid'][:12]!r}, which is not trusted; trusted: {_ids(trusted)}")
    try:
        Envelope.from_dict(values).verify(trusted, 1)
    except VerificationError:
        raise DataError(f"{told}: altered: the signature is not its key's over this content; restore it") from None
    statement = _canonical(payload, told)
    parts = isinstance(statement.get("subject"), list), isinstance(statement.get("predicate"), dict), "predicateType" in statement
    if statement.get("_type") != STATEMENT or not all(parts):
        raise DataError(f"{told}: expected an in-toto Statement v1, found {statement.get('_type')!r}; restore it")
    return statement


def _statement(subjects: Digests, kind: str, predicate: dict[str, Any]) -> Statement:
    return {"_type": STATEMENT, "subject": resources(subjects), "predicateType": kind, "predicate": predicate}


def _canonical(data: bytes, told: str) -> dict[str, Any]:
    if len(data) > MAX_BYTES:
        raise DataError(f"{told}: {len(data)} bytes; expected at most {MAX_BYTES}, restore it")
    try:
        return parse_canonical(data)
    except ValueError as error:
        raise DataError(f"{told}: {error}; restore it") from None


def _decode(text: Any, told: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or base64.b64encode(data).decode() != text:
        raise DataError(f"{told}: expected canonical base64 (RFC 4648), found something else; restore it")
    return data


def _is_signature(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"keyid", "sig"} and all(isinstance(part, str) for part in value.values())


def _ids(keys: Sequence[Any]) -> str:
    return ", ".join(key.keyid[:12] for key in keys) or "none"
