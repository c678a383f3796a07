"""The canary for real, on a tiny data set: planted, trained, measured, kept in the log, used again, and never believed unlogged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from decided_case import make_case

from cbd.attest import digests_in, unseal
from cbd.audit import LOG, append, verify_log
from cbd.bundle import bundle_digest
from cbd.config import Canary, Confounder, Deconfounded, Gate, Params
from cbd.dataset import make_row, read_info, to_batches, write_dataset
from cbd.errors import DataError
from cbd.files import sha256_file, write_json
from cbd.heads import read_log
from cbd.images import encode_png
from cbd.keys import ensure_key
from cbd.measurements import read_canary
from components.attempts import number_attempt
from components.canary import CANARY, KEPT, canary, canary_recorded, logged
from components.canary import _keep as keep
from components.registry import versions
from components.train_undefended import train_undefended_step
from pipelines.demo import load_scans

Make = Callable[..., dict[str, Any]]
PARAMS = Params(
    gate=Gate(min_clean_accuracy=0),
    confounder=Confounder(steps=8, max_epochs=1, batch_size=16),
    deconfounded=Deconfounded(epochs=1, batch_size=16),
    canary=Canary(every=3, min_images=6),
)
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_one_thread")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dataset` (90 scans of three digits) and `trusted_set` (30 others)."""
    images, labels = load_scans()
    folder = tmp_path_factory.mktemp("sets")
    for name, chosen in (("dataset", slice(0, 30)), ("trusted_set", slice(30, 40))):
        rows = [
            make_row(encode_png(images[index]), label=label, original_path=f"{index}.png", source="acme")
            for label in range(3)
            for index in np.flatnonzero(labels == label)[chosen]
        ]
        write_dataset(folder / name, to_batches(rows), class_names=("0", "1", "2"), supplier="acme")
    return folder


def rehearse(sets: Path, workspace: Path, *, run_id: str = "run-1", out: str = "out", **changes: Any) -> tuple[dict[str, Any], Path]:
    params = PARAMS.model_copy(update={"canary": PARAMS.canary.model_copy(update=changes)})
    place = workspace / out
    told = canary(sets / "dataset", sets / "trusted_set", place, params=params, workspace=workspace, run_id=run_id)
    return told, place / CANARY


