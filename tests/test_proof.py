"""Proofs for an outside auditor: they hold with the key that he trusts, and no changed byte of them does."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import cbd

from cbd.audit import LOG, append
from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.keys import PublicKey, ensure_key, write_public_key
from components.keyring import rotate_key, trust_key
from components.proof import check_proof, make_proof


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Lines about two runs, a rotation between."""
    workspace = tmp_path / "workspace"
    for number in range(5):
        append(workspace, "decision", {"run_id": f"run-{number % 2}", "number": str(number)})
        if number == 2:
            rotate_key(workspace, to=None, reason="time", by="me")
    return workspace


def proven(workspace: Path, out: Path, **more: Any) -> Path:
    out.write_bytes(make_proof(workspace, "run-1", **more)[1])
    return out


def first_key(workspace: Path) -> PublicKey:
    """The key that the log began with."""
    from cbd.heads import walk

    key = next(walk(workspace)).key
    assert key is not None
    return key


def test_a_proof_holds_with_the_first_key_after_a_rotation_and_tells_what_it_proves(workspace: Path, tmp_path: Path) -> None:
    path = proven(workspace, tmp_path / "proof.json")
    told = list(check_proof(path, [first_key(workspace)]))
    assert told[0].startswith("head: 6 lines") and told[1].startswith("consistency: the log only grew since the head over 4 lines")
    assert [sentence.split(":")[0] for sentence in told[2:]] == ["line 2", "line 5"] and "number 1" in told[2]


def test_what_became_of_a_runs_model_later_is_proven_too(workspace: Path, tmp_path: Path) -> None:
    """A demotion names the decision, not the run."""
    append(workspace, "decision", {"run_id": "run-1", "decision_digest": "a" * 64})
    append(workspace, "demote", {"decision_digest": "a" * 64, "reason": "a trigger works"})
    append(workspace, "demote", {"decision_digest": "b" * 64, "reason": "of another run"})
    told = list(check_proof(proven(workspace, tmp_path / "proof.json"), [first_key(workspace)]))
    assert [sentence.split(":")[0] for sentence in told[2:]] == ["line 2", "line 5", "line 7", "line 8"] and "a trigger works" in told[-1]


def test_with_the_later_key_alone_the_earlier_lines_are_not_believed(workspace: Path, tmp_path: Path) -> None:
    path = proven(workspace, tmp_path / "proof.json")
    with pytest.raises(DataError, match="line 2 is not signed by a trusted key"):
        list(check_proof(path, [ensure_key(workspace).public_key()]))


def test_a_proof_by_somebody_else_is_refused(workspace: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    append(forged, "decision", {"run_id": "run-1"})
    with pytest.raises(DataError, match="its head is signed by .* no trusted key|not the trusted key"):
        list(check_proof(proven(forged, tmp_path / "proof.json"), [first_key(workspace)]))


def test_every_changed_byte_of_a_proof_is_refused(workspace: Path, tmp_path: Path) -> None:
    path, draw, key = proven(workspace, tmp_path / "proof.json"), random.Random(0), first_key(workspace)
    before = path.read_bytes()
    for place in range(0, len(before), 3):
        path.write_bytes(before[:place] + bytes([before[place] ^ 1 << draw.randrange(8)]) + before[place + 1 :])
        with pytest.raises(DataError) as caught:
            list(check_proof(path, [key]))
        assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda proof: proof | {"lines": proof["lines"] + proof["rotations"]},
        lambda proof: proof | {"run_id": "run-0"},
        lambda proof: proof | {"earlier": proof["head"]},
        lambda proof: proof | {"head": proof["earlier"]},
        lambda proof: proof | {"consistency": []},
        lambda proof: proof | {"consistency": proof["consistency"] * 2},
        lambda proof: proof | {"rotations": []},
        lambda proof: proof | {"lines": [{**proof["lines"][0], "path": proof["lines"][1]["path"]}]},
        lambda proof: proof | {"lines": [{**proof["lines"][0], "more": 1}]},
        lambda proof: proof | {"lines": []},
        lambda proof: proof | {"lines": [], "run_id": "run-0"},
        lambda proof: proof | {"lines": "nonsense"},
        lambda proof: proof | {"schema_version": 2},
    ],
)
def test_a_proof_that_was_put_together_otherwise_is_refused(workspace: Path, tmp_path: Path, change: Any) -> None:
    path = proven(workspace, tmp_path / "proof.json")
    changed = canonical_json(change(json.loads(path.read_bytes())))
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(DataError, match=str(path)):
        list(check_proof(path, [first_key(workspace)]))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"nonsense", b"\xff", b"[" * 100_000])
