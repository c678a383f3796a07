"""Keys, signatures and the log: what was changed is named, and writers at once lose and double nothing."""

import errno
import json
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cbd import audit
from cbd.audit import FIRST, append, ensure_key, load_public_key, sign, verify, verify_log
from cbd.errors import DataError, EnvironmentFault

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of five entries beside the key that signed them."""
    key = ensure_key(tmp_path)
    for number in range(5):
        append(tmp_path / "audit.jsonl", "decision", {"number": number, "name": "é\n\x1b"}, key=key)
    return tmp_path / "audit.jsonl"


def change(log: Path, *lines: bytes) -> None:
    log.write_bytes(b"".join(line + b"\n" for line in lines))


def _append_many(workspace: str, writer: int, number: int, barrier: Any) -> bytes:
    barrier.wait()
    key = ensure_key(Path(workspace))
    for index in range(number):
        append(Path(workspace) / "audit.jsonl", "event", {"writer": writer, "index": index}, key=key)
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_the_key_is_private_and_stays_the_same(tmp_path: Path) -> None:
    key = ensure_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "keys" / "signing.pem").stat().st_mode) == 0o600
    assert isinstance(key.curve, ec.SECP256R1)
    before = (tmp_path / "keys" / "signing.pem").read_bytes()
    assert ensure_key(tmp_path).private_numbers() == key.private_numbers()
    assert (tmp_path / "keys" / "signing.pem").read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    ensure_key(tmp_path)
    (tmp_path / "keys" / "signing.pem").chmod(0o644)
    with pytest.raises(DataError, match="chmod 600"):
        ensure_key(tmp_path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    ensure_key(tmp_path)
    path = tmp_path / "keys" / "signing.pem"
    for data in (
        ed25519.Ed25519PrivateKey.generate().private_bytes(*form),
        ec.generate_private_key(ec.SECP384R1()).private_bytes(*form),
        b"not a key",
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match="expected a P-256 key|not a private key"):
            ensure_key(tmp_path)


def test_a_swapped_public_key_is_noticed(tmp_path: Path) -> None:
    ensure_key(tmp_path / "mine")
    ensure_key(tmp_path / "other")
    (tmp_path / "mine" / "keys" / "signing.pub").write_bytes((tmp_path / "other" / "keys" / "signing.pub").read_bytes())
    with pytest.raises(DataError, match="does not belong"):
        load_public_key(tmp_path / "mine")
    with pytest.raises(DataError, match="no such key"):
        load_public_key(tmp_path / "nowhere")


def test_a_signature_holds_for_its_bytes_and_key_only(tmp_path: Path) -> None:
    key, other = ensure_key(tmp_path / "a"), ensure_key(tmp_path / "b")
    signature = sign(b"PASS", key)
    assert verify(b"PASS", signature, key.public_key())
    assert not verify(b"PASs", signature, key.public_key())
    assert not verify(b"PASS", signature, other.public_key())
    for broken in ("", "AAAA", "not base64!", signature[:-4], signature + "AAAA"):
        assert not verify(b"PASS", broken, key.public_key())


def test_the_log_reads_back_what_was_written(log: Path) -> None:
    entries = verify_log(log, key=load_public_key(log.parent))
    assert [entry["seq"] for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0]["previous"] == FIRST and entries[4]["previous"] == entries[3]["hash"]
    assert entries[2]["data"] == {"number": 2, "name": "é\n\x1b"}
    assert b"\x1b" not in log.read_bytes() and log.read_bytes().count(b"\n") == 5


def test_no_log_has_no_entries(tmp_path: Path) -> None:
    assert verify_log(tmp_path / "audit.jsonl") == []


def test_an_edited_line_is_named(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:2], lines[2].replace(b'"number":2', b'"number":9'), *lines[3:])
    with pytest.raises(DataError, match="line 3 was edited"):
        verify_log(log)


def test_a_line_edited_without_changing_its_meaning_is_named(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:2], lines[2].replace(b'"seq":3', b'"seq": 3'), *lines[3:])
    with pytest.raises(DataError, match="line 3 was edited"):
        verify_log(log)


@pytest.mark.parametrize(("removed", "named"), [(0, 1), (1, 2), (3, 4)])
def test_a_removed_line_is_named(log: Path, removed: int, named: int) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:removed], *lines[removed + 1 :])
    with pytest.raises(DataError, match=f"line {named} has number {named + 1}"):
        verify_log(log)


def test_reordered_and_doubled_lines_are_named(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    change(log, lines[0], lines[2], lines[1], *lines[3:])
    with pytest.raises(DataError, match="line 2 has number 3"):
        verify_log(log)
    change(log, lines[0], lines[1], lines[1], *lines[2:])
    with pytest.raises(DataError, match="line 3 has number 2"):
        verify_log(log)


@pytest.mark.parametrize("line", [b"", b"[]", b"{}", b"nonsense", b"\xff\xfe", b'{"seq":3}'])
def test_a_line_that_is_no_entry_is_named(log: Path, line: bytes) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:2], line, *lines[3:])
    with pytest.raises(DataError, match="line 3 is no"):
        verify_log(log)


def test_a_log_rebuilt_with_another_key_is_noticed(log: Path, tmp_path: Path) -> None:
    """Whoever rewrites the whole chain still lacks the key."""
    forged = tmp_path / "forged.jsonl"
    other = ensure_key(tmp_path / "other")
    for entry in verify_log(log):
        append(forged, entry["event"], {"number": 9}, key=other)
    assert len(verify_log(forged)) == 5
    with pytest.raises(DataError, match="line 1 was not signed"):
        verify_log(forged, key=load_public_key(tmp_path))


def test_a_torn_last_line_is_named_then_cut_off_and_recorded(log: Path) -> None:
    with log.open("ab") as file:
        file.write(b'{"seq":6,"ti')
    with pytest.raises(DataError, match="line 6 is torn"):
        verify_log(log)
    append(log, "decision", {"number": 5}, key=ensure_key(log.parent))
    entries = verify_log(log, key=load_public_key(log.parent))
    assert [entry["event"] for entry in entries[5:]] == ["torn", "decision"]
    assert entries[5]["data"]["text"] == '{"seq":6,"ti' and entries[5]["data"]["num_bytes"] == 12


def test_a_log_that_is_torn_from_its_first_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_bytes(b'{"seq":1')
    append(tmp_path / "audit.jsonl", "decision", {}, key=ensure_key(tmp_path))
    assert [entry["event"] for entry in verify_log(tmp_path / "audit.jsonl")] == ["torn", "decision"]


def test_nothing_is_appended_after_an_edited_last_line(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:4], lines[4].replace(b'"number":4', b'"number":9'))
    before = log.read_bytes()
    with pytest.raises(DataError, match="last line was edited"):
        append(log, "decision", {}, key=ensure_key(log.parent))
    assert log.read_bytes() == before


def test_long_entries_are_found_again(tmp_path: Path) -> None:
    """Longer than the blocks in which the end of the log is sought."""
    key, path = ensure_key(tmp_path), tmp_path / "audit.jsonl"
    for size in (10, 70_000, 200_000, 65_536 - 1, 5):
        append(path, "event", {"text": "x" * size}, key=key)
    with path.open("ab") as file:
        file.write(b"y" * 150_000)
    append(path, "event", {}, key=key)
    assert [entry["event"] for entry in verify_log(path)] == ["event"] * 5 + ["torn", "event"]


def test_a_full_disk_leaves_the_log_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write, calls = log.read_bytes(), os.write, iter(range(2))

    def fill_up(file: int, data: bytes) -> int:
        if next(calls) == 0:
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit.os, "write", fill_up)
        with pytest.raises(EnvironmentFault, match="No space left"):
            append(log, "decision", {"text": "x" * 100}, key=ensure_key(log.parent))
    assert log.read_bytes() == before


def test_what_is_no_number_is_not_logged(log: Path) -> None:
    before = log.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        append(log, "decision", {"rate": float("nan")}, key=ensure_key(log.parent))
    assert log.read_bytes() == before


def test_processes_that_start_and_write_at_once_make_one_key_and_lose_and_double_nothing(tmp_path: Path) -> None:
    with SPAWN.Manager() as manager, SPAWN.Pool(3) as pool:
        barrier = manager.Barrier(3)
        keys = pool.starmap(_append_many, [(str(tmp_path), writer, 30, barrier) for writer in range(3)], chunksize=1)
    assert set(keys) == {(tmp_path / "keys" / "signing.pub").read_bytes()}
    entries = verify_log(tmp_path / "audit.jsonl", key=load_public_key(tmp_path))
    found = sorted((entry["data"]["writer"], entry["data"]["index"]) for entry in entries)
    assert found == [(writer, index) for writer in range(3) for index in range(30)]
    assert json.loads((tmp_path / "audit.jsonl").read_bytes().splitlines()[-1])["seq"] == 90
