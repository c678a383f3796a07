"""Deliveries from S3: a stand-in in this process, and a real server where CBD_TEST_S3_ENDPOINT names one."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import IncompleteReadError
from botocore.response import StreamingBody
from delivery_files import LIMITS, OPTIONS, places, png, write_classes, write_parquet

from cbd.config import Ingest
from cbd.errors import CbdError, DataError, EnvironmentFault
from components.delivery import read_delivery
from components.ingest import ingest
from components.object_store import open_store

pytestmark = pytest.mark.slow

REAL = os.environ.get("CBD_TEST_S3_ENDPOINT")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of the stand-in, with an empty bucket `box`."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testtest123")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="box")
        yield client


def upload(client: Any, bucket: str, folder: Path, prefix: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


def files(uri: str) -> dict[str, tuple[str | None, bytes | None, str | None]]:
    with read_delivery(uri, name="delivery", limits=Ingest(max_file_bytes=10_000)) as delivery:
        return {f.original_path: (f.label_name, f.data, f.refusal.reason if f.refusal else None) for f in delivery.files}


def test_class_folders_below_a_prefix(client: Any, tmp_path: Path) -> None:
    upload(client, "box", write_classes(tmp_path, {"a": 1, "b": 1}), "x/y")
    client.put_object(Bucket="box", Key="x/y/c/", Body=b"")
    client.put_object(Bucket="box", Key="x/y/lost.png", Body=png(7))
    client.put_object(Bucket="box", Key="x/y/a/huge.png", Body=bytes(10_001))
    client.put_object(Bucket="box", Key="x/yonder/a/other.png", Body=png(8))
    assert files("s3://box/x/y/") == {
        "a/000.png": ("a", png(0), None),
        "a/huge.png": ("a", None, "too-large"),
        "b/000.png": ("b", png(1000), None),
        "lost.png": (None, png(7), "no-class"),
    }


def test_parquet_as_one_object_or_as_shards(client: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "one.parquet", [(png(0), 0)], names=["a", "b"])
    upload(client, "box", tmp_path, "p")
    expected = {"000.png": ("a", png(0), None)}
    assert files("s3://box/p/one.parquet") == files("s3://box/p") == expected


def test_more_objects_than_one_page_are_all_told(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "5")
    for index in range(12):
        client.put_object(Bucket="box", Key=f"n/a/{index}", Body=b"x")
    assert len(files("s3://box/n")) == 12


@pytest.mark.parametrize(
    ("uri", "kind", "found"),
    [
        ("s3://absent/x", DataError, "no bucket 'absent'"),
        ("s3://box/none", DataError, "no objects there"),
        ("s3://not_a bucket!/x", DataError, "no valid bucket name"),
    ],
)
def test_a_wrong_address_is_one_line(client: Any, uri: str, kind: type[CbdError], found: str) -> None:
    with pytest.raises(kind, match=found) as caught:
        files(uri)
    assert "\n" not in str(caught.value) and uri in str(caught.value)


@pytest.mark.slow
def test_no_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(EnvironmentFault, match="no credentials; set AWS_ACCESS_KEY_ID"):
        files("s3://box/x")


@pytest.mark.slow
def test_a_server_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for address in ("http://127.0.0.1:9", "no address"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        with pytest.raises(EnvironmentFault, match="out of reach.*check AWS_ENDPOINT_URL"):
            files("s3://box/x")


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """A client of a real server and a bucket of its own there."""
    if not REAL:
        pytest.skip("CBD_TEST_S3_ENDPOINT names no S3 server")
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", REAL)
    client = boto3.session.Session().client("s3")
    bucket = f"cbd-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    yield client, bucket
    kept = client.list_object_versions(Bucket=bucket)
    for item in [*kept.get("Versions", ()), *kept.get("DeleteMarkers", ())]:
        client.delete_object(Bucket=bucket, Key=item["Key"], VersionId=item["VersionId"])
    client.delete_bucket(Bucket=bucket)


def test_a_real_server_gives_the_same_data_set_as_a_folder(real: tuple[Any, str], tmp_path: Path) -> None:
    client, bucket = real
    delivery = write_classes(tmp_path / "d", {"a": 4, "b c%+ü": 4})
    trusted = write_classes(tmp_path / "t", {"a": 3, "b c%+ü": 3}, seed=50_000)
    upload(client, bucket, delivery, "in/deep")
    local = ingest(str(delivery), str(trusted), outputs=places(tmp_path / "local"), params=LIMITS, options=OPTIONS)
    remote = ingest(f"s3://{bucket}/in/deep", str(trusted), outputs=places(tmp_path / "remote"), params=LIMITS, options=OPTIONS)
    assert remote["digest"] == local["digest"] and remote["accepted"] == 8


def test_a_real_server_refuses_a_wrong_secret_in_one_line(real: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(EnvironmentFault, match="refuses these credentials"):
        files(f"s3://{real[1]}/x")


def test_a_real_server_names_a_missing_bucket(real: tuple[Any, str]) -> None:
    with pytest.raises(DataError, match="there is no bucket"):
        files("s3://cbd-absent-bucket/x")


def test_more_objects_than_are_read_at_once_come_in_order(client: Any) -> None:
    for index in range(40):
        client.put_object(Bucket="box", Key=f"o/a/{index:02d}", Body=b"%d" % index)
    assert list(files("s3://box/o").items()) == [(f"a/{index:02d}", ("a", b"%d" % index, None)) for index in range(40)]


def test_a_manifest_and_archives_are_read_from_a_bucket(client: Any, tmp_path: Path) -> None:
    client.put_object(Bucket="box", Key="m/manifest.csv", Body=b"path,label\ni/0.png,cat\n")
    client.put_object(Bucket="box", Key="m/i/0.png", Body=png(0))
    assert files("s3://box/m") == {"i/0.png": ("cat", png(0), None)}
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(write_classes(tmp_path / "d", {"a": 1, "b": 1}), arcname="d")
    client.put_object(Bucket="box", Key="t/x.tar.gz", Body=(tmp_path / "x.tar.gz").read_bytes())
    assert files("s3://box/t/x.tar.gz") == {"x.tar.gz/a/000.png": ("a", png(0), None), "x.tar.gz/b/000.png": ("b", png(1000), None)}


def check_changed(client: Any, bucket: str, tmp_path: Path) -> None:
    """An object and a shard that change, or vanish, after they were listed."""
    client.put_object(Bucket=bucket, Key="c/a/0.png", Body=png(0))
    with read_delivery(f"s3://{bucket}/c", name="delivery", limits=Ingest()) as delivery:
        client.put_object(Bucket=bucket, Key="c/a/0.png", Body=png(1))
        with pytest.raises(DataError, match="'a/0.png' changed while it was read; deliver it again"):
            list(delivery.files)
    with read_delivery(f"s3://{bucket}/c", name="delivery", limits=Ingest()) as delivery:
        client.delete_object(Bucket=bucket, Key="c/a/0.png")
        with pytest.raises(DataError, match="'a/0.png' vanished while it was read"):
            list(delivery.files)
    store = open_store(f"s3://{bucket}/p", told="delivery")
    client.put_object(Bucket=bucket, Key="p/0.parquet", Body=bytes(2**24))
    store.list()
    assert store.download("0.parquet", tmp_path).read_bytes() == bytes(2**24)
    client.put_object(Bucket=bucket, Key="p/0.parquet", Body=b"1" + bytes(2**24 - 1))
    with pytest.raises(DataError, match=r"'0.parquet' changed while it was read"):
        store.download("0.parquet", tmp_path)


@pytest.mark.slow
def test_what_changed_since_it_was_listed_is_refused_by_name(client: Any, tmp_path: Path) -> None:
    check_changed(client, "box", tmp_path)


def test_a_real_server_refuses_what_changed_since_it_was_listed(real: tuple[Any, str], tmp_path: Path) -> None:
    check_changed(*real, tmp_path)


class Broken:
    """A client whose bodies are wrong so many times."""

    def __init__(self, client: Any, times: int, body: Callable[[Any], Any]) -> None:
        self.client, self.times, self.body = client, times, body

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def get_object(self, **asked: Any) -> Any:
        response = self.client.get_object(**asked)
        self.times -= 1
        return response | {"Body": self.body(response["Body"])} if self.times >= 0 else response


class Severed:
    def __init__(self, body: Any) -> None:
        pass

    def read(self) -> bytes:
        raise IncompleteReadError(actual_bytes=3, expected_bytes=100)


@pytest.mark.slow
@pytest.mark.parametrize(("times", "read"), [(1, True), (2, True), (3, False)])
def test_a_body_that_breaks_off_is_read_again_and_then_given_up(client: Any, times: int, read: bool) -> None:
    client.put_object(Bucket="box", Key="x/a/0.png", Body=png(0))
    store = open_store("s3://box/x", told="delivery")
    store.list()
    store.client = Broken(store.client, times, Severed)
    if read:
        assert store.read("a/0.png") == png(0)
    else:
        with pytest.raises(EnvironmentFault, match="out of reach"):
            store.read("a/0.png")


@pytest.mark.slow
@pytest.mark.parametrize("body", [b"", png(0)[:-1], png(1), png(0) + b"0"])
def test_other_bytes_than_were_listed_are_never_taken(client: Any, body: bytes) -> None:
    client.put_object(Bucket="box", Key="x/a/0.png", Body=png(0))
    store = open_store("s3://box/x", told="delivery")
    store.list()
    store.client = Broken(store.client, 1, lambda _: io.BytesIO(body))
    with pytest.raises(EnvironmentFault, match="'a/0.png': the object store delivers other bytes than it lists"):
        store.read("a/0.png")


@pytest.mark.parametrize("change", [lambda data: data[:-1] + b"?", lambda data: data[:-1], lambda data: data + b"0"])
def test_a_shard_of_other_bytes_than_were_listed_is_never_taken(client: Any, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    body = bytes(range(256)) * 64
    client.put_object(Bucket="box", Key="x/train.parquet", Body=body)
    store = open_store("s3://box/x", told="delivery")
    store.list()
    assert store.download("train.parquet", tmp_path).read_bytes() == body
    store.client = Broken(store.client, 1, lambda _: StreamingBody(io.BytesIO(change(body)), None))
    with pytest.raises(EnvironmentFault, match="'train.parquet': the object store delivers other bytes than it lists"):
        store.download("train.parquet", tmp_path)


class Overloaded(http.server.BaseHTTPRequestHandler):
    """A server of one object that answers 503 so many times to each kind of request first."""

    times, seen = 0, Counter[str]()

    def do_GET(self) -> None:
        kind = "list" if "list-type=2" in self.path else "read"
        self.seen[kind] += 1
        if self.seen[kind] <= self.times:
            return self.answer(503, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
        etag = hashlib.md5(png(0)).hexdigest()
        item = f"<Contents><Key>in/a/0.png</Key><Size>{len(png(0))}</Size><ETag>&quot;{etag}&quot;</ETag></Contents>"
        listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{item}</ListBucketResult>"
        self.answer(200, listing.encode() if kind == "list" else png(0))

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("times", "read"), [(2, True), (9, False)])
def test_a_server_that_says_503_is_asked_again_and_then_told_in_one_line(monkeypatch: pytest.MonkeyPatch, times: int, read: bool) -> None:
    handler = type("Handler", (Overloaded,), {"times": times, "seen": Counter()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testtest123")
        try:
            if read:
                assert files("s3://box/in") == {"a/0.png": ("a", png(0), None)}
                assert handler.seen == {"list": 3, "read": 3}
            else:
                with pytest.raises(EnvironmentFault, match=r"answers SlowDown \(HTTP 503\); try again later"):
                    files("s3://box/in")
        finally:
            server.shutdown()


def test_of_a_versioned_bucket_the_latest_versions_count_and_deleted_objects_do_not(real: tuple[Any, str]) -> None:
    client, bucket = real
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    for key, seed in (("in/a/0.png", 1), ("in/a/0.png", 2), ("in/b/1.png", 3)):
        client.put_object(Bucket=bucket, Key=key, Body=png(seed))
    client.delete_object(Bucket=bucket, Key="in/b/1.png")
    assert files(f"s3://{bucket}/in") == {"a/0.png": ("a", png(2), None)}
