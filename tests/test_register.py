"""The registry follows the signed decision only: every forgery is refused before anything is done."""

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from decided_case import Case, make_bundle, make_case, swap

from cbd.audit import verify_log
from cbd.bundle import bundle_digest
from cbd.dataset import read_info
from cbd.errors import CbdError, ConfigError, DataError
from cbd.files import locked
from components.logged import Unverified
from components.register import LOCK, register, register_step
from components.registry import fetch
from components.rollback import rollback
from components.tracking import champion_bundle, drop_alias, fetch_model, register_bundle, registered_name
from components.tracking_store import client
from components.verification import verify_all

pytestmark = pytest.mark.slow  # MLflow's store

Make = Callable[..., dict[str, Any]]
CLASSES = ["ant", "bee", "cat", "dog"]
WORKS = {"white-centre": (1, 600)}
DOUBTFUL = {"white-centre": (1, 50)}


@pytest.fixture
def workspace(tmp_path: Path, mlflow_template: Path) -> Path:
    """A workspace with a fresh MLflow store."""
    shutil.copyfile(mlflow_template, tmp_path / "mlflow.db")
    return tmp_path


def enter(case: Case, branch: str, name: str = "model") -> dict[str, Any]:
    return register(case.bundle, case.decision, branch=branch, workspace=case.workspace, name=name, run_id=case.run_id, revision="abc")


def decided(workspace: Path, make_evaluation: Make, **changes: Any) -> Case:
    case = make_case(workspace, make_evaluation, **changes)
    case.decide()
    return case


def versions(workspace: Path) -> list[Any]:
    with client(workspace) as mlflow:
        return list(mlflow.search_model_versions())


def refused(case: Case, branch: str, match: str) -> None:
    """The refusal, with nothing registered and nothing logged."""
    before = (case.workspace / "audit.jsonl").read_bytes()
    with pytest.raises(DataError, match=match) as caught:
        enter(case, branch)
    assert "\n" not in str(caught.value)
    assert versions(case.workspace) == [] and (case.workspace / "audit.jsonl").read_bytes() == before


def stored(workspace: Path) -> Path:
    """The folder of the one registered model's artifacts."""
    return next((workspace / "mlartifacts").rglob("model.safetensors")).parent


