"""Attestations: what a step states, sealed so that every byte is the only possible one, and readable by anybody else's verifier."""

import base64
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from decided_case import POLICY, Case, make_case

from cbd import attest
from cbd.bundle import bundle_digest
from cbd.config import canonical_json
from cbd.dataset import read_info
from cbd.errors import DataError
from cbd.files import sha256_file
from cbd.keys import ensure_key, key_id
from components.attestation import attest_evaluation, attest_scan, attest_training, attest_version, made_with
from components.decide import decide_step

Make = Callable[..., dict[str, Any]]
KEY = ec.derive_private_key(7, ec.SECP256R1())
STATED = attest.provenance(
    "train_deconfounded",
    subjects={"model": "a" * 64},
    materials={"dataset": "b" * 64, "commit": "c" * 40, "image": None},
    parameters={"seed": 0},
    run_id="run-1",
    finished="2026-01-01T00:00:00Z",
)


def pae(kind: bytes, body: bytes) -> bytes:
    """The pre-authentication encoding, written from DSSE's protocol.md alone: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body."""
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(body)).encode(), body])


def read_independently(data: bytes, key: ec.EllipticCurvePublicKey) -> dict[str, Any]:
    """The statement in an envelope, verified with nothing of cbd's or securesystemslib's."""
    envelope = json.loads(data)
    body = base64.b64decode(envelope["payload"])
    [signature] = envelope["signatures"]
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert signature["keyid"] == hashlib.sha256(der).hexdigest()
    key.verify(base64.b64decode(signature["sig"]), pae(envelope["payloadType"].encode(), body), ec.ECDSA(hashes.SHA256()))
    return dict(json.loads(body))


def forge(statement: Any = STATED, key: ec.EllipticCurvePrivateKey = KEY, **changes: Any) -> bytes:
    """An envelope that is signed well, with keys replaced after or before."""
    body = statement if isinstance(statement, bytes) else canonical_json(statement)
    kind = changes.get("payloadType", attest.PAYLOAD_TYPE)
    signature = base64.b64encode(key.sign(pae(kind.encode(), body), ec.ECDSA(hashes.SHA256()))).decode()
    signed = {"keyid": key_id(key.public_key()), "sig": signature}
    return canonical_json({"payload": base64.b64encode(body).decode(), "payloadType": kind, "signatures": [signed], **changes})


def refused(data: bytes, match: str, *keys: Any) -> None:
    with pytest.raises(DataError, match=match) as caught:
        attest.unseal(data, keys or [KEY.public_key()], told="train.json")
    assert str(caught.value).startswith("train.json") and "\n" not in str(caught.value)


def test_the_encoding_is_that_of_the_protocol() -> None:
    """The example in DSSE's protocol.md."""
    assert pae(b"http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_a_sealed_statement_is_read_by_an_independent_verifier() -> None:
    data = attest.seal(STATED, KEY)
    assert read_independently(data, KEY.public_key()) == STATED == attest.unseal(data, [KEY.public_key()], told="x")
    assert attest.unseal(forge(), [KEY.public_key()], told="x") == STATED


def test_a_statement_has_the_form_of_its_specification() -> None:
    assert STATED == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": "a" * 64}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": "urn:cbd:step:train_deconfounded:v1",
                "externalParameters": {"seed": 0},
                "resolvedDependencies": [
                    {"name": "commit", "digest": {"gitCommit": "c" * 40}},
                    {"name": "dataset", "digest": {"sha256": "b" * 64}},
                ],
            },
            "runDetails": {
                "builder": {"id": "urn:cbd:pipeline:retrain"},
                "metadata": {"invocationId": "run-1", "finishedOn": "2026-01-01T00:00:00Z"},
            },
        },
    }


@pytest.mark.parametrize(
    ("results", "expected"),
    [(["PASS"], "PASSED"), (["PASS", "REVIEW"], "WARNED"), (["INCONCLUSIVE"], "WARNED"), (["REVIEW", "BLOCK"], "FAILED")],
)
def test_a_test_result_is_as_bad_as_its_worst_test(results: list[str], expected: str) -> None:
    checks = [{"name": f"{number}", "result": result} for number, result in enumerate(results)]
    told = attest.test_result("scan", subjects={}, configuration={}, checks=checks, run_id="r", finished="t")["predicate"]
    assert told["result"] == expected
    assert sorted(told["passedTests"] + told["warnedTests"] + told["failedTests"]) == [check["name"] for check in checks]


def test_every_changed_byte_of_an_envelope_is_refused() -> None:
    data, random_numbers = attest.seal(STATED, KEY), random.Random(0)
    for position in range(len(data)):
        byte = (data[position] + random_numbers.randrange(1, 256)) % 256
        refused(data[:position] + bytes([byte]) + data[position + 1 :], "restore it|not trusted")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "expected JSON"),
        (b"[" * 100_000, "expected JSON"),
        (b'{"a":NaN}', "expected JSON"),
        (b'{"a":"\\ud800"}', "expected JSON"),
        (b"[]", "canonical JSON"),
        (forge() + b"\n", "canonical JSON"),
        (forge().replace(b'":"', b'": "', 1), "canonical JSON"),
        (forge().replace(b"{", b'{"payload":"",', 1), "canonical JSON"),
        (b" " * (attest.MAX_BYTES + 1), "at most"),
        (forge(payloadType="text/plain"), "type application/vnd.in-toto"),
        (forge(more=1), "type application/vnd.in-toto"),
        (forge(signatures=[]), "exactly one signature"),
        (forge(signatures=[{"keyid": "a", "sig": "b"}] * 2), "exactly one signature"),
        (forge(signatures=[{"keyid": 1, "sig": "b"}]), "exactly one signature"),
        (forge(signatures=[{"sig": "b"}]), "exactly one signature"),
        (forge(payload="e30"), "canonical base64"),
        (forge(payload="e31="), "canonical base64"),
        (forge(payload="e 30="), "canonical base64"),
        (forge(payload="e30=\n"), "canonical base64"),
        (forge(payload=7), "canonical base64"),
        (forge(b'{"_type": 1}'), "canonical JSON"),
        (forge({**STATED, "_type": "https://in-toto.io/Statement/v0.1"}), "Statement v1"),
        (forge({**STATED, "predicate": None}), "Statement v1"),
        (forge(key=ec.derive_private_key(8, ec.SECP256R1())), "not trusted"),
    ],
)
def test_what_is_signed_but_in_another_form_is_refused(data: bytes, match: str) -> None:
    refused(data, match)