@pytest.fixture(scope="module")
def rehearsed(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one canary was trained."""
    workspace = tmp_path_factory.mktemp("workspace")
    told, file = rehearse(sets, workspace)
    assert not told["reused"] and told["canary_sha256"] == sha256_file(file)
    return workspace


@pytest.fixture
def workspace(rehearsed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(rehearsed, tmp_path / "workspace", symlinks=True)


def test_a_canary_is_measured_versioned_and_named_in_the_log(sets: Path, rehearsed: Path) -> None:
    found = read_canary(json.loads((rehearsed / "out" / CANARY).read_text()))
    assert [planted.family for planted in found.families] == ["sinusoid", "patch", "blend", "warp"]
    assert all(planted.num_poisoned == 6 for planted in found.families)
    assert found.data_digest == read_info(sets / "dataset").digest != found.canary_digest and found.num_images == 90
    assert found.false_suspects.n == 90 - 4 * 6 - 2 * 6  # warp has two covers for each of its own
    assert logged(rehearsed, sha256_file(rehearsed / "out" / CANARY))
    assert found.tag in {tag for tag, _ in versions(rehearsed)} and found.tag.startswith("canary/")


def test_a_young_canary_is_used_again_and_an_old_one_is_not(sets: Path, workspace: Path) -> None:
    told, file = rehearse(sets, workspace, run_id="run-2", out="again")
    assert told["reused"] and json.loads(file.read_text())["run_id"] == "run-1"
    for _ in range(2):
        append(workspace, "decision", {"trial": False})
    assert rehearse(sets, workspace, out="third")[0]["reused"]
    append(workspace, "decision", {"trial": False})
    assert not rehearse(sets, workspace, out="fourth")[0]["reused"]


@pytest.mark.parametrize("changes", [{"every": 1}, {"families": ("patch", "blend")}])
def test_another_configuration_has_a_canary_of_its_own(sets: Path, workspace: Path, changes: dict[str, Any]) -> None:
    assert not rehearse(sets, workspace, out="other", **changes)[0]["reused"]


def test_another_trusted_set_has_a_canary_of_its_own(sets: Path, workspace: Path) -> None:
    place = workspace / "other"
    about = {"params": PARAMS, "workspace": workspace, "run_id": "run-2"}
    assert not canary(sets / "dataset", sets / "dataset", place, **about)["reused"]
    found = read_canary(json.loads((place / CANARY).read_text()))
    assert found.trusted_digest == read_info(sets / "dataset").digest


def test_a_step_that_writes_its_result_again_leaves_one_line_in_the_log(tmp_path: Path) -> None:
    named = {"config_sha256": "c" * 64, "data_digest": "d" * 64, "run_id": "r"}
    kept = [keep(tmp_path, named, {"families": []}) for _ in range(2)]
    keep(tmp_path, {**named, "run_id": "other"}, {"families": []})
    assert kept[0] == kept[1]
    assert [entry["data"]["run_id"] for entry in read_log(tmp_path)] == ["r", "other"]


def test_without_a_canary_there_is_no_file_and_no_entry(sets: Path, tmp_path: Path) -> None:
    told, file = rehearse(sets, tmp_path, every=0)
    assert told == {"reused": False, "canary_sha256": None} and not file.exists() and file.parent.is_dir()
    assert not (tmp_path / LOG).exists()


def test_a_kept_result_that_was_altered_is_not_used_again(sets: Path, workspace: Path) -> None:
    (kept,) = (workspace / KEPT).iterdir()
    kept.write_text(kept.read_text().replace('"every"', '"evrey"') + " ")
    assert not rehearse(sets, workspace, out="again")[0]["reused"]


def test_a_canary_that_the_log_does_not_name_is_refused(tmp_path: Path, make_evaluation: Make, make_canary: Make) -> None:
    from dataclasses import replace

    case = make_case(tmp_path, make_evaluation)
    write_json(tmp_path / "forged" / CANARY, make_canary())
    ensure_key(tmp_path)
    with pytest.raises(DataError, match="is not in the log of .*: it was altered"):
        replace(case, subject=replace(case.subject, canary=tmp_path / "forged")).decide()


def test_a_canary_that_was_measured_on_another_trusted_set_is_refused(tmp_path: Path, make_evaluation: Make, make_canary: Make) -> None:
    from dataclasses import replace

    case = make_case(tmp_path, make_evaluation)
    write_json(tmp_path / "other" / CANARY, {**make_canary(), "trusted_digest": "e" * 64})
    told = {"sha256": sha256_file(tmp_path / "other" / CANARY), "config_sha256": "0" * 64, "run_id": "r"}
    append(tmp_path, "canary", told)
    with pytest.raises(DataError, match="measured trusted set 'eeeeeeeeeeee'"):
        replace(case, subject=replace(case.subject, canary=tmp_path / "other")).decide()


def test_attempts_are_counted_from_the_log_and_the_same_again_is_none(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path, make_evaluation)
    assert case.decide()["verdict"] == "PASS"
    (entry,) = (entry["data"] for entry in verify_log(tmp_path / LOG) if entry["event"] == "decision")
    policy = Gate(min_clean_accuracy=0.9)
    assert entry["attempt"]["number"] == 1
    shutil.rmtree(case.decision)
    about = (tmp_path, case.bundle, entry["digests"])
    assert number_attempt(*about, policy) == entry["attempt"]
    other = policy.model_copy(update={"confidence": 0.9})
    assert number_attempt(*about, other)["number"] == 2
    assert number_attempt(tmp_path, case.bundle, {**entry["digests"], "data": "0" * 64}, other)["number"] == 1


def attested(workspace: Path, step: str) -> dict[str, Any]:
    """What a step of run-2 attested."""
    data = (workspace / "runs" / "run-2" / "attestations" / f"{step}.json").read_bytes()
    return unseal(data, [ensure_key(workspace).public_key()], told=step)


def test_the_steps_attest_a_canary_that_is_used_again_and_an_undefended_model(sets: Path, workspace: Path, mlflow_template: Path) -> None:
    shutil.copyfile(mlflow_template, workspace / "mlflow.db")
    run, sections = workspace / "runs" / "run-2", PARAMS.model_dump(mode="json")
    records, data = str(run / "records"), read_info(sets / "dataset").digest
    about = {"seed": PARAMS.seed, "preset": PARAMS.preset, "model": sections["model"], "canary": sections["canary"]}
    about["sections"] = {name: sections[name] for name in ("confounder", "deconfounded")}
    places = (str(sets / "dataset"), str(sets / "trusted_set"), str(run / "canary"))
    canary_recorded(records, places, about, workspace=str(workspace), run_id="run-2")
    told = attested(workspace, "canary")
    assert digests_in(told["subject"]) == {CANARY: sha256_file(run / "canary" / CANARY)}
    made = told["predicate"]["buildDefinition"]
    assert made["externalParameters"]["trained_by"] == "run-1" and digests_in(made["resolvedDependencies"])["dataset"] == data
    given = {
        "seed": PARAMS.seed,
        "preset": PARAMS.preset,
        "model_params": sections["model"],
        "training": sections["training"],
        "deconfounded_params": sections["deconfounded"],
    }
    artifacts = {"dataset": SimpleNamespace(path=str(sets / "dataset")), "model": SimpleNamespace(path=str(run / "undefended"))}
    step = {"records": records, "workspace": str(workspace), "run_id": "run-2"}
    train_undefended_step.python_func(**step, enabled=True, **given, **artifacts)
    told = attested(workspace, "train_undefended")
    assert digests_in(told["subject"]) == {"model": bundle_digest(run / "undefended")}
    assert digests_in(told["predicate"]["buildDefinition"]["resolvedDependencies"])["dataset"] == data