def test_what_is_no_proof_is_refused(tmp_path: Path, workspace: Path, text: bytes) -> None:
    (tmp_path / "proof.json").write_bytes(text)
    with pytest.raises(DataError, match=r"proof.json: is no proof"):
        list(check_proof(tmp_path / "proof.json", [first_key(workspace)]))


def test_json_that_is_not_canonical_is_refused(workspace: Path, tmp_path: Path) -> None:
    path = proven(workspace, tmp_path / "proof.json")
    proof = json.loads(path.read_bytes())
    text = canonical_json(proof).decode()
    for other in (json.dumps(proof), text + "\n", text.replace('"run-1"', '"run\\u002d1"')):
        path.write_text(other)
        with pytest.raises(DataError, match="is no proof"):
            list(check_proof(path, [first_key(workspace)]))


def test_since_an_earlier_proof_the_log_only_grew(workspace: Path, tmp_path: Path) -> None:
    key, earlier = first_key(workspace), proven(workspace, tmp_path / "earlier.json")
    append(workspace, "decision", {"run_id": "run-1"})
    later = proven(workspace, tmp_path / "later.json", since=earlier)
    assert "since the head over 6 lines" in list(check_proof(later, [key], since=earlier))[1]
    other = proven(workspace, tmp_path / "other.json")
    with pytest.raises(DataError, match=r"does not begin at the head of .*earlier.json"):
        list(check_proof(other, [key], since=earlier))


def test_a_log_that_was_rewritten_since_an_earlier_proof_cannot_prove_that_it_was_not(tmp_path: Path) -> None:
    """The owner rewrites his log and his heads, and signs it all: the earlier proof in the auditor's hands stands against it."""
    honest, rewritten = tmp_path / "honest", tmp_path / "rewritten"
    append(honest, "decision", {"run_id": "run-1", "verdict": "BLOCK"})
    append(honest, "event", {})
    shutil.copytree(honest / "keys", rewritten / "keys")
    earlier, key = proven(honest, tmp_path / "earlier.json"), first_key(honest)
    for _ in range(4):
        append(rewritten, "decision", {"run_id": "run-1", "verdict": "PASS"})
    later = proven(rewritten, tmp_path / "later.json", since=earlier)
    with pytest.raises(DataError, match="does not extend its earlier head"):
        list(check_proof(later, [key], since=earlier))
    (rewritten / LOG).unlink()
    (rewritten / "heads.jsonl").unlink()
    append(rewritten, "decision", {"run_id": "run-1", "verdict": "PASS"})
    with pytest.raises(DataError, match="head is over 2 lines, the log .*has 1"):
        proven(rewritten, tmp_path / "later.json", since=earlier)


def test_the_commands(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = ("--workspace", str(workspace)), tmp_path / "proof.json"
    write_public_key(tmp_path / "first.pub", first_key(workspace))
    code, told, _ = cbd(capsys, "audit", "prove", "run-1", "--out", str(out), *place)
    assert code == 0 and "lines: [2, 5]" in told and told.splitlines()[-1] == f"next: cbd audit verify {out} --trust KEY.pub"
    assert cbd(capsys, "audit", "prove", "run-1", "--out", str(out), *place)[0] == 2, "nothing is overwritten"
    assert cbd(capsys, "audit", "prove", "run-9", "--out", str(tmp_path / "none"), *place)[0] == 2
    elsewhere = ("--workspace", str(tmp_path / "elsewhere"))
    code, told, _ = cbd(capsys, "audit", "verify", str(out), "--trust", str(tmp_path / "first.pub"), *elsewhere)
    assert code == 0 and "line 5: " in told
    code, _, err = cbd(capsys, "audit", "verify", str(out), *elsewhere)
    assert code == 2 and "--trust KEY" in err
    ensure_key(tmp_path / "elsewhere")
    assert cbd(capsys, "audit", "verify", str(out), *elsewhere)[0] == 2
    trust_key(tmp_path / "elsewhere", tmp_path / "first.pub")
    assert cbd(capsys, "audit", "verify", str(out), *elsewhere)[0] == 0


def test_an_auditor_without_a_workspace_of_his_own_believes_the_key_that_he_trusts(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, key = proven(workspace, tmp_path / "proof.json"), tmp_path / "first.pub"
    write_public_key(key, first_key(workspace))
    his = ("--workspace", str(tmp_path / "auditor"))
    assert cbd(capsys, "audit", "verify", str(path), *his)[0] == 2, "he trusts nobody yet"
    assert cbd(capsys, "keys", "trust", str(key), *his)[0] == 0
    assert cbd(capsys, "audit", "verify", str(path), *his)[0] == 0
    assert cbd(capsys, "audit", "verify", str(path), *his, "--trust", str(key))[0] == 0
    assert cbd(capsys, "keys", "trust", str(key), "--remove", *his)[0] == 0
    assert cbd(capsys, "audit", "verify", str(path), *his)[0] == 2
