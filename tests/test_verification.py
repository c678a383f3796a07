"""`cbd audit verify`: whatever is changed in the evidence of a workspace is refused by name, offline and without torch or MLflow."""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from closed_run import close, make_run
from command import cbd

from cbd.audit import LOG, append, rotate
from cbd.config import canonical_json
from cbd.errors import DataError, EnvironmentFault
from cbd.heads import HEADS
from cbd.keys import ensure_key, read_public_key, sign
from components import verification
from components.git import git, held
from components.keyring import rotate_key
from components.logged import Unverified
from components.verification import verify_all, verify_run
from pipelines.evidence import place_of
from pipelines.options import WORKSPACE

Make = Callable[..., dict[str, Any]]
Change = Callable[[list[bytes]], list[bytes]]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make_evaluation: Make) -> Path:
    """A workspace with two closed runs, and what a canary left."""
    workspace = tmp_path_factory.mktemp("template") / "workspace"
    for number in (1, 2):
        close(make_run(workspace, make_evaluation, f"run-{number}", weight=float(number), per_class=number))
    return workspace


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "workspace")
    return tmp_path / "workspace"


def refused(workspace: Path, match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        list(verify_all(workspace))
    assert "\n" not in str(caught.value)


def test_an_unaltered_workspace_holds_and_so_does_each_run_wherever_it_lies(workspace: Path) -> None:
    told = list(verify_all(workspace))
    assert "log: 4 lines, each signed by the key of its time (1 key) and in its place" in told
    assert sum("decision: PASS, signed by" in sentence for sentence in told) == 2
    moved = workspace.with_name("moved")
    workspace.rename(moved)
    assert list(verify_all(moved)) == [sentence.replace(str(workspace), str(moved)) for sentence in told]
    assert any("data: is what the decision is about" in sentence for sentence in verify_run(moved / "runs" / "run-1", moved))


def test_every_changed_byte_of_every_file_is_refused_by_the_files_name(workspace: Path) -> None:
    """Each file of the evidence, at random places and at both ends."""
    draw = random.Random(0)
    files = [path for path in sorted(workspace.rglob("*")) if path.is_file() and path.name not in (".lock", "signing.pem")]
    assert {path.name for path in files} > {LOG, HEADS, "signing.pub", "decision.sig", "model.safetensors", "dataset.json", "report.html"}
    for path in files:
        before = path.read_bytes()
        for place in {0, len(before) - 1, *(draw.randrange(len(before)) for _ in range(3))}:
            path.write_bytes(before[:place] + bytes([before[place] ^ 1 << draw.randrange(8)]) + before[place + 1 :])
            try:
                list(verify_all(workspace))
            except DataError as error:
                told = str(error)
            else:
                told = "nothing"
            assert path.name in told, f"byte {place} of {path.relative_to(workspace)} was changed, and this was told: {told}"
        path.write_bytes(before)
    assert list(verify_all(workspace))


@pytest.mark.parametrize("name", ["kfp/decision/decision.json", "kfp/model/model.safetensors", "report.html", "inventory.json"])
def test_a_missing_file_is_named(workspace: Path, name: str) -> None:
    (workspace / "runs" / "run-2" / name).unlink()
    refused(workspace, f"run-2/{name}: missing")


def test_a_link_in_place_of_a_file_is_refused(workspace: Path) -> None:
    file = workspace / "runs" / "run-1" / "kfp" / "model" / "model.json"
    file.rename(workspace / "model.json")
    file.symlink_to(workspace / "model.json")
    refused(workspace, "model.json: is a link")


def lines(workspace: Path) -> list[bytes]:
    return (workspace / LOG).read_bytes().splitlines(keepends=True)


def test_a_log_that_was_cut_together_with_its_heads_is_refused_by_the_heads_elsewhere(workspace: Path, make_evaluation: Make) -> None:
    (workspace / "registry").mkdir()
    git(workspace / "registry", "init", "--quiet", "--initial-branch=main")
    git(workspace / "registry", "commit", "--quiet", "--allow-empty", "--message", "Start")
    before = (lines(workspace), (workspace / HEADS).read_bytes())
    close(make_run(workspace, make_evaluation, "run-3", weight=3.0, per_class=3))
    (workspace / LOG).write_bytes(b"".join(before[0]))
    (workspace / HEADS).write_bytes(before[1])
    shutil.rmtree(workspace / "runs" / "run-3")
    refused(workspace, "git notes of .*registry: the head of .* is over 6 lines, the log has 4: it was cut off")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: lines[:1] + lines[2:], "line 2 has number 3"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 has number 2"),
        (lambda lines: [*lines[:3], lines[3].replace(b'"consistent":true', b'"consistent":null')], "line 4 was edited"),
        (lambda lines: lines[:-1], "over 4 lines, the log has 3: it was cut off"),
        (lambda lines: [*lines, lines[3]], "line 5 has number 4"),
        (lambda lines: [line.replace(b'{"data"', b'{ "data"') for line in lines], "line 1 was edited"),
        (lambda lines: [], "the log has 0"),
    ],
)
def test_a_removed_reordered_edited_or_doubled_line_is_named(
    workspace: Path, change: Callable[[list[bytes]], list[bytes]], match: str
) -> None:
    (workspace / LOG).write_bytes(b"".join(change(lines(workspace))))
    refused(workspace, match)


