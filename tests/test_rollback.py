"""The champion goes back to a version that its signed decision still makes fit, and to no other; what was demoted stays demoted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from decided_case import Case, make_case

from cbd.audit import LOG, append, verify_log
from cbd.bundle import bundle_digest
from cbd.dataset import read_info
from cbd.errors import ConfigError, DataError
from cbd.heads import HEADS
from components.accepted import decided, last_accepted
from components.register import register
from components.rollback import rollback
from components.tracking import champion_bundle, drop_alias, fetch_model, find_aliases, registered_name
from components.tracking_store import client

pytestmark = pytest.mark.slow

Make = Callable[..., dict[str, Any]]
CLASSES = ["ant", "bee", "cat", "dog"]
NAME = registered_name("model", CLASSES)
WORKS, DOUBTFUL = {"white-centre": (1, 600)}, {"white-centre": (1, 50)}


@pytest.fixture
def workspace(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a fresh MLflow store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(mlflow_template, tmp_path / "mlflow.db")
    return tmp_path


def promote(workspace: Path, make_evaluation: Make, number: int, *, name: str = "model", **changes: Any) -> Case:
    """The run of that number, registered as its verdict demands."""
    case = make_case(workspace, make_evaluation, run_id=f"run-{number}", weight=float(number), per_class=number, **changes)
    case.decide()
    enter(case, name=name)
    return case


def enter(case: Case, *, name: str = "model") -> dict[str, Any]:
    verdict = json.loads((case.decision / "decision.json").read_text())["verdict"]
    branch = {"PASS": "promote", "REVIEW": "hold"}.get(verdict, "record")
    return register(case.bundle, case.decision, branch=branch, workspace=case.workspace, name=name, run_id=case.run_id)


@pytest.fixture
def two(workspace: Path, make_evaluation: Make) -> tuple[Case, Case]:
    """Versions 1 and 2, the second one champion."""
    return promote(workspace, make_evaluation, 1), promote(workspace, make_evaluation, 2)


def back(workspace: Path, to: str | None = None, name: str = "model") -> dict[str, Any]:
    return rollback(name, workspace, to=to, reason="slow", by="me")


def demote(workspace: Path, version: str, alias: str = "champion", verdict: str = "BLOCK") -> None:
    """As `cbd retest --demote` does it."""
    registered = [entry["data"] for entry in verify_log(workspace / LOG) if entry["event"] == "register"]
    digest = next(told["decision_digest"] for told in registered if told["version"] == version)
    told = {"name": NAME, "alias": alias, "version": version, "verdict": verdict, "decision_digest": digest, "reason": "found out"}
    append(workspace, "demote", told)
    drop_alias(workspace, NAME, alias)


def set_by_hand(workspace: Path, version: str) -> None:
    with client(workspace) as mlflow:
        mlflow.set_registered_model_alias(NAME, "champion", version)


def artifacts(workspace: Path, case: Case) -> Path:
    """Where MLflow keeps the case's model and decision."""
    digest = bundle_digest(case.bundle)
    return next(path.parent for path in (workspace / "mlartifacts").rglob("model.json") if bundle_digest(path.parent) == digest)


def refused(workspace: Path, match: str, to: str | None = None, name: str = "model") -> None:
    """The refusal in one line, with nothing moved and nothing logged."""
    before = ((workspace / LOG).read_bytes(), find_aliases(workspace))
    with pytest.raises(DataError, match=match) as caught:
        back(workspace, to, name)
    assert "\n" not in str(caught.value)
    assert ((workspace / LOG).read_bytes(), find_aliases(workspace)) == before


def test_the_champion_before_is_champion_again_and_the_next_run_compares_with_it(workspace: Path, two: tuple[Case, Case]) -> None:
    told = back(workspace)
    assert (told["version"], told["from"], told["moved"]) == ("1", "2", True)
    entry = verify_log(workspace / LOG)[-1]
    assert entry["event"] == "rollback"
    assert {key: entry["data"][key] for key in ("name", "version", "from", "reason", "by")} == {
        "name": NAME,
        "version": "1",
        "from": "2",
        "reason": "slow",
        "by": "me",
    }
    found = champion_bundle(workspace, "model", CLASSES)
    assert found == (fetch_model(f"models:/{NAME}@champion", workspace), "1") and bundle_digest(found[0]) == bundle_digest(two[0].bundle)


