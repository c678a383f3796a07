"""A person lets a REVIEW become champion until a date: nothing else can be overridden, and over is over."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from decided_case import POLICY, Case, make_case

from cbd.audit import LOG, append, verify_log
from cbd.bundle import bundle_digest
from cbd.errors import ConfigError, DataError
from components.override import override
from components.register import register
from components.retest import retest
from components.rollback import rollback
from components.standing import read_moves
from components.tracking import champion_bundle, drop_alias, fetch_model, find_aliases, registered_name
from components.tracking_store import client
from components.verification import verify_all

pytestmark = pytest.mark.slow

Make = Callable[..., dict[str, Any]]
CLASSES = ["ant", "bee", "cat", "dog"]
NAME = registered_name("model", CLASSES)
WORKS, DOUBTFUL = {"white-centre": (1, 600)}, {"white-centre": (1, 50)}
CHAMPION = f"models:/{NAME}@champion"


@pytest.fixture
def workspace(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a fresh MLflow store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(mlflow_template, tmp_path / "mlflow.db")
    return tmp_path


def enter(workspace: Path, make_evaluation: Make, number: int, **changes: Any) -> Case:
    """The run of that number, decided and registered as its verdict demands."""
    case = make_case(workspace, make_evaluation, run_id=f"run-{number}", weight=float(number), per_class=number, **changes)
    verdict = case.decide()["verdict"]
    branch = {"PASS": "promote", "REVIEW": "hold"}.get(verdict, "record")
    register(case.bundle, case.decision, branch=branch, workspace=workspace, name="model", run_id=case.run_id)
    return case


@pytest.fixture
def two(workspace: Path, make_evaluation: Make) -> tuple[Case, Case]:
    """Version 1, champion by a PASS, and version 2, which waits for review."""
    return enter(workspace, make_evaluation, 1), enter(workspace, make_evaluation, 2, turned=DOUBTFUL)


def allow(workspace: Path, run_id: str = "run-2", *, days: float = 10, **given: Any) -> dict[str, Any]:
    return override(run_id, workspace, **({"reason": "known", "by": "me", "expires": datetime.now(UTC) + timedelta(days=days)} | given))


def let_time_pass(monkeypatch: pytest.MonkeyPatch, days: float = 11) -> None:
    """The clock of whoever asks who stands behind an alias."""
    later = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    monkeypatch.setattr("components.standing.now", lambda: later)


def refused(workspace: Path, match: str, run_id: str, error: type[Exception] = DataError, **given: Any) -> None:
    before = ((workspace / LOG).read_bytes(), find_aliases(workspace))
    with pytest.raises(error, match=match) as caught:
        allow(workspace, run_id, **given)
    assert "\n" not in str(caught.value) and ((workspace / LOG).read_bytes(), find_aliases(workspace)) == before


def test_a_review_is_champion_by_an_override_that_is_signed_and_logged(workspace: Path, two: tuple[Case, Case]) -> None:
    told = allow(workspace)
    assert (told["version"], told["from"]) == ("2", "1")
    entry = verify_log(workspace / LOG)[-1]
    assert entry["event"] == "override" and entry["data"]["reason"] == "known" and entry["data"]["by"] == "me"
    assert entry["data"]["model_digest"] == bundle_digest(two[1].bundle) and entry["data"]["run_id"] == "run-2"
    assert champion_bundle(workspace, "model", CLASSES) == (fetch_model(CHAMPION, workspace), "2")
    assert bundle_digest(fetch_model(CHAMPION, workspace)) == bundle_digest(two[1].bundle)
    assert any(f"champion: models:/{NAME} version 2" in sentence for sentence in verify_all(workspace))


def test_when_it_is_over_nothing_gives_the_model_out_any_more(
    workspace: Path, two: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(workspace)
    let_time_pass(monkeypatch)
    for attack in (lambda: fetch_model(CHAMPION, workspace), lambda: champion_bundle(workspace, "model", CLASSES)):
        with pytest.raises(DataError, match="version 2: its override expired on"):
            attack()
    with pytest.raises(DataError, match="is champion by an override that expired on .* cbd rollback"):
        list(verify_all(workspace))
    rows = {row["alias"]: row for row in retest(workspace, policy=POLICY, seed=0, demote=False)}
    assert rows["champion"]["passes"] is False and "its override expired" in rows["champion"]["sentence"]


def test_a_clock_that_is_set_back_does_not_bring_it_back(workspace: Path, two: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    allow(workspace)
    with monkeypatch.context() as later:
        later.setattr("cbd.audit.now", lambda: "2099-01-01T00:00:00.000Z")
        append(workspace, "event", {})
    with pytest.raises(DataError, match="its override expired on"):
        fetch_model(CHAMPION, workspace)


@pytest.mark.parametrize("to", [None, "1"])
def test_afterwards_the_champion_before_is_one_command_away(
    workspace: Path, two: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch, to: str | None
) -> None:
    allow(workspace)
    let_time_pass(monkeypatch)
    assert rollback("model", workspace, to=to, reason="over", by="me")["version"] == "1"
    assert champion_bundle(workspace, "model", CLASSES) is not None and find_aliases(workspace)[NAME, "champion"] == "1"
    assert list(verify_all(workspace)) and rollback("model", workspace, to="1", reason="again", by="me")["moved"] is False


def test_afterwards_a_first_champion_is_taken_off_by_a_demotion(
    workspace: Path, make_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(workspace, make_evaluation, 2, turned=DOUBTFUL)
    allow(workspace)
    let_time_pass(monkeypatch)
    retest(workspace, policy=POLICY, seed=0, demote=True)
    assert (NAME, "champion") not in find_aliases(workspace) and champion_bundle(workspace, "model", CLASSES) is None
    assert list(verify_all(workspace))


def test_a_later_pass_takes_over_and_a_rollback_goes_past_what_a_person_allowed(
    workspace: Path, make_evaluation: Make, two: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(workspace)
    enter(workspace, make_evaluation, 3)
    let_time_pass(monkeypatch)
    assert champion_bundle(workspace, "model", CLASSES) is not None
    assert rollback("model", workspace, to=None, reason="slow", by="me")["version"] == "1"
    with pytest.raises(DataError, match="its verdict is REVIEW, a champion needs PASS"):
        rollback("model", workspace, to="2", reason="slow", by="me")


def test_only_a_review_can_be_overridden(workspace: Path, make_evaluation: Make, two: tuple[Case, Case]) -> None:
    enter(workspace, make_evaluation, 3, turned=WORKS)
    enter(workspace, make_evaluation, 4, trial=True, turned=DOUBTFUL)
    enter(workspace, make_evaluation, 5, num_images=200)
    refused(workspace, "its verdict is PASS", "run-1")
    refused(workspace, "its verdict is BLOCK, only a REVIEW can be overridden", "run-3")
    refused(workspace, "its verdict is a trial", "run-4")
    refused(workspace, "its verdict is INCONCLUSIVE", "run-5")
    refused(workspace, "registered no model of this run", "run-9")


def test_without_a_reason_or_a_date_ahead_nothing_is_overridden(workspace: Path, two: tuple[Case, Case]) -> None:
    refused(workspace, "--reason", "run-2", ConfigError, reason=" ")
    for days in (-1, 0, 91):
        refused(workspace, "--expires .*within the next 90 days", "run-2", ConfigError, days=days)


def test_what_was_demoted_or_decided_again_cannot_be_overridden(workspace: Path, two: tuple[Case, Case]) -> None:
    digest = next(move["decision_digest"] for move in read_moves(workspace) if move["version"] == "2")
    told = {"decision_digest": "0" * 64, "run_id": "run-2", "verdict": "BLOCK", "digests": {}, "attempt": {}, "trial": False}
    before = (workspace / LOG).read_bytes()
    append(workspace, "decision", told)
    refused(workspace, "decided again since .BLOCK", "run-2")
    (workspace / LOG).write_bytes(before)
    demoted = {"name": NAME, "alias": "candidate", "version": "2", "verdict": "BLOCK", "decision_digest": digest, "reason": "found out"}
    append(workspace, "demote", demoted)
    drop_alias(workspace, NAME, "candidate")
    refused(workspace, "was demoted .found out", "run-2")


def test_what_is_demoted_while_a_person_overrides_does_not_become_champion(
    workspace: Path, two: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The override looked at the log, then fetches the model for a while, and then writes its own line after the demotion's."""

    def slowly(uri: str, place: Path) -> Path:
        fetched = fetch_model(uri, place)
        digest = next(move["decision_digest"] for move in read_moves(workspace) if move["version"] == "2")
        demoted = {"name": NAME, "alias": "candidate", "version": "2", "verdict": "BLOCK", "decision_digest": digest, "reason": "found out"}
        append(workspace, "demote", demoted)
        drop_alias(workspace, NAME, "candidate")
        return fetched

    monkeypatch.setattr("components.override.fetch_model", slowly)
    with pytest.raises(DataError, match=r"version 2: was demoted meanwhile \(found out\)"):
        allow(workspace)
    assert read_moves(workspace)[-1]["event"] == "override"
    assert find_aliases(workspace) == {(NAME, "champion"): "1"}
    assert fetch_model(CHAMPION, workspace) == fetch_model(f"models:/{NAME}/1", workspace)
    with client(workspace) as mlflow:
        mlflow.set_registered_model_alias(NAME, "champion", "2")
    with pytest.raises(DataError, match="the alias was moved"):
        fetch_model(CHAMPION, workspace)