def test_a_fork_that_the_workspaces_own_key_signed_is_refused(workspace: Path) -> None:
    (workspace / LOG).write_bytes(b"".join(lines(workspace)[:3]))
    for number in range(3):
        append(workspace, "event", {"other": number})
    refused(workspace, "heads.jsonl: the head of .* over 4 lines is of another history than the log")


def test_a_thief_who_signs_everything_again_with_his_own_key_is_refused_by_a_trusted_one(workspace: Path, make_evaluation: Make) -> None:
    shutil.copyfile(workspace / "keys" / "signing.pub", workspace.with_name("trusted.pub"))
    trusted = [read_public_key(workspace.with_name("trusted.pub"))]
    assert list(verify_all(workspace, trusted=trusted))
    forged = workspace.with_name("forged")
    close(make_run(forged, make_evaluation, "run-1"))
    assert list(verify_all(forged)), "in itself it is whole"
    for attack in (verify_all(forged, trusted=trusted), verify_run(forged / "runs" / "run-1", forged, trusted=trusted)):
        with pytest.raises(DataError, match="no trusted key signed a line"):
            list(attack)


def test_naming_the_victims_key_in_a_rotation_does_not_make_a_log_his(workspace: Path, make_evaluation: Make) -> None:
    """The forger hands over to a key that he does not have: it signed nothing, and so it vouches for nothing."""
    victim, forged = ensure_key(workspace), workspace.with_name("forged")
    close(make_run(forged, make_evaluation, "run-1"))
    rotate(forged, victim, {}, own=False)
    with pytest.raises(DataError, match="no trusted key signed a line"):
        list(verify_all(forged, trusted=[victim.public_key()]))


def test_after_a_rotation_both_keys_may_be_trusted(workspace: Path, make_evaluation: Make) -> None:
    old = ensure_key(workspace).public_key()
    rotate_key(workspace, to=None, reason="time", by="me")
    close(make_run(workspace, make_evaluation, "run-3", weight=3.0, per_class=3))
    for key in (old, ensure_key(workspace).public_key()):
        assert any("(2 keys)" in sentence for sentence in verify_all(workspace, trusted=[key]))


def test_a_decision_of_another_run_is_refused(workspace: Path) -> None:
    """Signed and logged, and yet not this run's; the inventory and the log were made to agree by somebody with the key."""
    run_dir = workspace / "runs" / "run-2"
    for name in ("decision.json", "decision.sig"):
        shutil.copyfile(workspace / "runs" / "run-1" / "kfp" / "decision" / name, run_dir / "kfp" / "decision" / name)
    close(run_dir)
    refused(workspace, "is the decision of run 'run-1', expected 'run-2'")


def test_another_model_under_the_same_decision_is_refused(workspace: Path) -> None:
    run_dir = workspace / "runs" / "run-2"
    shutil.rmtree(run_dir / "kfp" / "model")
    shutil.copytree(workspace / "runs" / "run-1" / "kfp" / "model", run_dir / "kfp" / "model")
    close(run_dir)
    refused(workspace, "kfp/model: the decision is about model")


def test_a_decision_that_was_replaced_by_a_later_one_is_refused(workspace: Path) -> None:
    """Replay: the older one, of a milder policy, is put back after the run was decided again."""
    run_dir = workspace / "runs" / "run-2"
    content = json.loads((run_dir / "kfp" / "decision" / "decision.json").read_text())
    entry = {"decision_digest": "0" * 64, "run_id": "run-2", "verdict": "REVIEW"}
    append(workspace, "decision", {**entry, "digests": content["digests"], "attempt": content["attempt"], "trial": False})
    refused(workspace, "an older decision, .* was decided again .000000000000")