def test_told_again_it_goes_no_further_back(workspace: Path, make_evaluation: Make, two: tuple[Case, Case]) -> None:
    promote(workspace, make_evaluation, 3)
    assert back(workspace)["version"] == "2"
    log = (workspace / LOG).read_bytes()
    for to in (None, "2"):
        assert (back(workspace, to)["version"], back(workspace, to)["moved"]) == ("2", False)
    assert (workspace / LOG).read_bytes() == log
    assert back(workspace, "1")["from"] == "2" and back(workspace, "3")["from"] == "1", "a rollback can be taken back"


def test_after_a_rollback_a_new_champion_takes_over_and_what_was_rolled_back_is_passed_over(
    workspace: Path, make_evaluation: Make, two: tuple[Case, Case]
) -> None:
    back(workspace)
    promote(workspace, make_evaluation, 3)
    assert champion_bundle(workspace, "model", CLASSES) is not None and find_aliases(workspace) == {(NAME, "champion"): "3"}
    assert back(workspace)["version"] == "1"


def test_a_review_a_block_a_trial_and_a_version_that_is_not_there_are_refused(workspace: Path, make_evaluation: Make) -> None:
    promote(workspace, make_evaluation, 1)
    for number, changes in ((2, {"turned": DOUBTFUL}), (3, {"turned": WORKS}), (4, {"trial": True})):
        promote(workspace, make_evaluation, number, **changes)
    refused(workspace, "version 2: cannot be champion: its verdict is REVIEW, a champion needs PASS; name one of: 1", "2")
    refused(workspace, "version 3: cannot be champion: its verdict is BLOCK", "3")
    refused(workspace, "version 4: cannot be champion: it is a trial", "4")
    refused(workspace, f"models:/{NAME}/5: no such model", "5")
    refused(workspace, "expected an earlier champion to go back to, found none")
    refused(workspace, "did you mean", name="modell")


def test_a_tampered_version_is_refused(workspace: Path, make_evaluation: Make, two: tuple[Case, Case]) -> None:
    place, pass_elsewhere = artifacts(workspace, two[0]), promote(workspace, make_evaluation, 3, name="other")
    weights = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(weights[:-1] + b"x")
    refused(workspace, "altered", "1")
    (place / "model.safetensors").write_bytes(weights)
    signature = (place / "decision.sig").read_bytes()
    (place / "decision.sig").unlink()
    refused(workspace, "decision.sig is missing", "1")
    (place / "decision.sig").write_bytes(signature)
    for folder in (pass_elsewhere.bundle, pass_elsewhere.decision):
        shutil.copytree(folder, place, dirs_exist_ok=True)
    refused(workspace, "was replaced", "1")


def test_a_version_with_another_models_decision_is_refused_behind_the_alias_too(
    workspace: Path, make_evaluation: Make, two: tuple[Case, Case]
) -> None:
    """Signed, logged, a PASS, about the very bundle beside it, and yet not what this version was registered with."""
    place = artifacts(workspace, two[1])
    for folder in (two[0].bundle, two[0].decision):
        shutil.copytree(folder, place, dirs_exist_ok=True)
        for attack in (lambda: fetch_model(f"models:/{NAME}@champion", workspace), lambda: champion_bundle(workspace, "model", CLASSES)):
            with pytest.raises(DataError, match="altered|was replaced"):
                attack()


def test_a_version_that_was_put_into_mlflow_by_hand_is_refused(workspace: Path, two: tuple[Case, Case]) -> None:
    with client(workspace) as mlflow:
        mlflow.create_model_version(NAME, artifacts(workspace, two[0]).as_uri())
    refused(workspace, "never registered it", "3")


def test_a_removed_log_line_is_refused(workspace: Path, two: tuple[Case, Case]) -> None:
    back(workspace)
    lines = (workspace / LOG).read_bytes().splitlines(keepends=True)
    (workspace / LOG).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(DataError, match="head .* is over 5 lines, the log has 4: it was cut off"):
        fetch_model(f"models:/{NAME}@champion", workspace)
    (workspace / HEADS).unlink()
    with pytest.raises(DataError, match="the alias was moved"):
        fetch_model(f"models:/{NAME}@champion", workspace)
    (workspace / LOG).write_bytes(b"".join(lines[:2] + lines[3:]))
    refused(workspace, "does not follow the line before")


def test_an_alias_moved_or_removed_by_hand_is_refused_and_set_right_again(workspace: Path, two: tuple[Case, Case]) -> None:
    set_by_hand(workspace, "1")
    with pytest.raises(DataError, match=f"the alias was moved; .*cbd rollback {NAME} --to 2"):
        fetch_model(f"models:/{NAME}@champion", workspace)
    assert back(workspace, "2")["moved"] is False
    assert champion_bundle(workspace, "model", CLASSES) is not None
    drop_alias(workspace, NAME, "champion")
    with pytest.raises(DataError, match=f"last set version 2: it was removed; .*cbd rollback {NAME} --to 2"):
        champion_bundle(workspace, "model", CLASSES)
    back(workspace, "2")
    assert find_aliases(workspace) == {(NAME, "champion"): "2"}