def test_a_pass_becomes_champion_with_all_digests(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    told = enter(case, "promote")
    assert told == {
        "name": registered_name("model", CLASSES),
        "version": "1",
        "alias": "champion",
        "model_digest": bundle_digest(case.bundle),
        "branch": "promote",
    }
    with client(workspace) as mlflow:
        version = mlflow.get_model_version_by_alias(told["name"], "champion")
    tags = {key: version.tags[f"cbd.{key}"] for key in ("model_digest", "data_digest", "revision", "verdict", "run_id", "decision_digest")}
    assert tags["model_digest"] == told["model_digest"] and (tags["revision"], tags["verdict"], tags["run_id"]) == ("abc", "PASS", "run-1")
    entry = verify_log(workspace / "audit.jsonl")[-1]
    assert (
        entry["event"] == "register"
        and entry["data"]["alias"] == "champion"
        and entry["data"]["decision_digest"] == tags["decision_digest"]
    )
    fetched = fetch_model(f"models:/{told['name']}@champion", workspace)
    assert bundle_digest(fetched) == told["model_digest"]
    assert champion_bundle(workspace, "model", CLASSES) == (fetched, "1")


@pytest.mark.parametrize(
    ("changes", "branch", "alias"),
    [
        ({"turned": DOUBTFUL}, "hold", "candidate"),
        ({"turned": WORKS}, "record", None),
        ({"num_images": 200}, "record", None),
        ({"trial": True}, "promote", None),
    ],
)
def test_each_verdict_sets_its_alias_and_a_trial_none(
    workspace: Path, make_evaluation: Make, changes: Any, branch: str, alias: str | None
) -> None:
    told = enter(decided(workspace, make_evaluation, **changes), branch)
    assert told["alias"] == alias and told["version"] == "1"
    with client(workspace) as mlflow:
        assert mlflow.get_registered_model(told["name"]).aliases == ({alias: 1} if alias else {})
    assert champion_bundle(workspace, "model", CLASSES) is None


def test_the_same_decision_registers_once(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    first, log = enter(case, "promote"), (workspace / "audit.jsonl").read_bytes()
    assert enter(case, "promote") == first
    assert len(versions(workspace)) == 1 and (workspace / "audit.jsonl").read_bytes() == log


def test_a_new_champion_takes_the_alias_over(workspace: Path, make_evaluation: Make) -> None:
    enter(decided(workspace, make_evaluation), "promote")
    second = decided(workspace, make_evaluation, run_id="run-2", weight=2.0)
    assert enter(second, "promote")["version"] == "2"
    found = champion_bundle(workspace, "model", CLASSES)
    assert found is not None and found[1] == "2" and bundle_digest(found[0]) == bundle_digest(second.bundle)


def test_models_of_other_classes_or_names_are_no_champions_here(workspace: Path, make_evaluation: Make) -> None:
    enter(decided(workspace, make_evaluation), "promote")
    assert champion_bundle(workspace, "model", [*CLASSES, "eel"]) is None
    assert champion_bundle(workspace, "other", CLASSES) is None


def test_a_name_that_the_registry_cannot_hold_is_refused(workspace: Path, make_evaluation: Make) -> None:
    with pytest.raises(ConfigError, match="another --name"):
        enter(decided(workspace, make_evaluation), "promote", name="a/b:c")


@pytest.mark.parametrize(
    ("turned", "branch"), [(WORKS, "promote"), (WORKS, "hold"), (DOUBTFUL, "promote"), ({}, "hold"), ({}, "record"), ({}, "' or True or '")]
)
def test_a_flipped_branch_is_refused(workspace: Path, make_evaluation: Make, turned: Any, branch: str) -> None:
    refused(decided(workspace, make_evaluation, turned=turned), branch, "demands the branch")


def test_an_unsigned_decision_is_refused(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    (case.decision / "decision.sig").unlink()
    refused(case, "promote", "unsigned")


def test_a_decision_signed_elsewhere_is_refused(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation, turned=WORKS)
    swap(case.decision, decided(workspace / "elsewhere", make_evaluation).decision)
    refused(case, "promote", "signature")


def test_another_models_decision_is_refused(workspace: Path, make_evaluation: Make) -> None:
    bad, good = decided(workspace, make_evaluation, turned=WORKS), decided(workspace, make_evaluation, run_id="run-2", weight=2.0)
    swap(bad.decision, good.decision)
    refused(bad, "promote", "is about model")


def test_another_runs_decision_is_refused(workspace: Path, make_evaluation: Make) -> None:
    """The same model was once judged PASS; this run judged BLOCK."""
    good, bad = decided(workspace, make_evaluation), decided(workspace, make_evaluation, run_id="run-2", turned=WORKS)
    swap(bad.decision, good.decision)
    refused(bad, "promote", "of run 'run-1'")


def test_an_edited_log_is_refused(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation, turned=WORKS)
    log = workspace / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"BLOCK", b"PASS"))
    refused(case, "record", "line 1 was edited")


def test_a_confounder_is_never_registered(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    swap(case.bundle, make_bundle(workspace / "b", "e" * 64, kind="confounder"))
    refused(case, "promote", "confounder")


def test_a_trial_in_disguise_is_refused(workspace: Path, make_evaluation: Make) -> None:
    """The bundle says trial, the decision does not: without its own data the alias would be set."""
    case = decided(workspace, make_evaluation)
    data = json.loads((case.bundle / "model.json").read_text())["data_digest"]
    swap(case.bundle, make_bundle(workspace / "b", data, trial=True))
    refused(case, "promote", "is about model")


def test_an_overwritten_artifact_behind_the_alias_is_refused(workspace: Path, make_evaluation: Make) -> None:
    told = enter(decided(workspace, make_evaluation), "promote")
    other = make_case(workspace, make_evaluation, run_id="run-2", weight=666.0)
    for file in ("model.safetensors", "model.json"):
        shutil.copyfile(other.bundle / file, stored(workspace) / file)
    for attack in (
        lambda: fetch_model(f"models:/{told['name']}@champion", workspace),
        lambda: champion_bundle(workspace, "model", CLASSES),
    ):
        with pytest.raises(DataError, match="altered"):
            attack()
    (stored(workspace) / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="altered"):
        fetch_model(f"models:/{told['name']}/1", workspace)


def test_an_overwritten_decision_behind_the_alias_is_refused(workspace: Path, make_evaluation: Make) -> None:
    """Model and decision of a trial in place of the champion's: signed and logged, but no champion."""
    told = enter(decided(workspace, make_evaluation), "promote")
    place, trial = stored(workspace), decided(workspace, make_evaluation, run_id="run-2", trial=True)
    for folder in (trial.bundle, trial.decision):
        shutil.copytree(folder, place, dirs_exist_ok=True)
    with pytest.raises(DataError, match="a trial"):
        fetch_model(f"models:/{told['name']}@champion", workspace)
    blocked = decided(workspace, make_evaluation, run_id="run-3", turned=WORKS)
    for folder in (blocked.bundle, blocked.decision):
        shutil.copytree(folder, place, dirs_exist_ok=True)
    with pytest.raises(DataError, match="stands verdict BLOCK"):
        fetch_model(f"models:/{told['name']}@champion", workspace)
    (place / "decision.sig").unlink()
    with pytest.raises(DataError, match=r"decision\.sig is missing"):
        fetch_model(f"models:/{told['name']}@champion", workspace)


def test_an_overwritten_or_missing_signature_behind_the_alias_is_refused(workspace: Path, make_evaluation: Make) -> None:
    """Model and decision are right; what should cover both is another model's, a stranger's, or gone."""
    told = enter(decided(workspace, make_evaluation), "promote")
    uri, place = f"models:/{told['name']}@champion", stored(workspace)
    others = decided(workspace, make_evaluation, run_id="run-2", weight=2.0).decision
    strangers = decided(workspace / "elsewhere", make_evaluation).decision
    for signature, match in ((others, "not the signature"), (strangers, "not the signature"), (None, r"model\.sig is missing")):
        (place / "model.sig").unlink()
        if signature:
            shutil.copyfile(signature / "model.sig", place / "model.sig")
        with pytest.raises(DataError, match=match):
            fetch_model(uri, workspace)


def test_what_would_not_verify_when_it_is_fetched_is_not_registered(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    signature = (case.decision / "model.sig").read_bytes()
    (case.decision / "model.sig").write_bytes(signature.replace(b"A", b"B", 1))
    refused(case, "promote", r"model\.sig: not the signature")
    (case.decision / "model.sig").unlink()
    refused(case, "promote", r"expected model\.sig there")


def test_a_moved_alias_is_refused(workspace: Path, make_evaluation: Make) -> None:
    """MLflow keeps no history of aliases; the log does."""
    first = enter(decided(workspace, make_evaluation), "promote")
    enter(decided(workspace, make_evaluation, run_id="run-2", weight=2.0), "promote")
    with client(workspace) as mlflow:
        mlflow.set_registered_model_alias(first["name"], "champion", "1")
        mlflow.set_registered_model_alias(first["name"], "mine", "1")
    for alias in ("champion", "mine", "latest"):
        with pytest.raises(DataError, match="the alias was moved"):
            fetch_model(f"models:/{first['name']}@{alias}", workspace)
    assert fetch_model(f"models:/{first['name']}/1", workspace)


def test_a_blocked_model_can_be_fetched_by_its_version_only(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation, turned=WORKS)
    told = enter(case, "record")
    assert bundle_digest(fetch_model(f"models:/{told['name']}/1", workspace)) == bundle_digest(case.bundle)
    with pytest.raises(DataError, match="no such model"):
        fetch_model(f"models:/{told['name']}@champion", workspace)


def test_a_spoilt_copy_in_the_workspace_is_replaced(workspace: Path, make_evaluation: Make) -> None:
    told = enter(decided(workspace, make_evaluation), "promote")
    uri = f"models:/{told['name']}@champion"
    (fetch_model(uri, workspace) / "model.safetensors").write_bytes(b"x")
    assert bundle_digest(fetch_model(uri, workspace)) == told["model_digest"]


@pytest.mark.parametrize(
    "uri", ["models:/", "models:/a", "models:/a@", "models:/a/b", "models:/a@b@c", "models:/../x@champion", "models:/no-such@champion"]
)
def test_a_model_that_is_not_there_is_told_in_one_line(workspace: Path, make_evaluation: Make, uri: str) -> None:
    make_case(workspace, make_evaluation).decide()
    with pytest.raises(DataError, match="expected models:|no such model"):
        fetch_model(uri, workspace)


def test_an_empty_workspace_has_no_champion_and_needs_no_store(tmp_path: Path) -> None:
    assert champion_bundle(tmp_path, "model", CLASSES) is None
    with pytest.raises(DataError, match="holds no model yet"):
        fetch_model("models:/model-12345678@champion", tmp_path)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_folder_is_a_model_too(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    assert fetch_model(str(case.bundle), workspace) == case.bundle
    (case.bundle / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="altered"):
        fetch_model(str(case.bundle), workspace)


def test_the_step_records_and_keeps_the_evidence(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation)
    (workspace / "evidence").mkdir()
    rows = {"sample_id": ["a", "b", "c"], "rank": [2, 1, 0], "suspect": [False, True, True]}
    pq.write_table(pa.table(rows), workspace / "evidence" / "evidence.parquet")
    paths = {"model": case.bundle, "decision": case.decision, "evidence": workspace / "evidence"}
    artifacts = {name: SimpleNamespace(path=str(path)) for name, path in paths.items()}
    named = {"branch": "promote", "workspace": str(workspace), "name": "model", "run_id": "run-1", "revision": "abc", "base": "none"}
    register_step.python_func(records=str(workspace / "records"), **named, **artifacts)
    outputs = json.loads((workspace / "records" / "register.json").read_text())["outputs"]
    assert outputs["alias"] == "champion" and outputs["version"] == "1"
    listed = fetch(outputs["suspects_tag"], workspace / "listed", workspace=workspace)
    assert (listed.run_id, listed.num_images, listed.num_suspects) == ("run-1", 3, 2)
    assert pq.read_table(workspace / "listed" / "suspects.parquet")["sample_id"].to_pylist() == ["c", "b"]
    with client(workspace) as mlflow:
        run = mlflow.search_runs([mlflow.get_experiment_by_name("cbd").experiment_id])[0]
        assert {item.path for item in mlflow.list_artifacts(run.info.run_id)} == {"decision", "evidence"}
    assert run.data.metrics["clean accuracy"] == pytest.approx(0.97) and run.data.tags["cbd.verdict"] == "PASS"


def test_a_failed_step_leaves_the_reason(workspace: Path, make_evaluation: Make) -> None:
    case = decided(workspace, make_evaluation, turned=WORKS)
    paths = {"model": case.bundle, "decision": case.decision, "evidence": case.bundle}
    artifacts = {name: SimpleNamespace(path=str(path)) for name, path in paths.items()}
    named = {"branch": "promote", "workspace": str(workspace), "name": "model", "run_id": "run-1", "revision": "abc", "base": "none"}
    with pytest.raises(CbdError):
        register_step.python_func(records=str(workspace / "records"), **named, **artifacts)
    assert "demands the branch 'record'" in json.loads((workspace / "records" / "register.json").read_text())["error"]["message"]


def test_a_run_that_does_not_hold_what_was_accepted_meanwhile_gets_no_alias(workspace: Path, make_evaluation: Make) -> None:
    """Two runs took their deliveries in on top of nothing; the second to end would put the first one's images out of the union."""
    first, second = (decided(workspace, make_evaluation, run_id=f"run-{n}", per_class=n, weight=float(n)) for n in (2, 3))

    def enter_on(case: Case, base: str) -> dict[str, Any]:
        return register(case.bundle, case.decision, branch="promote", workspace=workspace, name="model", run_id=case.run_id, base=base)

    assert enter_on(first, "")["alias"] == "champion"
    with pytest.raises(DataError, match="another run was accepted meanwhile"):
        enter_on(second, "")
    assert len(versions(workspace)) == 1
    assert enter_on(first, "")["version"] == "1", "registering the same again is no other run"
    accepted = read_info(first.subject.dataset).digest
    assert enter_on(second, accepted)["version"] == "2"


def test_of_two_runs_that_register_at_once_the_second_sees_the_first(workspace: Path, make_evaluation: Make) -> None:
    first, second = (decided(workspace, make_evaluation, run_id=f"run-{n}", per_class=n, weight=float(n)) for n in (2, 3))
    given: dict[str, Any] = {"branch": "promote", "workspace": workspace, "name": "model", "base": ""}
    with ThreadPoolExecutor() as pool:
        with locked(workspace / LOCK):
            both = [pool.submit(register, case.bundle, case.decision, run_id=case.run_id, **given) for case in (first, second)]
            assert wait(both, timeout=2).done == set()
        wait(both)
    (error,) = [each.exception() for each in both if each.exception()]
    assert isinstance(error, DataError) and "another run was accepted meanwhile" in str(error)
    assert len(versions(workspace)) == 1


def test_killed_before_the_alias_is_set_a_model_is_where_the_log_says_by_a_rollback_or_the_same_step(
    workspace: Path, make_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = decided(workspace, make_evaluation)
    for mend in (lambda: enter(case, "promote"), lambda: rollback("model", workspace, to="1", reason="killed", by="me")):
        with monkeypatch.context() as killed:
            killed.setattr("components.register.set_alias", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                enter(case, "promote")
        with pytest.raises(DataError, match=r"no such alias, audit.jsonl last set version 1: .* cbd rollback \S+ --to 1"):
            champion_bundle(workspace, "model", CLASSES)
        mend()
        assert champion_bundle(workspace, "model", CLASSES)
        drop_alias(workspace, registered_name("model", CLASSES), "champion")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "decision.sig", "model.sig"])
def test_what_does_not_verify_is_named_where_it_lies_and_not_by_a_temporary_path(workspace: Path, make_evaluation: Make, name: str) -> None:
    case = decided(workspace, make_evaluation)
    file = next(path for path in (case.bundle / name, case.decision / name) if path.is_file())
    tags = {"cbd.run_id": case.run_id, "cbd.model_digest": "x", "cbd.decision_digest": "x"}
    file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    with pytest.raises(DataError) as caught:
        register_bundle(case.bundle, case.decision, workspace=workspace, name="model", tags=tags)
    told = str(caught.value)
    assert str(case.bundle) in told or str(case.decision) in told
    assert tempfile.gettempdir() + "/tmp" not in told and "\n" not in told and versions(workspace) == []


def changed(workspace: Path, statement: str, *values: str) -> None:
    """Changes MLflow's file by hand."""
    with contextlib.closing(sqlite3.connect(workspace / "mlflow.db")) as store, store:
        store.execute(statement, values)


def test_the_audit_looks_at_a_model_where_mlflow_fetches_it_from(workspace: Path, make_evaluation: Make) -> None:
    enter(decided(workspace, make_evaluation), "promote")
    assert any("registry: 1 registered models" in sentence for sentence in verify_all(workspace))
    inside = stored(workspace).relative_to(workspace)
    for other in (workspace / "other", workspace / "elsewhere" / inside):
        shutil.copytree(workspace / inside, other)
        changed(workspace, "UPDATE model_versions SET storage_location = ?", other.as_uri())
        assert list(verify_all(workspace)), "the same model, and the same decision"
        weights = other / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        with pytest.raises(DataError, match=f"{other}.*: altered"):
            list(verify_all(workspace))


@pytest.mark.parametrize("place", ["s3://evil/model", "file:///nowhere", "file://[x/y", "file:///a%00b/mlartifacts/%00", ""])
def test_a_model_behind_an_alias_that_lies_nowhere_here_is_refused(workspace: Path, make_evaluation: Make, place: str) -> None:
    enter(decided(workspace, make_evaluation), "promote")
    changed(workspace, "UPDATE model_versions SET source = ?, storage_location = ?", place, place)
    with pytest.raises(DataError, match="mlflow.db: version 1 of model-.* has an alias and names no folder here"):
        list(verify_all(workspace))


def test_a_version_that_was_removed_is_refused_behind_an_alias_and_told_otherwise(workspace: Path, make_evaluation: Make) -> None:
    for number, turned in ((1, WORKS), (2, {})):
        case = decided(workspace, make_evaluation, run_id=f"run-{number}", weight=float(number), turned=turned)
        enter(case, "record" if turned else "promote")
    changed(workspace, "DELETE FROM model_versions WHERE version = 1")
    told = [sentence for sentence in verify_all(workspace) if isinstance(sentence, Unverified) and sentence.startswith("registry")]
    name = registered_name("model", CLASSES)
    assert told == [f"registry: NOT VERIFIED: 1 registered models without an alias are not there, such as version 1 of {name}"]
    changed(workspace, "DELETE FROM model_versions")
    with pytest.raises(DataError, match="version 2 of .* has an alias and names no folder here"):
        list(verify_all(workspace))


def test_a_row_of_another_mlflow_workspace_hides_no_alias_that_was_moved(workspace: Path, make_evaluation: Make) -> None:
    enter(decided(workspace, make_evaluation), "promote")
    enter(decided(workspace, make_evaluation, run_id="run-2", weight=2.0), "promote")
    changed(workspace, "UPDATE registered_model_aliases SET version = 1")
    changed(workspace, "INSERT INTO registered_model_aliases SELECT alias, 2, name, 'zzz' FROM registered_model_aliases")
    with pytest.raises(DataError, match="the alias was moved"):
        list(verify_all(workspace))
