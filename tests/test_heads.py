"""Signed heads of the log: a log that was cut, forked or rewritten since contradicts them, and is named."""

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest

from cbd.audit import LOG, append, verify_log
from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.heads import HEADS, is_by, parse_head, read_heads, read_log, sign_head
from cbd.keys import ensure_key, key_id, load_public_key, sign
from cbd.log_store import open_log
from cbd.merkle import leaf_hash, root_of

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A log of six entries, with heads over the first three and over five."""
    for number in range(6):
        append(tmp_path, "event", {"number": number})
        if number in (2, 4):
            sign_head(tmp_path)
    return tmp_path


def cut(workspace: Path, num_lines: int) -> None:
    """Keeps so many lines of the log."""
    lines = (workspace / LOG).read_bytes().splitlines(keepends=True)
    (workspace / LOG).write_bytes(b"".join(lines[:num_lines]))


def _append_and_sign(workspace: str, number: int) -> None:
    for index in range(number):
        append(Path(workspace), "event", {"index": index})
        sign_head(Path(workspace))


def test_a_head_is_the_signed_root_over_the_lines_as_they_stand_on_disk(workspace: Path) -> None:
    lines, key = (workspace / LOG).read_bytes().splitlines(), load_public_key(workspace)
    first, second = read_heads(open_log(workspace))
    assert (first["size"], second["size"]) == (3, 5) and second["root"] == root_of(map(leaf_hash, lines[:5])).hex()
    assert second["key_id"] == key_id(key) and is_by(second, key)
    assert not is_by({**second, "size": 4}, key) and not is_by(second, ensure_key(workspace / "other").public_key())
    assert len(read_log(workspace)) == 6


def test_no_log_has_no_entries_and_no_head(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    with pytest.raises(DataError, match="no log"):
        sign_head(tmp_path)


def test_a_log_whose_end_was_cut_off_is_refused_and_gets_no_new_head(workspace: Path) -> None:
    cut(workspace, 4)
    assert len(verify_log(workspace / LOG, key=load_public_key(workspace))) == 4, "the chain alone does not show it"
    for attack in (read_log, sign_head):
        with pytest.raises(DataError, match="over 5.*cut off"):
            attack(workspace)


def test_a_log_that_went_another_way_after_it_was_cut_is_refused_and_gets_no_new_head(workspace: Path) -> None:
    """The pipeline itself signs the new lines: only the heads know better."""
    cut(workspace, 4)
    for number in range(5):
        append(workspace, "event", {"other": number})
    assert len(verify_log(workspace / LOG, key=load_public_key(workspace))) == 9
    with pytest.raises(DataError, match="over 5 lines is of another history"):
        read_log(workspace)
    with pytest.raises(DataError, match="another history than its head"):
        sign_head(workspace)


def test_a_missing_log_beside_its_heads_is_refused(workspace: Path) -> None:
    (workspace / LOG).unlink()
    with pytest.raises(DataError, match=r"audit.jsonl: missing, and .*heads.jsonl says that it had 5 lines"):
        read_log(workspace)


def test_a_head_by_another_key_is_refused(workspace: Path) -> None:
    other = workspace / "other"
    shutil.copytree(workspace, other, ignore=shutil.ignore_patterns("keys", "other"))
    other_key = ensure_key(other)
    head = read_heads(open_log(workspace))[-1]
    forged = {**head, "key_id": key_id(other_key.public_key())}
    forged["signature"] = sign(canonical_json({name: value for name, value in forged.items() if name != "signature"}), other_key)
    (workspace / HEADS).write_bytes(canonical_json(forged) + b"\n")
    with pytest.raises(DataError, match="over 5 lines was not signed by the key of that time"):
        read_log(workspace)


@pytest.mark.parametrize("change", [{"size": 4}, {"size": 6}, {"root": "0" * 64}, {"time": "2020-01-01T00:00:00.000Z"}])
def test_an_edited_head_is_refused(workspace: Path, change: dict[str, Any]) -> None:
    head = read_heads(open_log(workspace))[-1]
    (workspace / HEADS).write_bytes(canonical_json({**head, **change}) + b"\n")
    with pytest.raises(DataError, match="was not signed"):
        read_log(workspace)


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"nonsense", b"\xff", b"[" * 100_000])
def test_what_is_no_head_is_refused_by_its_line(workspace: Path, text: bytes) -> None:
    (workspace / HEADS).write_bytes((workspace / HEADS).read_bytes() + text + b"\n")
    with pytest.raises(DataError, match="heads.jsonl: line 3: is no head"):
        read_log(workspace)


def test_a_head_that_is_not_canonical_or_has_other_fields_is_none(workspace: Path) -> None:
    head = read_heads(open_log(workspace))[0]
    texts = [json.dumps(head).encode(), canonical_json({**head, "more": 1}), canonical_json({**head, "size": "3"})]
    texts += [canonical_json({**head, "size": 0}), canonical_json({**head, "size": True}), canonical_json({**head, "schema_version": 2})]
    assert parse_head(canonical_json(head), told="it") == head
    for text in texts:
        with pytest.raises(DataError, match="it: is no head"):
            parse_head(text, told="it")


def test_a_head_that_a_crash_left_unfinished_is_none_and_the_next_one_takes_its_place(workspace: Path) -> None:
    with (workspace / HEADS).open("ab") as file:
        file.write(b'{"key_id":"')
    assert len(read_log(workspace)) == 6
    sign_head(workspace)
    assert [head["size"] for head in read_heads(open_log(workspace))] == [3, 5, 6] and len(read_log(workspace)) == 6


def test_a_clock_that_was_set_back_does_not_go_back_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "event", {})
    monkeypatch.setattr("cbd.audit.now", lambda: "2001-01-01T00:00:00.000Z")
    append(tmp_path, "event", {})
    first, second = read_log(tmp_path)
    assert second["time"] == first["time"] > "2026"


def test_processes_that_append_and_sign_at_once_agree(tmp_path: Path) -> None:
    with SPAWN.Pool(3) as pool:
        pool.starmap(_append_and_sign, [(str(tmp_path), 10)] * 3, chunksize=1)
    assert len(read_log(tmp_path)) == 30
    sizes = [head["size"] for head in read_heads(open_log(tmp_path))]
    assert len(sizes) == 30 and sizes == sorted(sizes) and sizes[-1] == 30
