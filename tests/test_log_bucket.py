"""The log in a bucket, an object for every line: against a stand-in in this process, and a real S3 server where one is named."""

import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from closed_run import close, make_run
from exported_run import run_case

from cbd.audit import append, rotate, verify_log
from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError, EnvironmentFault
from cbd.exported import verify_export
from cbd.heads import read_heads, read_log, sign_head
from cbd.keys import ENVIRONMENT as SIGNING_KEY
from cbd.keys import ensure_key, generate_key, load_public_key, write_private_key
from cbd.log_store import ENVIRONMENT, HEADS, LOG, FileLog, open_log
from components.export import export_run
from components.keyring import rotate_key
from components.log_bucket import BucketLog, line_name
from components.object_store import open_store
from components.proof import check_proof, make_proof
from components.verification import verify_all, verify_run
from pipelines.evidence import timeline

pytestmark = pytest.mark.slow  # an S3 server in the process

REAL = os.environ.get("CBD_TEST_S3_ENDPOINT")
SPAWN = multiprocessing.get_context("spawn")
Make = Callable[..., dict[str, Any]]


@contextmanager
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """A client and a new bucket that the log is kept in; with a signing key that lies outside every workspace."""
    import boto3

    client, bucket = boto3.session.Session().client("s3"), f"cbd-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    write_private_key(tmp_path / "secret" / "key.pem", generate_key())
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "secret" / "key.pem"))
    monkeypatch.setenv(ENVIRONMENT, f"s3://{bucket}/audit")
    yield client, bucket
    kept = client.list_object_versions(Bucket=bucket)
    for item in [*kept.get("Versions", ()), *kept.get("DeleteMarkers", ())]:
        client.delete_object(Bucket=bucket, Key=item["Key"], VersionId=item["VersionId"])
    client.delete_bucket(Bucket=bucket)


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """Of the stand-in: client and bucket."""
    from moto import mock_aws

    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws(), made(monkeypatch, tmp_path) as found:
        yield found


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """Of a real server: client and bucket."""
    if not REAL:
        pytest.skip("CBD_TEST_S3_ENDPOINT names no S3 server")
    monkeypatch.setenv("AWS_ENDPOINT_URL", REAL)
    with made(monkeypatch, tmp_path) as found:
        yield found


def keys(box: tuple[Any, str]) -> list[str]:
    return [item["Key"] for item in box[0].list_objects_v2(Bucket=box[1]).get("Contents", ())]


def test_each_line_is_an_object_and_the_same_bytes_as_in_a_file(box: tuple[Any, str], tmp_path: Path) -> None:
    client, bucket = box
    entries = [append(tmp_path / "a", "event", {"number": number}) for number in range(3)]
    head = sign_head(tmp_path / "a")
    assert keys(box)[1:4] == [f"audit/lines/00000000000{number}.json" for number in (1, 2, 3)]
    text = b"".join(client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys(box)[1:4])
    assert text == b"".join(canonical_json(entry) + b"\n" for entry in entries) == b"".join(open_log(tmp_path / "a").lines())
    assert read_heads(open_log(tmp_path)) == [head] and keys(box)[0].startswith("audit/heads/000000000003-")
    (tmp_path / "copy.jsonl").write_bytes(text)
    assert verify_log(tmp_path / "copy.jsonl", key=load_public_key(tmp_path / "a")) == entries == read_log(tmp_path / "a")
    assert not (tmp_path / "a" / LOG).exists() and not (tmp_path / "a" / HEADS).exists()


def test_workspaces_that_share_the_log_read_what_the_others_wrote(box: tuple[Any, str], tmp_path: Path) -> None:
    for number in range(6):
        append(tmp_path / "ab"[number % 2], "event", {"number": number})
    first, second = (read_log(tmp_path / name) for name in "ab")
    assert first == second and [entry["data"]["number"] for entry in first] == list(range(6))


def test_the_slower_of_two_writers_writes_nothing_and_looks_again(box: tuple[Any, str], tmp_path: Path) -> None:
    append(tmp_path, "event", {})
    with open_log(tmp_path).ending() as end:
        theirs = append(tmp_path, "event", {"who": "the faster one"})
        assert not end.add({**theirs, "data": {"who": "the slower one"}})
    assert [entry["data"] for entry in read_log(tmp_path)] == [{}, {"who": "the faster one"}]