def test_a_decision_by_a_revoked_key_is_refused(workspace: Path) -> None:
    run_dir, old = workspace / "runs" / "run-2", ensure_key(workspace)
    rotate_key(workspace, to=None, reason="stolen", by="me")
    path = run_dir / "kfp" / "decision" / "decision.json"
    forged = canonical_json(json.loads(path.read_text()) | {"sentence": "PASS: all is well."})
    path.write_bytes(forged)
    (run_dir / "kfp" / "decision" / "decision.sig").write_text(sign(forged, old) + "\n")
    close(run_dir)
    refused(workspace, "the signature is not this workspace's key")


def test_the_command_line_refuses_a_run_that_was_never_closed_and_counts_it_apart(
    workspace: Path, make_evaluation: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(workspace, make_evaluation, "run-3", weight=3.0, per_class=3)
    code, _, err = cbd(capsys, "audit", "verify", "run-3", "--workspace", str(workspace))
    assert code == 2 and "run-3: was never closed" in err
    code, out, _ = cbd(capsys, "audit", "verify", "--all", "--workspace", str(workspace), "--json")
    told = json.loads(out)
    assert (code, told["verified"], told["num_unverified"]) == (0, True, 1)
    assert told["num_checks"] == sum(not isinstance(sentence, Unverified) for sentence in verify_all(workspace)) + 1


def test_a_run_that_was_never_closed_or_has_no_folder_is_told(workspace: Path, make_evaluation: Make) -> None:
    make_run(workspace, make_evaluation, "run-3", weight=3.0, per_class=3)
    (workspace / "runs" / "run-4").mkdir()
    shutil.rmtree(workspace / "runs" / "run-1")
    told = list(verify_all(workspace))
    assert [sentence for sentence in told if isinstance(sentence, Unverified)] == [
        "run-3: NOT VERIFIED: the run was never closed, nothing sealed its files",
        "run-4: NOT VERIFIED: the run ended before the log heard of it",
        "gone: NOT VERIFIED: 1 runs that the log knows have no folder any more, such as run-1",
    ]
    with pytest.raises(DataError, match="run-3: was never closed: nothing sealed its files"):
        list(verify_run(workspace / "runs" / "run-3", workspace))
    with pytest.raises(DataError, match="says nothing of a run run-4"):
        list(verify_run(workspace / "runs" / "run-4", workspace))


def test_a_changed_object_of_the_dvc_remote_is_named(workspace: Path) -> None:
    place = workspace / "remote" / "files" / "md5" / "5d"
    place.mkdir(parents=True)
    (place / "41402abc4b2a76b9719d911017c592").write_text("hello")
    assert "remote: 1 objects of the data registry are what their names say" in list(verify_all(workspace))
    (place / "41402abc4b2a76b9719d911017c592").write_text("hullo")
    refused(workspace, "41402abc4b2a76b9719d911017c592: altered")


def test_a_crash_before_the_first_head_leaves_none(workspace: Path) -> None:
    (workspace / HEADS).write_bytes(b"")
    told = list(verify_all(workspace))
    assert told[0].startswith("log: 4 lines") and not any(sentence.startswith("heads") for sentence in told)
    (workspace / HEADS).write_bytes(b'{"key_id"')
    refused(workspace, "heads.jsonl: its last line is torn")


def test_no_log_is_told(tmp_path: Path) -> None:
    refused(tmp_path, "no log there")


def test_a_removed_log_is_told_by_its_heads(workspace: Path) -> None:
    (workspace / LOG).unlink()
    refused(workspace, r"the head of .* is over \d+ lines, the log has 0: it was cut off")


def test_the_command_names_the_first_thing_and_its_exit_code_is_not_0(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--workspace", str(workspace))
    code, out, _ = cbd(capsys, "audit", "verify", "--all", *place, "--json")
    assert code == 0 and json.loads(out)["verified"] is True
    code, out, _ = cbd(capsys, "audit", "verify", "run-1", *place)
    assert code == 0 and "verified: True" in out and "run-2" not in out
    assert cbd(capsys, "audit", "verify", "run-1", "--all", *place)[0] == 2
    assert cbd(capsys, "audit", "verify", "run-9", *place)[0] == 2
    weights = workspace / "runs" / "run-1" / "kfp" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _, err = cbd(capsys, "audit", "verify", *place)
    assert code == 2 and err.startswith("error: ") and "model.safetensors: altered" in err and err.count("\n") == 1


def test_without_a_workspace_the_latest_demo_is_meant(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("20260101-000000", "20260102-000000"):
        shutil.copytree(workspace, tmp_path / "cbd-demo" / name / "workspace")
    assert place_of(WORKSPACE) == tmp_path / "cbd-demo" / "20260102-000000" / "workspace"
    workspace.rename(tmp_path / WORKSPACE)
    assert place_of(WORKSPACE) == tmp_path / WORKSPACE and place_of(Path("elsewhere")) == tmp_path / "elsewhere"


@pytest.fixture
def registry(workspace: Path) -> Path:
    """With one file that is committed."""
    registry = workspace / "registry"
    registry.mkdir()
    git(registry, "init", "--quiet", "--initial-branch=main")
    (registry / "set.json").write_text("{}")
    git(registry, "add", "set.json")
    git(registry, "commit", "--quiet", "--message", "Start")
    assert "data registry: its files are as committed, its history is whole" in list(verify_all(workspace))
    return registry


def test_a_file_of_the_data_registry_that_is_not_as_committed_is_named(workspace: Path, registry: Path) -> None:
    (registry / "set.json").write_text("[]")
    refused(workspace, "registry: not as committed: set.json")
    git(registry, "add", "set.json")
    refused(workspace, "registry: not as committed: set.json; run there: git checkout HEAD -- .")
    git(registry, "checkout", "HEAD", "--", ".")
    assert list(verify_all(workspace))
    git(registry, "update-index", "--skip-worktree", "set.json")
    (registry / "set.json").write_text("[]")
    refused(workspace, "registry: not as committed: set.json")
    (registry / "set.json").unlink()
    refused(workspace, "registry: not as committed: set.json")


def test_an_altered_object_of_the_data_registrys_history_is_named(workspace: Path, registry: Path) -> None:
    blob = git(registry, "rev-parse", "HEAD:set.json")
    path = registry / ".git" / "objects" / blob[:2] / blob[2:]
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(EnvironmentFault, match=f"fsck failed: .*{blob[:2]}"):
        list(verify_all(workspace))


def test_a_version_that_is_being_stored_is_waited_for(workspace: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, asked = threading.Event(), threading.Event()

    def store() -> None:
        with held(registry):
            (registry / "set.json").write_text("[]")
            written.set()
            asked.wait(10)
            git(registry, "commit", "--quiet", "--all", "--message", "Next")

    def waiting(registry: Path) -> contextlib.AbstractContextManager[None]:
        asked.set()
        return held(registry)

    monkeypatch.setattr(verification, "held", waiting)
    step = threading.Thread(target=store)
    step.start()
    written.wait(10)
    assert "data registry: its files are as committed, its history is whole" in list(verify_all(workspace))
    step.join()


def test_the_timeline_tells_what_happened(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append(workspace, "override", {"run_id": "run-1", "name": "m", "alias": "x", "version": "1", "by": "\x1b[31m", "expires": "2026"})
    code, out, _ = cbd(capsys, "audit", "show", "--workspace", str(workspace))
    assert code == 0 and [line.split("  ")[2] for line in out.splitlines()[1:-1]] == ["decision", "closed"] * 2 + ["override"]
    assert "\x1b" not in out and "verdict PASS" in out
    code, out, _ = cbd(capsys, "audit", "show", "run-2", "--workspace", str(workspace), "--json")
    assert code == 0 and [row["run"] for row in json.loads(out)["events"]] == ["run-2", "run-2"]
    assert cbd(capsys, "audit", "show", "run-9", "--workspace", str(workspace))[0] == 2


def test_one_run_is_verified_in_seconds_without_torch_mlflow_or_the_network(workspace: Path) -> None:
    code = (
        "import sys, socket; socket.socket.connect = None\n"
        "from pipelines.cli import main\n"
        "try: main(['audit', 'verify', 'run-1', '--workspace', sys.argv[1]])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'mlflow', 'kfp', 'dvc', 'boto3', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(workspace)], check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    assert time.monotonic() - started < 20, "4 s on an idle machine"