def test_a_signature_is_good_for_its_content_and_key_only() -> None:
    other = ec.derive_private_key(9, ec.SECP256R1())
    body, theirs = json.loads(forge()), json.loads(forge({**STATED, "subject": []}))
    refused(canonical_json({**body, "signatures": theirs["signatures"]}), "the signature is not")
    renamed = [{**json.loads(forge(key=other))["signatures"][0], "keyid": body["signatures"][0]["keyid"]}]
    refused(canonical_json({**body, "signatures": renamed}), "the signature is not")
    for signature in ("", "AAAA", body["signatures"][0]["sig"][:-4]):
        refused(forge(signatures=[{**body["signatures"][0], "sig": signature}]), "the signature is not|canonical base64")
    assert attest.unseal(forge(key=other), [KEY.public_key(), other.public_key()], told="x") == STATED
    with pytest.raises(DataError, match="trusted: none"):
        attest.unseal(forge(), [], told="x")


def attested(case: Case, step: str) -> dict[str, Any]:
    data = (case.workspace / case.run_id / "attestations" / f"{step}.json").read_bytes()
    return read_independently(data, ensure_key(case.workspace).public_key())


def test_the_steps_of_a_run_attest_digests_that_lead_from_data_to_verdict(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation, turned={"white-centre": (1, 50)})
    records, workspace, subject = str(tmp_path / case.run_id / "records"), str(tmp_path), case.subject
    assert subject.evaluation and subject.scan
    measured = {"model": case.bundle, "trusted_set": subject.trusted_set, "policy": POLICY.model_dump(), "workspace": workspace}
    attest_version(records, subject.dataset, subject.trusted_set, revision="e" * 40, workspace=workspace)
    attest_training(records, "train_deconfounded", case.bundle, workspace=workspace)
    attest_evaluation(records, subject.evaluation / "evaluation.json", **measured)
    attest_scan(records, subject.scan / "scan.json", **measured)
    named = {
        name: SimpleNamespace(path=str(getattr(subject, name))) for name in ("dataset", "trusted_set", "validation", "evaluation", "model")
    }
    named |= {"canary": SimpleNamespace(path=str(tmp_path / "none")), "scanned": SimpleNamespace(path=str(subject.scan))}
    about = {"records": records, "workspace": workspace, "run_id": case.run_id, "policy": POLICY.model_dump()}
    decide_step.python_func(**named, **about, decision=SimpleNamespace(path=str(case.decision)))

    data, model = read_info(subject.dataset).digest, bundle_digest(case.bundle)
    version, training = attested(case, "version"), attested(case, "train_deconfounded")
    assert attest.digests_in(version["subject"])["dataset"] == data
    materials = attest.digests_in(training["predicate"]["buildDefinition"]["resolvedDependencies"])
    assert attest.digests_in(training["subject"]) == {"model": model} and materials["dataset"] == data
    lock = hashlib.sha256(Path("requirements.lock").read_bytes()).hexdigest()
    assert materials["requirements.lock"] == lock and materials["code"] == made_with()["code"] and "image" not in materials
    evaluation = attested(case, "evaluate")
    assert attest.digests_in(evaluation["subject"]) == {
        "model": model,
        "evaluation.json": sha256_file(subject.evaluation / "evaluation.json"),
    }
    assert evaluation["predicate"]["result"] == "WARNED" and evaluation["predicate"]["warnedTests"] == ["white-centre", "battery"]
    assert attested(case, "scan")["predicate"]["result"] == "PASSED"
    decided = attested(case, "decide")["predicate"]
    assert (decided["verificationResult"], decided["verifiedLevels"], decided["cbd_verdict"]) == ("FAILED", ["FAILED"], "REVIEW")
    folder = case.workspace / case.run_id / "attestations"
    others = {path.name: sha256_file(path) for path in folder.glob("*.json") if path.name != "decide.json"}
    assert attest.digests_in(decided["inputAttestations"]) == others and len(others) == 4
    told = {name: sha256_file(case.decision / name) for name in ("decision.json", "bom.cdx.json")}
    assert attest.digests_in(attested(case, "decide")["subject"]) == told | {"dataset": data, "model": model}


def test_the_image_is_named_where_the_cluster_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("registry/cbd@sha256:" + "d" * 64, "d" * 64), ("cbd:latest", None), ("x@sha256:../../etc", None)):
        made_with.cache_clear()
        monkeypatch.setenv("CBD_IMAGE", value)
        assert made_with()["image"] == expected
    made_with.cache_clear()
