"""Keys hand over in the log: what was signed before stays valid, a revoked key signs nothing from then on."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from decided_case import make_case

from cbd import audit
from cbd.audit import LOG, append, verify_log
from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError
from cbd.heads import read_log, sign_head
from cbd.keys import ENVIRONMENT, ensure_key, generate_key, is_development, key_id, load_public_key, sign, write_private_key
from components.decision import read_decision, write_decision
from components.keyring import list_keys, rotate_key, trust_key, trusted_keys
from components.verification import verify_all

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Two entries and a head under a first key, two and a head under a second."""
    for _ in range(2):
        append(tmp_path, "event", {})
    sign_head(tmp_path)
    rotate(tmp_path)
    append(tmp_path, "event", {})
    sign_head(tmp_path)
    return tmp_path


def rotate(workspace: Path, to: Path | None = None) -> dict[str, Any]:
    return rotate_key(workspace, to=to, reason="it is time", by="me")


def resigned(workspace: Path, number: int, key: Any) -> None:
    """Signs a line of the log again, with another key."""
    lines = (workspace / LOG).read_bytes().splitlines()
    entry = json.loads(lines[number - 1])
    entry["signature"] = sign(bytes.fromhex(entry["hash"]), key)
    lines[number - 1] = canonical_json(entry)
    (workspace / LOG).write_bytes(b"\n".join(lines) + b"\n")


def test_what_was_signed_before_a_rotation_stays_valid(workspace: Path) -> None:
    entries = read_log(workspace)
    assert [entry["event"] for entry in entries] == ["event", "event", "rotate", "event"]
    assert entries[2]["data"]["reason"] == "it is time" and entries[2]["data"]["by"] == "me"
    first, second = list_keys(workspace)
    assert (first["state"], first["since"], first["until"]) == ("revoked", 1, 3)
    assert (second["state"], second["since"], second["until"], second["development"]) == ("signs", 4, None, True)
    assert second["key_id"] == key_id(load_public_key(workspace)) == entries[2]["data"]["key_id"]


def test_three_keys_follow_one_another(workspace: Path) -> None:
    rotate(workspace)
    append(workspace, "event", {})
    assert [row["state"] for row in list_keys(workspace)] == ["revoked", "revoked", "signs"] and len(read_log(workspace)) == 6


def test_a_line_by_a_revoked_key_is_refused(tmp_path: Path) -> None:
    append(tmp_path, "event", {})
    old = ensure_key(tmp_path)
    rotate(tmp_path)
    append(tmp_path, "event", {})
    resigned(tmp_path, 3, old)
    with pytest.raises(DataError, match="line 3 was not signed by the key of that time"):
        read_log(tmp_path)


def test_a_revoked_key_hands_over_to_nobody(tmp_path: Path) -> None:
    """A thief of the old key goes on from the line before the rotation: the head after it contradicts him."""
    append(tmp_path, "event", {})
    shutil.copytree(tmp_path, tmp_path / "thief", ignore=shutil.ignore_patterns("thief"))
    rotate(tmp_path)
    sign_head(tmp_path)
    rotate(tmp_path / "thief")
    shutil.copyfile(tmp_path / "thief" / LOG, tmp_path / LOG)
    with pytest.raises(DataError, match="not signed by the key of that time|ends under key"):
        read_log(tmp_path)


