"""The log: what was changed is named, and writers at once lose and double nothing."""

import errno
import fcntl
import json
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cbd import lines
from cbd.audit import FIRST, _hash, append, verify_log
from cbd.config import canonical_json
from cbd.errors import DataError, EnvironmentFault
from cbd.files import locked
from cbd.heads import read_log
from cbd.keys import ensure_key, load_public_key, sign, to_pem
from cbd.log_store import FileLog

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of five entries beside the key that signed them."""
    for number in range(5):
        append(tmp_path, "decision", {"number": number, "name": "é\n\x1b"})
    return tmp_path / "audit.jsonl"


def change(log: Path, *lines: bytes) -> None:
    log.write_bytes(b"".join(line + b"\n" for line in lines))


def _append_many(workspace: str, writer: int, number: int, barrier: Any) -> bytes:
    barrier.wait()
    for index in range(number):
        append(Path(workspace), "event", {"writer": writer, "index": index})
    return to_pem(ensure_key(Path(workspace)).public_key()).encode()


def test_the_log_reads_back_what_was_written(log: Path) -> None:
    entries = verify_log(log, key=load_public_key(log.parent))
    assert [entry["seq"] for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0]["previous"] == FIRST and entries[4]["previous"] == entries[3]["hash"]
    assert entries[2]["data"] == {"number": 2, "name": "é\n\x1b"}
    assert b"\x1b" not in log.read_bytes() and log.read_bytes().count(b"\n") == 5


def test_a_line_dated_before_the_one_that_it_follows_is_named(log: Path) -> None:
    """Whoever has the key may date it as he likes: by that an override that is over would count again."""
    last, key = verify_log(log)[-1], ensure_key(log.parent)
    entry = {"seq": 6, "time": "2020-01-01T00:00:00.000Z", "event": "event", "data": {}, "previous": last["hash"]}
    digest = _hash(entry)
    entry |= {"hash": digest, "signature": sign(bytes.fromhex(digest), key)}
    with log.open("ab") as file:
        file.write(canonical_json(entry) + b"\n")
    with pytest.raises(DataError, match="line 6 is dated '2020-01-01T00:00:00.000Z', before the line that it follows"):
        verify_log(log, key=load_public_key(log.parent))


def test_no_log_has_no_entries(tmp_path: Path) -> None:
    assert verify_log(tmp_path / "audit.jsonl") == []


def test_an_edited_line_is_named(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:2], lines[2].replace(b'"number":2', b'"number":9'), *lines[3:])
    with pytest.raises(DataError, match="line 3 was edited"):
        verify_log(log)


def test_a_line_nested_deeper_than_python_goes_is_named(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    for depth in range(800, 1000):
        change(log, lines[0].replace(b'"number":0', b'"number":' + b"[" * depth + b"]" * depth), *lines[1:])
        with pytest.raises(DataError, match="line 1 (was edited|is no JSON)"):
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
    other, forged = tmp_path / "other", tmp_path / "other" / "audit.jsonl"
    for entry in verify_log(log):
        append(other, entry["event"], {"number": 9})
    assert len(verify_log(forged)) == 5
    with pytest.raises(DataError, match="line 1 was not signed"):
        verify_log(forged, key=load_public_key(tmp_path))


def test_a_torn_last_line_is_named_then_cut_off_and_recorded(log: Path) -> None:
    with log.open("ab") as file:
        file.write(b'{"seq":6,"ti')
    with pytest.raises(DataError, match="line 6 is torn.*the next entry cuts it off"):
        verify_log(log)
    append(log.parent, "decision", {"number": 5})
    entries = verify_log(log, key=load_public_key(log.parent))
    assert [entry["event"] for entry in entries[5:]] == ["torn", "decision"]
    assert entries[5]["data"]["text"] == '{"seq":6,"ti' and entries[5]["data"]["num_bytes"] == 12


def test_a_log_that_is_torn_from_its_first_line_goes_on(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_bytes(b'{"seq":1')
    append(tmp_path, "decision", {})
    assert [entry["event"] for entry in verify_log(tmp_path / "audit.jsonl")] == ["torn", "decision"]


def test_nothing_is_appended_after_an_edited_last_line(log: Path) -> None:
    lines = log.read_bytes().splitlines()
    change(log, *lines[:4], lines[4].replace(b'"number":4', b'"number":9'))
    before = log.read_bytes()
    with pytest.raises(DataError, match="last line was edited"):
        append(log.parent, "decision", {})
    assert log.read_bytes() == before


def test_long_entries_are_found_again(tmp_path: Path) -> None:
    """Longer than the blocks in which the end of the log is sought."""
    path = tmp_path / "audit.jsonl"
    for size in (10, 70_000, 200_000, 65_536 - 1, 5):
        append(tmp_path, "event", {"text": "x" * size})
    with path.open("ab") as file:
        file.write(b"y" * 150_000)
    append(tmp_path, "event", {})
    assert [entry["event"] for entry in verify_log(path)] == ["event"] * 5 + ["torn", "event"]


def test_a_full_disk_leaves_the_log_as_it_was(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write, calls = log.read_bytes(), os.write, iter(range(2))

    def fill_up(file: int, data: bytes) -> int:
        if next(calls) == 0:
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lines.os, "write", fill_up)
        with pytest.raises(EnvironmentFault, match="No space left"):
            append(log.parent, "decision", {"text": "x" * 100})
    assert log.read_bytes() == before


def test_what_is_no_number_is_not_logged(log: Path) -> None:
    before = log.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        append(log.parent, "decision", {"rate": float("nan")})
    assert log.read_bytes() == before


def test_a_log_that_another_process_has_only_just_made_has_no_lines_and_needs_no_key(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").touch()
    assert read_log(tmp_path) == []


def test_a_line_that_another_process_is_writing_is_not_read(log: Path) -> None:
    half = (log.read_bytes().splitlines()[-1])[:40]
    with locked(log) as file, ThreadPoolExecutor() as pool:
        os.write(file, half)
        reading = pool.submit(verify_log, log)
        with pytest.raises(TimeoutError):
            reading.result(timeout=0.2)
        os.ftruncate(file, log.stat().st_size - len(half))
        fcntl.flock(file, fcntl.LOCK_UN)
        assert len(reading.result(timeout=30)) == 5


def test_a_log_that_grows_while_it_is_read_is_read_as_it_was(log: Path) -> None:
    lines = FileLog(log).lines()
    next(lines)
    append(log.parent, "decision", {"number": 5})
    assert len(list(lines)) == 4


def test_processes_that_start_and_write_at_once_make_one_key_and_lose_and_double_nothing(tmp_path: Path) -> None:
    with SPAWN.Manager() as manager, SPAWN.Pool(3) as pool:
        barrier = manager.Barrier(3)
        keys = pool.starmap(_append_many, [(str(tmp_path), writer, 30, barrier) for writer in range(3)], chunksize=1)
    assert set(keys) == {(tmp_path / "keys" / "signing.pub").read_bytes()}
    entries = verify_log(tmp_path / "audit.jsonl", key=load_public_key(tmp_path))
    found = sorted((entry["data"]["writer"], entry["data"]["index"]) for entry in entries)
    assert found == [(writer, index) for writer in range(3) for index in range(30)]
    assert json.loads((tmp_path / "audit.jsonl").read_bytes().splitlines()[-1])["seq"] == 90
