"""A finished run judged again under another policy: from unaltered evidence only, signed, and never taken for the run's own decision."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from decided_case import POLICY, Case, change_json, make_case, record, swap

from cbd.audit import verify_log
from cbd.config import section_digest
from cbd.dataset import read_info
from cbd.errors import DataError
from components.accepted import decided, last_accepted
from components.decision import read_decision
from components.register import register
from components.summary import alarms, read_run
from components.tracking import registered_name

Make = Callable[..., dict[str, Any]]
LAX = "gate: {min_clean_accuracy: 0.9, max_excess_asr: 0.2}\n"
DOUBTFUL = {"white-centre": (1, 100)}
"""11 % of 900: over the limit of 5 %, under one of 20 %."""


@pytest.fixture
def case(tmp_path: Path, make_evaluation: Make, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A run that ended in REVIEW, and two policies in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "lax.yaml").write_text(LAX)
    (tmp_path / "same.yaml").write_text("gate: {min_clean_accuracy: 0.9}\nseed: 3\n")
    case = make_case(tmp_path / "w", make_evaluation, turned=DOUBTFUL)
    assert case.decide()["verdict"] == "REVIEW"
    record(case)
    return case


def rejudge(capsys: pytest.CaptureFixture[str], policy: str = "lax.yaml", run: str = "run-1") -> tuple[int, dict[str, Any]]:
    code, out, _ = cbd(capsys, "gate", run, "--policy", policy, "--workspace", "w", "--json")
    return code, json.loads(out.splitlines()[-1])


def judged(case: Case) -> Path:
    """The folder of the one re-judgement."""
    (place,) = (case.workspace / "runs" / "run-1" / "judged").iterdir()
    return place


def test_another_policy_changes_the_verdict_and_says_which_check_and_why(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = rejudge(capsys)
    assert (code, told["verdict_then"], told["verdict"]) == (0, "REVIEW", "PASS")
    changes = {check["name"]: (check["then"], check["now"]) for check in told["changed_checks"]}
    assert changes == {"white-centre": ("REVIEW", "PASS"), "battery": ("REVIEW", "PASS")}
    assert told["changed_policy"] == {"max_excess_asr": {"then": 0.05, "now": 0.2}}
    assert judged(case).name == told["policy_sha256"][:12]
    signed = read_decision(judged(case), case.workspace, rejudged=True)
    assert signed.content["rejudges"] == read_decision(case.decision, case.workspace).digest and signed.content["verdict"] == "PASS"
    entry = verify_log(case.workspace / "audit.jsonl")[-1]
    assert (entry["event"], entry["data"]["decision_digest"], entry["data"]["run_id"]) == ("rejudged", signed.digest, "run-1")
    code, out, _ = cbd(capsys, "gate", str(case.workspace / "runs" / "run-1"), "--policy", "lax.yaml")
    assert code == 0 and "was REVIEW, is PASS" in out and "policy max_excess_asr: 0.05 -> 0.2" in out
    assert "check B white-centre: REVIEW -> PASS" in out and out.splitlines()[-1].startswith("next: cbd report")


def test_the_same_policy_gives_the_same_verdict(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    code, told = rejudge(capsys, "same.yaml")
    assert (code, told["verdict"], told["changed_checks"], told["changed_policy"]) == (10, "REVIEW", [], {})
    assert told["policy_sha256"] == section_digest(POLICY)
    code, out, _ = cbd(capsys, "gate", "run-1", "--policy", "same.yaml", "--workspace", "w")
    assert code == 10 and "was REVIEW, is REVIEW" in out and "check" not in out.splitlines()[1]


def test_the_same_judgement_is_written_and_logged_once(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    first = rejudge(capsys)
    before = ((case.workspace / "audit.jsonl").read_bytes(), (judged(case) / "decision.json").read_bytes())
    assert rejudge(capsys) == first
    assert ((case.workspace / "audit.jsonl").read_bytes(), (judged(case) / "decision.json").read_bytes()) == before


def test_a_run_that_validation_stopped_stays_blocked(tmp_path: Path, make_evaluation: Make, capsys: pytest.CaptureFixture[str]) -> None:
    from components.decide import Subject, decide

    case = make_case(tmp_path / "w", make_evaluation)
    change_json(case.subject.validation / "validation.json", passed=False, critical=["class count"])
    subject = Subject(case.subject.dataset, case.subject.trusted_set, case.subject.validation)
    decide(subject, case.decision, policy=POLICY, workspace=case.workspace, run_id="run-1")
    record(case)
    for name in ("train_deconfounded", "evaluate", "scan"):
        (case.workspace / "runs" / "run-1" / "records" / f"{name}.json").unlink()
    (tmp_path / "lax.yaml").write_text(LAX)
    code, out, _ = cbd(capsys, "gate", str(case.workspace / "runs" / "run-1"), "--policy", str(tmp_path / "lax.yaml"), "--json")
    assert code == 11 and json.loads(out)["verdict_then"] == json.loads(out)["verdict"] == "BLOCK"


def test_nothing_downstream_takes_it_for_the_runs_own_decision(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    rejudge(capsys)
    data, trusted = read_info(case.subject.dataset).digest, read_info(case.subject.trusted_set).digest
    name = registered_name("model", ("ant", "bee", "cat", "dog"))
    for branch in ("promote", "hold"):
        with pytest.raises(DataError, match="found a re-judgement under another policy, which moves no alias"):
            register(case.bundle, judged(case), branch=branch, workspace=case.workspace, name="model", run_id="run-1")
    assert last_accepted(case.workspace, name) == "" and decided(case.workspace, name, data=data, trusted=trusted) is None
    swap(case.decision, judged(case))
    told = alarms(read_run(str(case.workspace / "runs" / "run-1" / "records"), workspace=case.workspace))
    assert any("decide said 'REVIEW'" in alarm for alarm in told)
    with pytest.raises(DataError, match="moves no alias"):
        register(case.bundle, case.decision, branch="promote", workspace=case.workspace, name="model", run_id="run-1")


def test_a_registered_run_keeps_its_own_verdict(case: Case, mlflow_template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log's last word on the run is a PASS that does not count: the alias stays, and so does what `nothing new` says."""
    shutil.copyfile(mlflow_template, case.workspace / "mlflow.db")
    told = register(case.bundle, case.decision, branch="hold", workspace=case.workspace, name="model", run_id="run-1")
    rejudge(capsys)
    data, trusted = read_info(case.subject.dataset).digest, read_info(case.subject.trusted_set).digest
    assert decided(case.workspace, told["name"], data=data, trusted=trusted) == {"run_id": "run-1", "verdict": "REVIEW"}
    from components.tracking import find_aliases

    assert find_aliases(case.workspace) == {(told["name"], "candidate"): "1"}


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("evaluation", "altered since its decision: expected evaluation"),
        ("validation", "altered since its decision: expected validation"),
        ("decision", "signature is not this workspace's"),
        ("other decision", "is the decision of run 'run-2'"),
        ("model", "measured model"),
        ("data", "shard-00000"),
        ("log", "line 1 was edited"),
        ("earlier", "an earlier re-judgement is in the way"),
    ],
)
def test_altered_evidence_is_refused(
    case: Case, make_evaluation: Make, capsys: pytest.CaptureFixture[str], attack: str, message: str
) -> None:
    assert case.subject.evaluation is not None
    log = case.workspace / "audit.jsonl"
    if attack == "evaluation":
        change_json(case.subject.evaluation / "evaluation.json", attack_success_rate={})
    elif attack == "validation":
        change_json(case.subject.validation / "validation.json", warnings=["one"])
    elif attack == "decision":
        change_json(case.decision / "decision.json", verdict="PASS")
    elif attack == "other decision":
        other = make_case(case.workspace, make_evaluation, run_id="run-2", weight=2.0)
        other.decide()
        swap(case.decision, other.decision)
    elif attack == "model":
        swap(case.bundle, make_case(case.workspace, make_evaluation, run_id="run-2", weight=2.0).bundle)
    elif attack == "data":
        shard = next(case.subject.dataset.glob("shard-*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    elif attack == "log":
        log.write_bytes(log.read_bytes().replace(b"REVIEW", b"PASS"))
    else:
        rejudge(capsys)
        change_json(judged(case) / "decision.json", verdict="BLOCK")
    before = log.read_bytes()
    code, told = rejudge(capsys)
    assert code == 2 and message in told["error"] and log.read_bytes() == before


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("gate: {min_clean_accuracy: 1.5}", "gate.min_clean_accuracy = 1.5: input should be less than or equal to 1"),
        ("gate: {min_clean_accuracy: .nan}", "gate.min_clean_accuracy = nan"),
        ("gate: {min_clean_accuracy: 0.9, max_exces_asr: 0.1}", "did you mean 'max_excess_asr'?"),
        ("gate: {max_excess_asr: 0.1}", "'gate.min_clean_accuracy' is required and missing"),
        ("min_clean_accuracy: 0.9", "'gate' is required and missing"),
        ("[1", "not readable as YAML"),
        (None, "--policy policy.yaml: no such file"),
    ],
)
def test_a_policy_that_cannot_be_is_told_in_one_line(
    case: Case, capsys: pytest.CaptureFixture[str], policy: str | None, message: str
) -> None:
    if policy is not None:
        Path("policy.yaml").write_text(policy)
    code, _, err = cbd(capsys, "gate", "run-1", "--policy", "policy.yaml", "--workspace", "w")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (case.workspace / "runs" / "run-1" / "judged").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run-1", "--policy", "lax.yaml", "--data", "d", "--out", "o"], "leave out --data, --out"),
        (["run-1", "--policy", "lax.yaml", "--params", "lax.yaml"], "leave out --params"),
        (["w/run-1/model", "--policy", "lax.yaml"], "is a model bundle, --policy expects a RUN"),
        (["run-2", "--policy", "lax.yaml"], "run-2: no such run; the latest in w is run-1"),
        (["run-1"], "--data, --trusted, --validation, --evaluation, --out missing"),
        (["w/run-1/model", "--data", "d"], "--trusted, --validation, --evaluation, --out missing"),
    ],
)
def test_the_two_forms_of_the_command_are_not_mixed(
    case: Case, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _, err = cbd(capsys, "gate", *arguments, "--workspace", "w")
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_model_is_still_judged_by_hand(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    root = case.workspace / "run-1"
    given = [f"--{name}={root / folder}" for name, folder in (("data", "dataset"), ("trusted", "trusted_set"))]
    given += [f"--{name}={root / name}" for name in ("validation", "evaluation", "scan")]
    code, out, _ = cbd(capsys, "gate", str(root / "model"), *given, "--out=o", "--params=lax.yaml", "--workspace=w", "--json")
    assert code == 0 and json.loads(out)["verdict"] == "PASS"
    assert read_decision(Path("o"), case.workspace).content["run_id"] == "by-hand-o"