@pytest.mark.parametrize("own", [True, False])
def test_a_rotation_that_was_cut_off_again_is_missed_by_its_head(tmp_path: Path, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stole the old key undoes its revocation: the log and the public key are as before it."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    append(tmp_path, "event", {})
    sign_head(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "before")
    write_private_key(tmp_path / "new.pem", generate_key())
    rotate(tmp_path, None if own else tmp_path / "new.pem")
    assert len(list(verify_all(tmp_path))) == 2
    for name in (LOG, "keys/signing.pub", "keys/signing.pem"):
        shutil.copy(tmp_path / "before" / name, tmp_path / name)
    with pytest.raises(DataError, match="over 2 lines, the log has 1: it was cut off"):
        list(verify_all(tmp_path))


def test_a_rotation_from_another_key_than_the_one_that_signed_it_is_refused(workspace: Path) -> None:
    lines = (workspace / LOG).read_bytes().splitlines()
    entry, stranger = json.loads(lines[2]), generate_key()
    entry["data"]["from"] = audit.to_pem(stranger.public_key())
    entry["hash"] = audit._hash(entry)
    entry["signature"] = sign(bytes.fromhex(entry["hash"]), stranger)
    (workspace / LOG).write_bytes(b"\n".join([*lines[:2], canonical_json(entry), *lines[3:]]) + b"\n")
    with pytest.raises(DataError, match="line 1 was not signed by the key of that time"):
        read_log(workspace)


def test_a_later_rotation_from_an_earlier_key_is_refused(workspace: Path) -> None:
    """The right key signs it, and it says that the first one hands over."""
    keys = read_log(workspace)[2]["data"]
    append(workspace, "rotate", {name: keys[name] for name in ("from", "to", "key_id")})
    with pytest.raises(DataError, match="line 5 hands over from another key than the one that signed it"):
        read_log(workspace)


def test_a_decision_holds_under_the_key_of_its_time_and_under_no_other(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    case.decide()
    old = ensure_key(tmp_path)
    rotate(tmp_path)
    assert read_decision(case.decision, tmp_path).content["signed_by"] == {"key_id": key_id(old.public_key()), "development": True}
    (case.decision / "decision.sig").write_text(sign((case.decision / "decision.json").read_bytes(), ensure_key(tmp_path)) + "\n")
    with pytest.raises(DataError, match="signature is not this workspace's key"):
        read_decision(case.decision, tmp_path)


def test_a_decision_that_a_revoked_key_signed_afterwards_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    case.decide()
    old = ensure_key(tmp_path)
    rotate(tmp_path)
    forged = json.loads((case.decision / "decision.json").read_text()) | {"verdict": "PASS", "created": "2020-01-01T00:00:00Z"}
    (case.decision / "decision.json").write_bytes(canonical_json(forged))
    (case.decision / "decision.sig").write_text(sign(canonical_json(forged), old) + "\n")
    with pytest.raises(DataError, match="signature is not this workspace's key"):
        read_decision(case.decision, tmp_path)


def test_a_key_that_was_rotated_away_while_something_was_signed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "event", {})
    old = ensure_key(tmp_path)
    rotate(tmp_path)
    monkeypatch.setattr("components.decision.ensure_key", lambda workspace: old)
    with pytest.raises(DataError, match="rotated away meanwhile"):
        write_decision({"digests": {}, "run_id": "r", "attempt": {}, "trial": False, "verdict": "PASS"}, tmp_path / "out", tmp_path)


@pytest.mark.parametrize("crash_at", ["log_store.write_line", "audit.write_public_key", "audit.os.replace"])
def test_a_crash_in_a_rotation_leaves_one_key_in_charge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_at: str) -> None:
    append(tmp_path, "event", {})
    before = ensure_key(tmp_path)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"cbd.{crash_at}", crash)
        with pytest.raises(KeyboardInterrupt):
            rotate(tmp_path)
    assert read_log(tmp_path) and list(verify_all(tmp_path)) and list_keys(tmp_path), "readers go on"
    append(tmp_path, "event", {})
    entries, key = read_log(tmp_path), load_public_key(tmp_path)
    handed_over = [entry for entry in entries if entry["event"] == "rotate"]
    assert len(handed_over) == (crash_at != "log_store.write_line") and (key_id(key) == key_id(before.public_key())) == (not handed_over)
    assert not (tmp_path / "keys" / "next.pem").exists()


def test_after_a_crash_in_a_rotation_or_in_a_line_keys_can_be_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "event", {})
    with monkeypatch.context() as patch:
        patch.setattr("cbd.audit._finish_rotation", lambda workspace, last: None)
        audit.rotate(tmp_path, generate_key(), {}, own=True)
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"data":{"a"')
    assert len(read_log(tmp_path)) == 2, "a line that a crash left unfinished is none"
    with pytest.raises(DataError, match="line 3 is torn.*the next entry cuts it off"):
        list(verify_all(tmp_path))
    rotate(tmp_path)
    assert [entry["event"] for entry in read_log(tmp_path)] == ["event", "rotate", "torn", "rotate"] and list(verify_all(tmp_path))


@pytest.mark.parametrize("read", [read_log, load_public_key, ensure_key, lambda workspace: list(verify_all(workspace))])
def test_who_reads_while_keys_are_handed_over_waits_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
) -> None:
    """Between log, public and private key there are moments in which they do not belong together."""
    append(tmp_path, "event", {})
    write, reading = audit.write_public_key, []

    def write_slowly(path: Path, key: Any) -> None:
        reading.append(pool.submit(read, tmp_path))
        with pytest.raises(TimeoutError):
            reading[0].result(timeout=0.2)
        write(path, key)

    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr("cbd.audit.write_public_key", write_slowly)
        rotate(tmp_path)
        assert reading[0].result(timeout=30)


def test_the_public_key_before_a_rotation_is_refused_once_the_next_one_signed(workspace: Path) -> None:
    old = read_log(workspace)[2]["data"]["from"]
    (workspace / "keys" / "signing.pem").unlink()
    (workspace / "keys" / "signing.pub").write_text(old)
    with pytest.raises(DataError, match="ends under key"):
        read_log(workspace)


