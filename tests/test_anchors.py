"""Heads outside the log's folder: in git notes, at their origin, in MLflow's tags, in a bucket; and the inventory of a run."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbd.audit import LOG, append
from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError, EnvironmentFault
from cbd.heads import HEADS, read_heads
from cbd.log_store import open_log
from components import anchors
from components.anchors import BUCKET, TAG, close_log, read_anchors, told
from components.git import ORIGIN, git
from components.inventory import INVENTORY, check_inventory, take_inventory
from components.registry import versions
from components.verification import verify_all

pytestmark = pytest.mark.slow


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A log of two entries and a data registry with one commit."""
    registry = tmp_path / "workspace" / "registry"
    registry.mkdir(parents=True)
    git(registry, "init", "--quiet", "--initial-branch=main")
    git(registry, "commit", "--quiet", "--allow-empty", "--message", "Start")
    for number in range(2):
        append(tmp_path / "workspace", "event", {"number": number})
    return tmp_path / "workspace"


@pytest.fixture
def origin(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that the registry shares with others."""
    (tmp_path / "origin").mkdir()
    git(tmp_path / "origin", "init", "--quiet", "--bare", "--initial-branch=main")
    monkeypatch.setenv(ORIGIN, str(tmp_path / "origin"))
    git(workspace / "registry", "remote", "add", "origin", str(tmp_path / "origin"))
    git(workspace / "registry", "push", "--quiet", "origin", "main")
    return tmp_path / "origin"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two records and an artifact of two files."""
    run_dir = tmp_path / "workspace" / "runs" / "run-1"
    for name in (
        "kfp/scan/scan.json",
        "kfp/scan/deep/triggers.png",
        "records/scan.json",
        "records/report.json",
        "pipeline.log",
        "arguments.json",
    ):
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(name)
    return run_dir


def anchored(workspace: Path) -> dict[str, list[int]]:
    """Sizes of the heads in each place."""
    return {place.split(" of ")[0]: sorted(head["size"] for head in heads) for place, heads in read_anchors(workspace)}


def records(run_dir: Path) -> dict[str, dict[str, object]]:
    return {"scan": {"outputs": {"paths": {"scanned": str(run_dir / "kfp" / "scan")}}}, "report": {}, "odd": {"outputs": "nonsense"}}


def test_a_closed_log_has_its_head_in_the_registrys_history_too(workspace: Path) -> None:
    head = close_log(workspace)
    append(workspace, "event", {})
    close_log(workspace)
    assert anchored(workspace) == {str(workspace / HEADS): [2, 3], "git notes": [2, 3]}
    (workspace / HEADS).unlink()
    assert head in dict(read_anchors(workspace))[f"git notes of {workspace / 'registry'}"]


def test_the_audit_writes_nothing_where_it_reads(workspace: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it reads what is mounted read-only."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(mlflow_template, workspace / "mlflow.db")
    (workspace / "registry" / "set.json").write_text("{}")
    git(workspace / "registry", "add", "set.json")
    git(workspace / "registry", "commit", "--quiet", "--message", "One")
    close_log(workspace)
    (workspace / "registry.lock").unlink()

    def written() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (workspace, *workspace.rglob("*"))}

    before = written()
    (workspace / "registry" / "set.json").touch()
    before[str(workspace / "registry" / "set.json")] = (workspace / "registry" / "set.json").stat().st_mtime_ns
    assert list(verify_all(workspace)) and written() == before


def test_locks_of_a_git_that_was_killed_stop_nobody(workspace: Path) -> None:
    close_log(workspace)
    place = workspace / "registry" / ".git"
    ref = git(workspace / "registry", "for-each-ref", "--format=%(refname)", "refs/notes/cbd-heads")
    for name in ("index.lock", "HEAD.lock", f"{ref}.lock"):
        (place / name).touch()
    append(workspace, "event", {})
    close_log(workspace)
    assert anchored(workspace)["git notes"] == [2, 3] and not list(place.rglob("*.lock"))


def test_without_a_registry_the_head_is_beside_the_log_alone(tmp_path: Path) -> None:
    append(tmp_path, "event", {})
    close_log(tmp_path)
    assert anchored(tmp_path) == {str(tmp_path / HEADS): [1]}


def test_a_head_that_was_taken_out_of_the_notes_is_still_in_their_history(workspace: Path) -> None:
    close_log(workspace)
    append(workspace, "event", {})
    head, registry = close_log(workspace), workspace / "registry"
    ref = git(registry, "for-each-ref", "--format=%(refname)", "refs/notes/cbd-heads")
    git(registry, "notes", f"--ref={ref}", "add", "--force", "--message=" + told(head), "HEAD")
    assert anchored(workspace)["git notes"] == [2, 3]


def test_a_note_that_is_no_head_is_named(workspace: Path) -> None:
    close_log(workspace)
    registry = workspace / "registry"
    ref = git(registry, "for-each-ref", "--format=%(refname)", "refs/notes/cbd-heads")
    git(registry, "notes", f"--ref={ref}", "append", "--message=nonsense", "HEAD")
    with pytest.raises(DataError, match="git notes of .*: is no head"):
        list(read_anchors(workspace))


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Says that it ran, in the file `ran` beside it."""
    (tmp_path / "program").write_text(f'#!/bin/sh\necho ran >> {tmp_path / "ran"}\ncat "$1"\n')
    (tmp_path / "program").chmod(0o755)
    return tmp_path / "program"


def setting(repository: Path, name: str, value: Path | str) -> None:
    """As somebody does who may write there."""
    subprocess.run(["git", "config", "--file", str(repository / "config"), name, str(value)], check=True)


@pytest.mark.parametrize("name", ["core.fsmonitor", "diff.x.textconv", "filter.x.clean", "remote.origin.uploadpack", "include.path"])
def test_a_program_that_the_registrys_own_settings_name_is_not_run(workspace: Path, program: Path, name: str) -> None:
    close_log(workspace)
    place = workspace / "registry" / ".git"
    (place / "info").mkdir(exist_ok=True)
    (place / "info" / "attributes").write_text("* diff=x filter=x\n")
    setting(place, name, program)
    for use in (lambda: close_log(workspace), lambda: list(verify_all(workspace)), lambda: versions(workspace)):
        with pytest.raises(DataError, match=f"config: sets {name}, which cbd does not"):
            use()
    assert not (program.parent / "ran").exists()


def test_settings_of_a_repository_that_this_one_leads_to_are_not_read(workspace: Path, program: Path) -> None:
    close_log(workspace)
    place = workspace / "registry" / ".git"
    (place / "commondir").write_text(f"{workspace / 'elsewhere'}\n")
    shutil.copytree(place, workspace / "elsewhere")
    setting(workspace / "elsewhere", "core.fsmonitor", program)
    assert list(verify_all(workspace))
    (place / "commondir").unlink()
    for around in (workspace / "registry", workspace / ".git"):
        shutil.copytree(workspace / "elsewhere", around, dirs_exist_ok=True)
    (place / "HEAD").unlink()
    with pytest.raises(EnvironmentFault, match="git for-each-ref failed: fatal: not a git repository"):
        list(verify_all(workspace))
    shutil.rmtree(place)
    place.write_text(f"gitdir: {workspace / 'elsewhere'}\n")
    with pytest.raises(DataError, match="found a file that leads elsewhere"):
        git(workspace / "registry", "status")
    assert not (program.parent / "ran").exists()


@pytest.mark.parametrize("place", [".git/info/attributes", ".gitattributes"])
def test_attributes_hide_no_head_in_the_notes(workspace: Path, place: str) -> None:
    close_log(workspace)
    (workspace / "registry" / place).parent.mkdir(exist_ok=True)
    (workspace / "registry" / place).write_text("* binary\n")
    assert anchored(workspace)["git notes"] == [2]


def test_the_origin_gets_every_head_and_one_of_another_history_is_refused(workspace: Path, origin: Path, tmp_path: Path) -> None:
    close_log(workspace)
    before = tmp_path / "before"
    shutil.copytree(workspace, before)
    append(workspace, "event", {"number": 2})
    close_log(workspace)
    ref = git(origin, "for-each-ref", "--format=%(refname)", "refs/notes/cbd-heads")
    assert git(origin, "rev-list", "--count", ref) == "2"
    assert anchored(before)["git notes"] == [2, 3], "an older copy of the workspace is told of the later head by the origin"
    git(before / "registry", "update-ref", ref, f"{ref}~1")
    git(before / "registry", "notes", f"--ref={ref}", "append", "--message=" + told(read_heads(open_log(before))[0]), "HEAD")
    append(before, "event", {"number": 3})
    with pytest.raises(DataError, match="the origin of .*registry: the head of .* over 3 lines is of another history than the log"):
        close_log(before)


@pytest.fixture
def other(workspace: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another workspace that writes the same log and has the same origin."""
    close_log(workspace)
    other = workspace.with_name("other")
    shutil.copytree(workspace, other)
    for name in (LOG, HEADS):
        (other / name).unlink()
        (other / name).symlink_to(workspace / name)
    return other


def test_of_two_workspaces_that_close_one_log_at_once_both_have_their_heads_at_the_origin(
    workspace: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one pushes between this one's fetch and push."""
    add, told_of = anchors._add, []

    def overtaken(registry: Path, ref: str, text: str) -> None:
        add(registry, ref, text)
        if not told_of:
            told_of.append("other")
            append(other, "event", {"of": "other"})
            close_log(other)

    monkeypatch.setattr(anchors, "_add", overtaken)
    append(workspace, "event", {"of": "this"})
    close_log(workspace)
    for place in (workspace, other):
        assert anchored(place)["git notes"] == [2, 3, 4]


def test_a_head_that_was_not_published_before_a_kill_is_published_on_top_of_the_others(
    workspace: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(anchors, "_publish", lambda *_: None)
        append(workspace, "event", {})
        close_log(workspace)
    append(other, "event", {})
    close_log(other)
    append(workspace, "event", {})
    close_log(workspace)
    assert anchored(other)["git notes"] == [2, 3, 4, 5]


def test_an_origin_out_of_reach_is_told(workspace: Path, origin: Path) -> None:
    shutil.rmtree(origin)
    with pytest.raises(EnvironmentFault, match="fetch failed"):
        close_log(workspace)


def test_tags_are_read_without_mlflow(workspace: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.tracking_runs import log_run

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(mlflow_template, workspace / "mlflow.db")
    head = close_log(workspace)
    log_run(workspace, "run-1", tags={TAG: told(head)})
    assert dict(read_anchors(workspace))[f"tags of the runs in {workspace / 'mlflow.db'}"] == [head]
    with sqlite3.connect(workspace / "mlflow.db") as store:
        store.execute("UPDATE tags SET value = 'nonsense' WHERE key = ?", (TAG,))
    with pytest.raises(DataError, match=r"tags of the runs in .*mlflow.db: is no head"):
        list(read_anchors(workspace))
    (workspace / "mlflow.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(DataError, match="cannot be read as MLflow's store"):
        list(read_anchors(workspace))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a bucket with object lock: what is put there stays for a day."""
    import boto3
    from moto import mock_aws

    for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv(BUCKET, "s3://box/heads/")
    with mock_aws():
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="box", ObjectLockEnabledForBucket=True)
        rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
        client.put_object_lock_configuration(Bucket="box", ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule})
        yield client


def test_heads_in_a_bucket_with_object_lock_are_read_although_somebody_deleted_or_replaced_them(tmp_path: Path, bucket: Any) -> None:
    for number in range(2):
        append(tmp_path, "event", {"number": number})
        close_log(tmp_path)
    place = f"{BUCKET} s3://box/heads/"
    assert dict(read_anchors(tmp_path))[place] == read_heads(open_log(tmp_path))
    for item in bucket.list_objects_v2(Bucket="box")["Contents"]:
        bucket.delete_object(Bucket="box", Key=item["Key"])
    assert "Contents" not in bucket.list_objects_v2(Bucket="box")
    assert dict(read_anchors(tmp_path))[place] == read_heads(open_log(tmp_path)), "a delete marker hides them from a plain listing alone"
    versions = bucket.list_object_versions(Bucket="box")["Versions"]
    with pytest.raises(Exception, match="AccessDenied"):
        bucket.delete_object(Bucket="box", Key=versions[0]["Key"], VersionId=versions[0]["VersionId"])
    bucket.put_object(Bucket="box", Key=versions[0]["Key"], Body=b"nonsense")
    with pytest.raises(DataError, match=f"{BUCKET} s3://box/heads/: .*json: is no head"):
        list(read_anchors(tmp_path))


def test_a_bucket_that_is_not_there_or_no_address_is_told(tmp_path: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "event", {})
    monkeypatch.setenv(BUCKET, "s3://absent/x")
    with pytest.raises(DataError, match="there is no bucket 'absent'"):
        close_log(tmp_path)
    monkeypatch.setenv(BUCKET, "/tmp/x")
    with pytest.raises(ConfigError, match="expected s3://bucket/prefix"):
        close_log(tmp_path)


def test_a_log_whose_first_line_is_no_entry_is_named(workspace: Path) -> None:
    close_log(workspace)
    (workspace / LOG).write_text("nonsense\n")
    with pytest.raises(DataError, match="line 1 is no log entry"):
        list(read_anchors(workspace))


def test_an_inventory_holds_the_records_and_what_they_name(run_dir: Path) -> None:
    inventory, digest = take_inventory(run_dir, records(run_dir))
    assert set(inventory.files) == {"kfp/scan/scan.json", "kfp/scan/deep/triggers.png", "records/scan.json", "arguments.json"}
    assert inventory.artifacts == {"scan/scanned": "kfp/scan"} and check_inventory(run_dir, digest) == inventory
    moved = run_dir.parent / "moved"
    run_dir.rename(moved)
    assert check_inventory(moved, digest) == inventory, "it does not depend on where the workspace lies"


def test_every_altered_missing_or_linked_file_of_a_run_is_named(run_dir: Path) -> None:
    inventory, digest = take_inventory(run_dir, records(run_dir))
    for name in inventory.files:
        file = run_dir / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + b"!")
        with pytest.raises(DataError, match=f"{name}: altered"):
            check_inventory(run_dir, digest)
        file.unlink()
        with pytest.raises(DataError, match=f"{name}: missing"):
            check_inventory(run_dir, digest)
        (run_dir / "same").write_bytes(before)
        file.symlink_to(run_dir / "same")
        with pytest.raises(DataError, match=f"{name}: is a link"):
            check_inventory(run_dir, digest)
        file.unlink()
        file.write_bytes(before)
    check_inventory(run_dir, digest)


def test_an_altered_inventory_and_one_that_leads_out_are_refused(run_dir: Path) -> None:
    _, digest = take_inventory(run_dir, records(run_dir))
    content = json.loads((run_dir / INVENTORY).read_bytes())
    (run_dir / INVENTORY).write_bytes(canonical_json(content | {"files": {}}))
    with pytest.raises(DataError, match=r"inventory.json: altered"):
        check_inventory(run_dir, digest)
    (run_dir.parent / "other.txt").write_text("x")
    (run_dir / INVENTORY).write_bytes(canonical_json(content | {"files": {"../other.txt": "0" * 64}}))
    with pytest.raises(DataError, match="leads out"):
        check_inventory(run_dir, hashlib.sha256((run_dir / INVENTORY).read_bytes()).hexdigest())
    (run_dir / INVENTORY).unlink()
    with pytest.raises(DataError, match=r"inventory.json: missing"):
        check_inventory(run_dir, digest)
