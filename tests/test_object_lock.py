"""Heads of the log under object lock on a real S3 server: nobody takes them away, and a log that was rewritten since is refused by them."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from cbd.audit import append
from cbd.errors import DataError
from cbd.heads import HEADS, read_heads
from cbd.log_store import LOG, open_log
from components.anchors import BUCKET, close_log, read_anchors
from components.verification import verify_all

REAL = os.environ.get("CBD_TEST_S3_ENDPOINT")


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, str]]:
    """A client and a bucket whose objects stay for a day; governance mode, so that this fixture may remove them."""
    if not REAL:
        pytest.skip("CBD_TEST_S3_ENDPOINT names no S3 server")
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", REAL)
    client, bucket = boto3.session.Session().client("s3"), f"cbd-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
    client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule})
    monkeypatch.setenv(BUCKET, f"s3://{bucket}/heads")
    yield client, bucket
    kept = client.list_object_versions(Bucket=bucket)
    for item in [*kept.get("Versions", ()), *kept.get("DeleteMarkers", ())]:
        client.delete_object(Bucket=bucket, Key=item["Key"], VersionId=item["VersionId"], BypassGovernanceRetention=True)
    client.delete_bucket(Bucket=bucket)


@pytest.fixture
def workspace(locked: tuple[Any, str], tmp_path: Path) -> Path:
    """A log of four lines with heads over the second and the fourth."""
    for number in range(4):
        append(tmp_path / "workspace", "event", {"number": number})
        if number % 2:
            close_log(tmp_path / "workspace")
    return tmp_path / "workspace"


def versions(locked: tuple[Any, str]) -> list[dict[str, Any]]:
    client, bucket = locked
    return list(client.list_object_versions(Bucket=bucket)["Versions"])


def test_a_locked_head_is_neither_deleted_nor_put_over(locked: tuple[Any, str], workspace: Path) -> None:
    client, bucket = locked
    first = versions(locked)[0]
    about = client.head_object(Bucket=bucket, Key=first["Key"])
    assert about["ObjectLockMode"] == "GOVERNANCE" and about["ObjectLockRetainUntilDate"] > datetime.now(UTC) + timedelta(hours=23)
    with pytest.raises(ClientError, match="AccessDenied"):
        client.delete_object(Bucket=bucket, Key=first["Key"], VersionId=first["VersionId"])
    for each in versions(locked):
        client.delete_object(Bucket=bucket, Key=each["Key"])
    assert "Contents" not in client.list_objects_v2(Bucket=bucket), "hidden from a plain listing, and still there"
    place = f"{BUCKET} s3://{bucket}/heads"
    assert dict(read_anchors(workspace))[place] == read_heads(open_log(workspace))
    assert f"heads: 2 in {place} agree with the log" in list(verify_all(workspace))
    client.put_object(Bucket=bucket, Key=first["Key"], Body=b"other")
    with pytest.raises(DataError, match=f"{place}: .*json: is no head"):
        list(verify_all(workspace))


@pytest.mark.slow
def test_in_compliance_mode_not_even_who_may_bypass_deletes_a_head_before_its_time(locked: tuple[Any, str], workspace: Path) -> None:
    client, bucket = locked
    place = {"Bucket": bucket, "Key": versions(locked)[0]["Key"], "VersionId": versions(locked)[0]["VersionId"]}
    until = datetime.now(UTC) + timedelta(seconds=6)
    client.put_object_retention(**place, Retention={"Mode": "COMPLIANCE", "RetainUntilDate": until}, BypassGovernanceRetention=True)
    with pytest.raises(ClientError, match="AccessDenied"):
        client.delete_object(**place, BypassGovernanceRetention=True)
    time.sleep(max(0, (until - datetime.now(UTC)).total_seconds() + 1))


def _cut(workspace: Path) -> None:
    lines = (workspace / LOG).read_bytes().splitlines(keepends=True)
    (workspace / LOG).write_bytes(b"".join(lines[:3]))


def _fork(workspace: Path) -> None:
    _cut(workspace)
    append(workspace, "event", {"number": "another"})


def _begin_anew(workspace: Path) -> None:
    (workspace / LOG).unlink()
    for number in range(4):
        append(workspace, "event", {"number": number})


@pytest.mark.parametrize(
    ("rewrite", "told"),
    [
        (_cut, "the head of .* is over 4 lines, the log has 3: it was cut off"),
        (_fork, "the head of .* over 4 lines is of another history than the log"),
        (_begin_anew, "the head of .* over 2 lines is of another history than the log"),
    ],
)
def test_a_log_that_was_rewritten_with_its_own_key_is_refused_by_the_locked_heads(
    locked: tuple[Any, str], workspace: Path, rewrite: Callable[[Path], None], told: str
) -> None:
    """The heads beside it are gone, too; what its key signed anew holds by itself."""
    rewrite(workspace)
    (workspace / HEADS).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(BUCKET)
        shutil.copytree(workspace, workspace.with_name("copy"))
        list(verify_all(workspace.with_name("copy")))
    with pytest.raises(DataError, match=f"{BUCKET} s3://{locked[1]}/heads: {told}"):
        list(verify_all(workspace))