def test_a_rotation_that_the_key_did_not_sign_is_refused_and_takes_no_key_away(tmp_path: Path) -> None:
    append(tmp_path, "event", {})
    first, mine, stranger = read_log(tmp_path)[0], ensure_key(tmp_path), generate_key()
    keys = {"from": audit.to_pem(mine.public_key()), "to": audit.to_pem(stranger.public_key()), "key_id": key_id(stranger.public_key())}
    forged = audit._seal("rotate", keys, first, stranger)
    with (tmp_path / LOG).open("ab") as file:
        file.write(canonical_json(forged) + b"\n")
    with pytest.raises(DataError, match="line 2 was not signed by the key of that time"):
        read_log(tmp_path)
    with pytest.raises(DataError, match="does not sign after the last line"):
        append(tmp_path, "event", {})
    assert ensure_key(tmp_path).private_numbers() == mine.private_numbers()


def test_to_a_key_of_ones_own_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, mine = tmp_path / "workspace", tmp_path / "mine.pem"
    append(workspace, "event", {})
    write_private_key(mine, generate_key())
    assert rotate(workspace, mine)["following"] == f"export {ENVIRONMENT}={mine}"
    assert not (workspace / "keys" / "signing.pem").exists(), "a revoked key is not kept"
    with pytest.raises(DataError, match=ENVIRONMENT):
        append(workspace, "event", {})
    monkeypatch.setenv(ENVIRONMENT, str(mine))
    append(workspace, "event", {})
    assert not is_development(workspace) and list_keys(workspace)[-1]["development"] is False
    assert rotate(workspace)["following"] == f"unset {ENVIRONMENT}"
    with pytest.raises(DataError, match="does not belong"):
        append(workspace, "event", {})
    monkeypatch.delenv(ENVIRONMENT)
    append(workspace, "event", {})
    assert len(verify_log(workspace / LOG, key=load_public_key(workspace))) == 5
    with pytest.raises(DataError, match="a revoked key never signs again"):
        rotate(workspace, mine)


def test_from_another_key_in_the_workspace_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private_key(tmp_path / "mine.pem", generate_key())
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "mine.pem"))
    append(tmp_path, "event", {})
    assert list_keys(tmp_path)[-1]["development"] is True
    assert rotate(tmp_path)["following"] == f"unset {ENVIRONMENT}"
    monkeypatch.delenv(ENVIRONMENT)
    append(tmp_path, "event", {})
    assert len(read_log(tmp_path)) == 3


def test_without_a_reason_nothing_is_rotated(workspace: Path) -> None:
    before = (workspace / LOG).read_bytes()
    with pytest.raises(ConfigError, match="--reason"):
        rotate_key(workspace, to=None, reason=" ", by="me")
    assert (workspace / LOG).read_bytes() == before


def test_a_trusted_key_is_kept_by_its_id_and_signs_nothing(workspace: Path, tmp_path: Path) -> None:
    ensure_key(tmp_path / "other")
    file = tmp_path / "other" / "keys" / "signing.pub"
    told = trust_key(workspace, file)
    assert [key_id(key) for key in trusted_keys(workspace)] == [told["key_id"]]
    assert list_keys(workspace)[-1]["state"] == "trusted"
    os.rename(workspace / "keys" / "trusted" / f"{told['key_id']}.pub", workspace / "keys" / "trusted" / f"{'0' * 64}.pub")
    with pytest.raises(DataError, match="not the one that its name says"):
        trusted_keys(workspace)
    (workspace / "keys" / "trusted" / f"{'0' * 64}.pub").unlink()
    with pytest.raises(DataError, match="is not trusted here"):
        trust_key(workspace, file, remove=True)


def test_the_commands_tell_what_signs_now_and_what_next(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--workspace", str(workspace))
    code, out, _ = cbd(capsys, "keys", "rotate", "--reason", "le\x1baver", *place)
    assert code == 0 and "development: True" in out and out.splitlines()[-1] == f"next: unset {ENVIRONMENT}" and "\x1b" not in out
    code, out, _ = cbd(capsys, "keys", "list", *place, "--json")
    assert code == 0 and [row["state"] for row in json.loads(out)["keys"]] == ["revoked", "revoked", "signs"]
    assert cbd(capsys, "keys", "list", *place)[0] == 0
    code, out, _ = cbd(capsys, "keys", "trust", str(workspace / "keys" / "signing.pub"), *place)
    assert code == 0 and "trusted: True" in out
    code, _, err = cbd(capsys, "keys", "trust", str(tmp_path / "nothing"), *place)
    assert code == 2 and "no such key" in err