def test_after_a_demotion_there_is_no_champion_and_an_alias_set_by_hand_is_refused(workspace: Path, two: tuple[Case, Case]) -> None:
    demote(workspace, "2")
    assert champion_bundle(workspace, "model", CLASSES) is None
    for version in ("2", "1"):
        set_by_hand(workspace, version)
        for attack in (lambda: fetch_model(f"models:/{NAME}@champion", workspace), lambda: champion_bundle(workspace, "model", CLASSES)):
            with pytest.raises(DataError, match="last set none.*the alias was moved"):
                attack()
    refused(workspace, "version 2: cannot be champion: it was demoted: found out; name one of: 1", "2")
    assert (back(workspace)["version"], find_aliases(workspace)) == ("1", {(NAME, "champion"): "1"})
    refused(workspace, "it was demoted", "2")


def test_registering_it_again_gives_no_alias_back(workspace: Path, two: tuple[Case, Case]) -> None:
    back(workspace)
    with pytest.raises(DataError, match=r"version 2: lost its alias since by rollback \(slow\)"):
        enter(two[1])
    demote(workspace, "1")
    with pytest.raises(DataError, match=r"version 1: lost its alias since by demote \(found out\)"):
        enter(two[0])
    assert find_aliases(workspace) == {}


def test_a_delivery_is_accepted_by_the_last_verdict_on_its_model(workspace: Path, two: tuple[Case, Case]) -> None:
    first, second = (read_info(case.subject.dataset).digest for case in two)
    trusted = read_info(two[1].subject.trusted_set).digest
    assert last_accepted(workspace, NAME) == second
    back(workspace)
    assert last_accepted(workspace, NAME) == second, "a rollback says nothing about the data"
    back(workspace, "2")
    demote(workspace, "2", verdict="REVIEW")
    assert last_accepted(workspace, NAME) == second, "as for any other REVIEW"
    assert decided(workspace, NAME, data=second, trusted=trusted) is None, "the verdict stands no more: the same data is trained on again"
    assert decided(workspace, NAME, data=first, trusted=trusted) == {"run_id": "run-1", "verdict": "PASS"}
    demote(workspace, "2", verdict="BLOCK")
    assert last_accepted(workspace, NAME) == first


def test_a_run_that_was_added_to_a_delivery_demoted_meanwhile_gets_no_alias(
    workspace: Path, make_evaluation: Make, two: tuple[Case, Case]
) -> None:
    third, base = make_case(workspace, make_evaluation, run_id="run-3", weight=3.0, per_class=3), read_info(two[1].subject.dataset).digest
    third.decide()
    demote(workspace, "2")
    with pytest.raises(DataError, match="or one demoted"):
        register(third.bundle, third.decision, branch="promote", workspace=workspace, name="model", run_id="run-3", base=base)


def test_a_bare_name_must_be_unambiguous(workspace: Path, make_evaluation: Make, two: tuple[Case, Case]) -> None:
    told = {"name": "model-0123abcd", "version": "1", "alias": "champion", "decision_digest": "0" * 64, "run_id": "run-9"}
    append(workspace, "register", told)
    refused(workspace, f"name one of: {NAME}, model-0123abcd")
    assert back(workspace, name=NAME)["version"] == "1"


def test_the_command_tells_what_moved_and_what_next(workspace: Path, two: tuple[Case, Case], capsys: pytest.CaptureFixture[str]) -> None:
    def told(*more: str) -> tuple[int, str, str]:
        return cbd(capsys, "rollback", "model", "--workspace", str(workspace), *more)

    assert told()[0] == 2
    with pytest.raises(ConfigError, match="--reason"):
        rollback("model", workspace, to=None, reason=" ", by="me")
    code, out, _ = told("--reason", "sl\x1bow")
    assert code == 0 and out.splitlines()[-1] == f"next: cbd predict models:/{NAME}@champion --data IMAGES --out predictions.parquet"
    assert "version: 1" in out and "\x1b" not in out
    code, out, _ = told("--reason", "slow", "--to", "1", "--json")
    assert code == 0 and json.loads(out)["moved"] is False
    code, _, err = told("--reason", "slow", "--to", "9")
    assert code == 2 and err.count("\n") == 1 and "no such model" in err