def test_an_event_whose_answer_was_lost_is_not_written_twice(box: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server wrote it, the client heard nothing and asked again."""
    append(tmp_path, "event", {"number": 0})
    log = open_log(tmp_path)
    assert isinstance(log, BucketLog)
    client = log._lines.client

    class Deaf:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def put_object(self, **asked: Any) -> Any:
            client.put_object(**asked)
            return client.put_object(**asked)

    monkeypatch.setattr(log._lines, "client", Deaf())
    append(tmp_path, "event", {"number": 1})
    assert [entry["data"]["number"] for entry in read_log(tmp_path)] == [0, 1]


def _remove(client: Any, bucket: str, number: int) -> None:
    client.delete_object(Bucket=bucket, Key=f"audit/lines/{line_name(number)}")


def _edit(client: Any, bucket: str, number: int) -> None:
    key = f"audit/lines/{line_name(number)}"
    data = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.put_object(Bucket=bucket, Key=key, Body=data.replace(b'"event"', b'"evenX"'))


def _swap(client: Any, bucket: str, number: int) -> None:
    one, other = (f"audit/lines/{line_name(each)}" for each in (number, number + 1))
    first, second = (client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in (one, other))
    client.put_object(Bucket=bucket, Key=one, Body=second)
    client.put_object(Bucket=bucket, Key=other, Body=first)


def _double(client: Any, bucket: str, number: int) -> None:
    data = client.get_object(Bucket=bucket, Key=f"audit/lines/{line_name(number)}")["Body"].read()
    client.put_object(Bucket=bucket, Key=f"audit/lines/{line_name(number)}", Body=data + data)


@pytest.mark.parametrize(
    ("attack", "number", "told"),
    [
        (_remove, 2, "line 2 is missing: it was removed"),
        (_remove, 5, "the head of .* is over 5 lines, the log has 4: it was cut off"),
        (_edit, 3, "line 3 is no log entry: it was edited"),
        (_swap, 3, "line 3 has number 4 and does not follow the line before"),
        (_double, 4, "line 4 is no log entry: it was edited"),
    ],
)
def test_what_is_changed_in_the_bucket_is_named_also_after_it_was_read(
    box: tuple[Any, str], tmp_path: Path, attack: Callable[[Any, str, int], None], number: int, told: str
) -> None:
    for index in range(5):
        append(tmp_path, "event", {"number": index})
    sign_head(tmp_path)
    assert len(read_log(tmp_path)) == 5
    attack(*box, number)
    with pytest.raises(DataError, match=told):
        read_log(tmp_path)


def test_a_log_whose_objects_were_all_removed_is_missed_by_its_heads(box: tuple[Any, str], tmp_path: Path) -> None:
    append(tmp_path, "event", {})
    sign_head(tmp_path)
    _remove(*box, 1)
    with pytest.raises(DataError, match=r"missing, and CBD_LOG s3://.*/audit heads says that it had 1 lines"):
        read_log(tmp_path)


def test_heads_that_several_writers_sign_agree(box: tuple[Any, str], tmp_path: Path) -> None:
    for number in range(6):
        append(tmp_path / "ab"[number % 2], "event", {})
        sign_head(tmp_path / "ba"[number % 2])
    assert [head["size"] for head in read_heads(open_log(tmp_path))] == [1, 2, 3, 4, 5, 6] and len(read_log(tmp_path / "a")) == 6


def test_a_log_of_many_writers_is_signed_by_a_key_outside_their_workspaces(
    box: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(tmp_path, "event", {})
    with pytest.raises(ConfigError, match="--to: expected the new key"):
        rotate_key(tmp_path, to=None, reason="tired", by="me")
    monkeypatch.delenv(SIGNING_KEY)
    with pytest.raises(ConfigError, match="CBD_SIGNING_KEY is not set"):
        append(tmp_path / "new", "event", {})
    assert len(read_log(tmp_path)) == 1, "readers need no key"


def test_a_pod_with_another_key_and_a_fresh_workspace_writes_nothing(
    box: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(tmp_path, "event", {})
    write_private_key(tmp_path / "other.pem", generate_key())
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "other.pem"))
    with pytest.raises(DataError, match="does not sign after the last line"):
        append(tmp_path / "new", "event", {})
    assert len(read_log(tmp_path)) == 1


def test_the_key_is_rotated_for_all_writers(box: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path / "a", "event", {})
    append(tmp_path / "b", "event", {})
    new = generate_key()
    write_private_key(tmp_path / "new.pem", new)
    rotate(tmp_path / "a", new, {"reason": "old", "by": "me"}, own=False)
    with pytest.raises(DataError, match="does not belong to signing.pub"):
        append(tmp_path / "b", "event", {})
    monkeypatch.setenv(SIGNING_KEY, str(tmp_path / "new.pem"))
    append(tmp_path / "b", "event", {})
    append(tmp_path / "a", "event", {})
    assert len(read_log(tmp_path / "a")) == len(read_log(tmp_path / "b")) == 5


def test_an_address_of_no_known_kind_and_a_second_log_are_refused(
    box: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FileLog(tmp_path / LOG).path.write_text("{}\n")
    with pytest.raises(ConfigError, match="a log stays where it began"):
        append(tmp_path, "event", {})
    monkeypatch.setenv(ENVIRONMENT, "ftp://x")
    with pytest.raises(ConfigError, match=r"CBD_LOG=ftp://x: expected s3://bucket/prefix"):
        append(tmp_path / "new", "event", {})


def test_verify_show_prove_and_export_read_the_log_from_the_bucket(box: tuple[Any, str], tmp_path: Path, make_evaluation: Make) -> None:
    workspace = tmp_path / "workspace"
    close(make_run(workspace, make_evaluation, "run-1"))
    assert "log: 2 lines, each signed by the key of its time (1 key) and in its place" in list(verify_all(workspace))
    assert any("decision: PASS" in sentence for sentence in verify_run(workspace / "runs" / "run-1", workspace))
    assert [row["event"] for row in timeline("run-1", workspace)["events"]] == ["decision", "closed"]
    proof = tmp_path / "proof.json"
    proof.write_bytes(make_proof(workspace, "run-1")[1])
    assert any("line 2" in sentence for sentence in check_proof(proof, [load_public_key(workspace)]))
    case = run_case(workspace, make_evaluation, run_id="run-2", weight=2.0)
    told = export_run(workspace / "runs" / case.run_id, workspace, tmp_path / "export")
    assert told["log_size"] == 3 and verify_export(tmp_path / "export", [load_public_key(workspace)]) == told
    assert not (workspace / LOG).exists()


def _append_many(workspace: str, writer: int, number: int, barrier: Any) -> None:
    barrier.wait()
    for index in range(number):
        append(Path(workspace), "event", {"writer": writer, "index": index})


@pytest.mark.slow
def test_a_real_server_keeps_100_events_of_two_processes_each_without_loss_or_double(real: tuple[Any, str], tmp_path: Path) -> None:
    with SPAWN.Manager() as manager, SPAWN.Pool(2) as pool:
        barrier = manager.Barrier(2)
        pool.starmap(_append_many, [(str(tmp_path / str(writer)), writer, 100, barrier) for writer in range(2)], chunksize=1)
    entries = verify_log_of(tmp_path / "0")
    found = sorted((entry["data"]["writer"], entry["data"]["index"]) for entry in entries)
    assert found == [(writer, index) for writer in range(2) for index in range(100)]
    for writer in range(2):
        assert [entry["data"]["index"] for entry in entries if entry["data"]["writer"] == writer] == list(range(100)), "each in its order"


@pytest.mark.slow
def test_a_real_server_has_whole_lines_of_writers_that_are_killed(real: tuple[Any, str], tmp_path: Path) -> None:
    """One after the other is killed while a steady one goes on; what each had got an answer for is there, once."""
    ensure_key(tmp_path / "steady")
    with SPAWN.Manager() as manager:
        barrier = manager.Barrier(1)
        steady = SPAWN.Process(target=_append_many, args=(str(tmp_path / "steady"), 0, 30, barrier))
        steady.start()
        for kill in range(1, 4):
            told = manager.Queue()
            victim = SPAWN.Process(target=_append_and_tell, args=(str(tmp_path / f"victim-{kill}"), kill, told))
            victim.start()
            heard = [told.get(timeout=60) for _ in range(2 * kill)]
            victim.kill()
            victim.join()
            entries = [entry["data"] for entry in verify_log_of(tmp_path / "steady") if entry["data"]["writer"] == kill]
            assert [data["index"] for data in entries] == list(range(len(entries))) and len(entries) >= len(heard)
        steady.join()
    mine = [entry["data"]["index"] for entry in verify_log_of(tmp_path / "steady") if entry["data"]["writer"] == 0]
    assert mine == list(range(30))


def _append_and_tell(workspace: str, writer: int, told: Any) -> None:
    for index in range(10_000):
        append(Path(workspace), "event", {"writer": writer, "index": index})
        told.put(index)


def verify_log_of(workspace: Path) -> list[dict[str, Any]]:
    """All entries, read anew from the bucket."""
    (workspace.parent / "copy.jsonl").write_bytes(b"".join(BucketLog(os.environ[ENVIRONMENT]).lines()))
    return verify_log(workspace.parent / "copy.jsonl", key=load_public_key(workspace))


def test_a_real_server_refuses_to_put_over_what_is_there(real: tuple[Any, str]) -> None:
    store = open_store(f"s3://{real[1]}/x", told="x")
    assert store.put_once("a", b"1") and store.put_once("a", b"1") and not store.put_once("a", b"2")
    assert real[0].get_object(Bucket=real[1], Key="x/a")["Body"].read() == b"1"


class _Careless:
    """A client of a server that takes no notice of conditions, as Ceph's gateway in a versioned bucket (seen with 16.2)."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def put_object(self, *, IfNoneMatch: str, **asked: Any) -> Any:
        return self._client.put_object(**asked)


def test_a_server_that_ignores_conditions_gets_no_line(box: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)
    assert isinstance(log, BucketLog)
    monkeypatch.setattr(log._root, "client", _Careless(log._root.client))
    with pytest.raises(EnvironmentFault, match="ignores `If-None-Match"):
        append(tmp_path, "event", {})
    assert not log.exists()


def test_a_real_server_writes_a_log_in_a_versioned_bucket_only_if_it_knows_conditions_there(real: tuple[Any, str], tmp_path: Path) -> None:
    client, bucket = real
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    try:
        append(tmp_path, "event", {})
    except EnvironmentFault as error:
        assert "ignores `If-None-Match" in str(error) and not open_log(tmp_path).exists()
    else:
        assert not open_store(f"s3://{bucket}/audit/lines", told="x").put_once(line_name(1), b"other")
