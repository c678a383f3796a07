"""The signed decision: it is about exactly the artifacts it names, and no byte of it can change unseen."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from decided_case import POLICY, change_json, make_bundle, make_case, swap

from cbd.audit import verify_log
from cbd.bundle import bundle_digest
from cbd.config import canonical_json
from cbd.errors import ConfigError, DataError
from cbd.keys import ensure_key, sign
from components.decide import Subject, decide, decide_step, refuse_step
from components.decision import read_decision

Make = Callable[..., dict[str, Any]]


def artifact(path: Path | None) -> SimpleNamespace:
    return SimpleNamespace(path=str(path))


def test_a_decision_says_what_was_judged_and_stands_in_the_log(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    told = case.decide()
    signed = read_decision(case.decision, tmp_path)
    assert told["verdict"] == "PASS" and signed.digest == told["decision_digest"]
    assert signed.content["digests"]["model"] == bundle_digest(case.bundle)
    assert signed.content["policy"] == POLICY.model_dump(mode="json") and signed.content["run_id"] == "run-1"
    assert (case.decision / "decision.json").read_bytes() == canonical_json(signed.content)
    entry = verify_log(tmp_path / "audit.jsonl")[-1]
    assert entry["event"] == "decision" and entry["data"]["decision_digest"] == signed.digest and entry["data"]["verdict"] == "PASS"


def test_validation_alone_gives_a_signed_block(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    change_json(case.subject.validation / "validation.json", passed=False, critical=["class count"])
    subject = Subject(case.subject.dataset, case.subject.trusted_set, case.subject.validation)
    told = decide(subject, case.decision, policy=POLICY, workspace=tmp_path, run_id="run-1")
    content = read_decision(case.decision, tmp_path).content
    assert told["verdict"] == "BLOCK" and content["digests"]["model"] is None and content["digests"]["evaluation"] is None


@pytest.mark.parametrize("key", ["model_digest", "data_digest", "trusted_digest"])
def test_an_evaluation_of_something_else_is_refused(tmp_path: Path, make_evaluation: Make, key: str) -> None:
    case = make_case(tmp_path, make_evaluation, **{key: "f" * 64})
    with pytest.raises(DataError, match=f"measured {key.partition('_')[0]}"):
        case.decide()
    assert not case.decision.exists() and verify_log(tmp_path / "audit.jsonl") == []


@pytest.mark.parametrize("key", ["data_digest", "trusted_digest"])
def test_a_validation_of_something_else_is_refused(tmp_path: Path, make_evaluation: Make, key: str) -> None:
    case = make_case(tmp_path, make_evaluation)
    for other in ("f" * 64, None):
        change_json(case.subject.validation / "validation.json", **{key: other})
        with pytest.raises(DataError, match=f"validated {key.partition('_')[0]}"):
            case.decide()


def test_an_altered_shard_that_validation_refused_is_a_signed_block(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    shard = next(case.subject.dataset.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    change_json(case.subject.validation / "validation.json", passed=False, critical=["shard"], data_digest=None, trusted_digest=None)
    subject = Subject(case.subject.dataset, case.subject.trusted_set, case.subject.validation)
    assert decide(subject, case.decision, policy=POLICY, workspace=tmp_path, run_id="run-1")["verdict"] == "BLOCK"


def test_another_model_than_the_measured_one_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case, other = make_case(tmp_path, make_evaluation), make_case(tmp_path, make_evaluation, run_id="run-2", weight=2.0)
    swap(case.bundle, other.bundle)
    with pytest.raises(DataError, match="measured model"):
        case.decide()


def test_altered_weights_and_altered_data_are_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    shard = next(case.subject.dataset.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="shard-00000"):
        case.decide()
    case = make_case(tmp_path, make_evaluation, run_id="run-2")
    (case.bundle / "model.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="altered|measured model"):
        case.decide()


def test_a_model_of_other_data_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    bundle = make_bundle(tmp_path / "elsewhere", "e" * 64)
    swap(case.bundle, bundle)
    assert case.subject.evaluation is not None
    change_json(case.subject.evaluation / "evaluation.json", model_digest=bundle_digest(bundle))
    with pytest.raises(DataError, match="trained on data eeeeeeeeeeee"):
        case.decide()


def test_a_confounder_is_never_decided_on(tmp_path: Path, make_evaluation: Make) -> None:
    with pytest.raises(DataError, match="confounder"):
        make_case(tmp_path, make_evaluation, kind="confounder").decide()


def test_a_trial_is_known_from_the_data_and_not_from_an_option(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation, trial=True)
    assert case.decide()["trial"] is True and "no alias is set" in read_decision(case.decision, tmp_path).content["sentence"]


@pytest.mark.parametrize("content", ["", "[]", "nonsense", '{"schema_version": 1}'])
def test_a_broken_evaluation_leaves_no_decision(tmp_path: Path, make_evaluation: Make, content: str) -> None:
    case = make_case(tmp_path, make_evaluation)
    assert case.subject.evaluation is not None
    (case.subject.evaluation / "evaluation.json").write_text(content)
    with pytest.raises(DataError) as caught:
        case.decide()
    assert "\n" not in str(caught.value) and not case.decision.exists()


def test_a_missing_evaluation_file_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    assert case.subject.evaluation is not None
    (case.subject.evaluation / "evaluation.json").unlink()
    with pytest.raises(DataError, match="expected evaluation.json there"):
        case.decide()


def test_an_edited_decision_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation, turned={"white-centre": (1, 600)})
    assert case.decide()["verdict"] == "BLOCK"
    path = case.decision / "decision.json"
    path.write_bytes(path.read_bytes().replace(b'"verdict":"BLOCK"', b'"verdict":"PASS"'))
    with pytest.raises(DataError, match="signature"):
        read_decision(case.decision, tmp_path)


def test_an_unsigned_decision_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    case.decide()
    (case.decision / "decision.sig").unlink()
    with pytest.raises(DataError, match="unsigned"):
        read_decision(case.decision, tmp_path)


def test_a_decision_of_another_workspace_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    mine, other = make_case(tmp_path / "mine", make_evaluation), make_case(tmp_path / "other", make_evaluation)
    mine.decide()
    other.decide()
    with pytest.raises(DataError, match="signature is not this workspace's key"):
        read_decision(other.decision, tmp_path / "mine")


def test_a_signed_decision_that_the_log_does_not_name_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    """Somebody had the key for a moment, but not the log."""
    case = make_case(tmp_path, make_evaluation)
    case.decide()
    forged = json.loads((case.decision / "decision.json").read_text()) | {"created": "2020-01-01T00:00:00Z"}
    (case.decision / "decision.json").write_bytes(canonical_json(forged))
    (case.decision / "decision.sig").write_text(sign(canonical_json(forged), ensure_key(tmp_path)))
    with pytest.raises(DataError, match="names no decision"):
        read_decision(case.decision, tmp_path)


def test_the_step_returns_the_bare_verdict_and_records(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    named = {name: artifact(getattr(case.subject, name)) for name in ("dataset", "trusted_set", "validation", "evaluation", "model")}
    named |= {"canary": artifact(tmp_path / "no-canary"), "scanned": artifact(case.subject.scan)}
    common = {"records": str(tmp_path / "records"), "workspace": str(tmp_path), "run_id": "run-1", "decision": artifact(case.decision)}
    policy = {"min_clean_accuracy": 0.9, "min_images": 300.0, "warn_images": 1000.0, "null_members": 20.0}
    assert decide_step.python_func(policy=policy, **named, **common) == "PASS"
    record = json.loads((tmp_path / "records" / "decide.json").read_text())
    assert record["outputs"]["verdict"] == "PASS" and record["outputs"]["paths"] == {"decision": str(case.decision)}
    with pytest.raises(ConfigError, match="min_images"):
        decide_step.python_func(policy={**policy, "min_imagse": 300}, **named, **common)


def test_the_refusing_step_blocks_under_the_same_record_name(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    change_json(case.subject.validation / "validation.json", passed=False, critical=["x"])
    named = {name: artifact(getattr(case.subject, name)) for name in ("dataset", "trusted_set", "validation")}
    common = {"records": str(tmp_path / "records"), "workspace": str(tmp_path), "run_id": "run-1", "decision": artifact(case.decision)}
    assert refuse_step.python_func(policy={"min_clean_accuracy": 0.9}, **named, **common) == "BLOCK"
    assert json.loads((tmp_path / "records" / "decide.json").read_text())["outputs"]["verdict"] == "BLOCK"