def test_a_champion_that_came_while_a_person_overrides_stays(
    workspace: Path, two: tuple[Case, Case], make_evaluation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.override.close_log", lambda _: enter(workspace, make_evaluation, 3))
    with pytest.raises(DataError, match="version 2: another one became champion meanwhile"):
        allow(workspace)
    assert find_aliases(workspace)[NAME, "champion"] == "3"


def test_a_date_that_the_logs_last_line_is_past_is_refused_at_once(
    workspace: Path, two: tuple[Case, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as ahead:
        ahead.setattr("cbd.audit.now", lambda: "2999-01-01T00:00:00.000Z")
        append(workspace, "delivery", {})
    refused(workspace, "--expires .*expected a date after 2999-01-01", "run-2", ConfigError)


def test_an_alias_set_by_hand_is_no_override(workspace: Path, two: tuple[Case, Case]) -> None:
    with client(workspace) as mlflow:
        mlflow.set_registered_model_alias(NAME, "champion", "2")
    with pytest.raises(DataError, match="the alias was moved"):
        fetch_model(CHAMPION, workspace)
    with pytest.raises(DataError, match="models:/.*@champion is version 2, audit.jsonl last set 1: the alias was moved"):
        list(verify_all(workspace))


def test_a_model_that_was_overwritten_behind_its_alias_is_named_by_the_audit(workspace: Path, two: tuple[Case, Case]) -> None:
    assert any(
        "2 registered models, and the decisions beside them, are those that the log names" in sentence for sentence in verify_all(workspace)
    )
    for path in (workspace / "mlartifacts").rglob("model.json"):
        if bundle_digest(path.parent) == bundle_digest(two[0].bundle):
            for name in ("model.json", "model.safetensors"):
                shutil.copyfile(two[1].bundle / name, path.with_name(name))
    with pytest.raises(DataError, match="altered: version 1 of"):
        list(verify_all(workspace))


def test_an_older_decision_registers_nothing(workspace: Path, make_evaluation: Make) -> None:
    """Replay: a PASS under a milder policy is brought back after the run was decided again under a stricter one."""
    case = make_case(workspace, make_evaluation, run_id="run-1")
    assert case.decide()["verdict"] == "PASS"
    mild = workspace / "mild"
    shutil.copytree(case.decision, mild)
    from components.decide import decide

    strict = POLICY.model_copy(update={"min_clean_accuracy": 0.99})
    assert decide(case.subject, case.decision, policy=strict, workspace=workspace, run_id="run-1")["verdict"] != "PASS"
    with pytest.raises(DataError, match="on run run-1 is an older one"):
        register(case.bundle, mild, branch="promote", workspace=workspace, name="model", run_id="run-1")
    assert find_aliases(workspace) == {}


def test_the_command_tells_until_when(workspace: Path, two: tuple[Case, Case], capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--workspace", str(workspace), "--reason", "kn\x1bown")
    date = f"{datetime.now(UTC) + timedelta(days=20):%Y-%m-%d}"
    code, out, _ = cbd(capsys, "override", "run-2", "--expires", date, *place)
    assert code == 0 and f"expires: {date}T00:00:00.000Z" in out and "\x1b" not in out
    assert out.splitlines()[-1] == f"next: cbd predict {CHAMPION} --data IMAGES --out predictions.parquet"
    assert cbd(capsys, "override", "run-2", "--expires", "tomorrow", *place)[0] == 2
    code, out, err = cbd(capsys, "override", "run-1", "--expires", date, *place, "--json")
    assert code == 2 and json.loads(out)["exit_code"] == 2 and "only a REVIEW" in err
