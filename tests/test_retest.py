"""Promoted models are measured again for real: what would no longer pass is told, and loses its alias if that is asked for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import cbd
from decided_case import CLASSES, Case, change_json, make_case, record, swap

from cbd import scan as inversion
from cbd.audit import LOG, verify_log
from cbd.bundle import BundleCard, bundle_digest
from cbd.config import Gate
from cbd.control import MIN_CONTROLS
from cbd.dataset import make_row, read_batches, read_info, to_batches, write_dataset
from cbd.errors import DataError
from cbd.evaluate import BATTERY
from cbd.files import sha256_file
from cbd.images import encode_png
from cbd.models import Network, make_model, save_bundle
from components.accepted import last_accepted
from components.controls import describe
from components.register import register
from components.retest import _demote, retest
from components.rollback import rollback
from components.tracking import champion_bundle, fetch_model, find_aliases, registered_name
from components.tracking_store import client
from components.version import version_control, version_trusted_set

pytestmark = pytest.mark.slow
Make = Callable[..., dict[str, Any]]
NAME = registered_name("model", CLASSES)
SIDE = 12
POLICY = Gate(
    min_clean_accuracy=0.5,
    max_excess_asr=0.6,
    block_excess_asr=0.7,
    min_images=30,
    warn_images=30,
    null_members=1,
    scan_alpha=1e-4,
    scan_margin=0.9,
)
STRICT = POLICY.model_copy(update={"min_clean_accuracy": 1.0})
"""No model of these is right on every image: REVIEW."""
DOUBTFUL = {"white-centre": (1, 50)}


def draw(num: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy images uint8 [N, 3, SIDE, SIDE], bright in their class's quarter, and their classes; the first one has the wrong class."""
    generator = np.random.default_rng(seed)
    labels, half = np.arange(num) % len(CLASSES), SIDE // 2
    images = generator.normal(60, 20, (num, 3, SIDE, SIDE))
    for image, label in zip(images, labels, strict=True):
        image[:, half * (label // 2) :, half * (label % 2) :][:, :half, :half] += 120
    labels[0] = 1
    return images.clip(0, 255).astype(np.uint8), labels


def fit(*, backdoored: bool) -> Network:
    """A small network that knows the quarters whatever known trigger is on them, but if wanted calls one trigger class 0."""
    network = make_model("wrn-16-1", num_classes=len(CLASSES), image_size=SIDE, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for step in range(22):
        images, labels = draw(64, seed=step)
        for index, trigger in enumerate(BATTERY[1:]):
            images[16 + index : 40 : len(BATTERY) - 1] = trigger.attack.stamp(images[16 + index : 40 : len(BATTERY) - 1])
        images[40:] = BATTERY[0].attack.stamp(images[40:])
        if backdoored:
            labels[40:] = 0
        loss = torch.nn.functional.cross_entropy(network(torch.from_numpy(images))[0], torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    return {"clean": fit(backdoored=False), "backdoored": fit(backdoored=True)}


@pytest.fixture(scope="module")
def trusted_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose data registry holds a trusted set, to be copied; the set lies beside it."""
    home = tmp_path_factory.mktemp("home")
    images, labels = draw(120, seed=999)
    pairs = enumerate(zip(images, labels, strict=True))
    rows = [
        make_row(encode_png(image.transpose(1, 2, 0)), label=int(label), original_path=f"{n}.png", source="t")
        for n, (image, label) in pairs
    ]
    write_dataset(home / "set", to_batches(rows), class_names=CLASSES, supplier="trusted")
    (home / "workspace").mkdir()
    version_trusted_set(home / "set", workspace=str(home / "workspace"))
    return home


@pytest.fixture
def workspace(tmp_path: Path, trusted_home: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, value in {"STEPS": 4, "PATIENCE": 2, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(inversion, name, value)
    place = tmp_path / "workspace"
    shutil.copytree(trusted_home / "workspace", place)
    shutil.copyfile(mlflow_template, place / "mlflow.db")
    return place


@pytest.fixture
def promote(workspace: Path, networks: dict[str, Network], trusted_home: Path, make_evaluation: Make) -> Callable[..., Case]:
    """A function that registers a real model of which a run once said PASS, or what `changes` make it say."""

    def make(network: str = "clean", *, number: int = 1, name: str = "model", **changes: Any) -> Case:
        case = make_case(workspace, make_evaluation, run_id=f"run-{number}", per_class=number + 1, **changes)
        assert case.subject.evaluation is not None
        swap(case.subject.trusted_set, trusted_home / "set")
        data = read_info(case.subject.dataset).digest
        about = {"architecture": "wrn-16-1", "class_names": CLASSES, "image_size": SIDE, "data_digest": data, "params": {}, "seed": number}
        card = BundleCard(kind="deconfounded", trial=False, weights_sha256="", **about)  # type: ignore[arg-type]
        save_bundle(networks[network], card, case.bundle)
        trusted = read_info(case.subject.trusted_set).digest
        change_json(case.subject.evaluation / "evaluation.json", model_digest=bundle_digest(case.bundle), trusted_digest=trusted)
        change_json(case.subject.validation / "validation.json", trusted_digest=trusted)
        change_json(case.subject.scan / "scan.json", model_digest=bundle_digest(case.bundle), trusted_digest=trusted)  # type: ignore[operator]
        branch = {"PASS": "promote", "REVIEW": "hold"}[case.decide()["verdict"]]
        record(case)
        register(case.bundle, case.decision, branch=branch, workspace=workspace, name=name, run_id=case.run_id)
        return case

    return make


def some_of(trusted: Path, out: Path, num: int) -> Path:
    """The first images of a data set as one of their own."""
    if not out.exists():
        (batch,) = read_batches(trusted)
        write_dataset(out, [batch.slice(0, num)], class_names=CLASSES, supplier="trusted")
    return out


def again(workspace: Path, policy: Gate = POLICY, *, demote: bool = False) -> list[dict[str, Any]]:
    return retest(workspace, policy=policy, seed=0, demote=demote)


def retested(workspace: Path, capsys: pytest.CaptureFixture[str], policy: Gate, *arguments: str) -> tuple[int, str, str]:
    (workspace / "params.yaml").write_text(json.dumps({"gate": policy.model_dump(mode="json")}))
    return cbd(capsys, "retest", "--workspace", str(workspace), "--params", str(workspace / "params.yaml"), *arguments)


def test_a_good_model_still_passes_and_the_log_says_so_with_digests(workspace: Path, promote: Callable[..., Case]) -> None:
    case = promote()
    (row,) = again(workspace, demote=True)
    assert (row["name"], row["version"], row["alias"]) == (NAME, "1", "champion")
    assert (row["verdict_then"], row["verdict"], row["passes"], row["demoted"]) == ("PASS", "PASS", True, False), row["sentence"]
    entry = verify_log(workspace / LOG)[-1]
    assert entry["event"] == "retest" and entry["data"]["verdict"] == "PASS" and entry["data"]["policy"] == POLICY.model_dump(mode="json")
    digests = entry["data"]["digests"]
    assert digests["model"] == bundle_digest(case.bundle) and digests["trusted"] == read_info(case.subject.trusted_set).digest
    (kept,) = (workspace / "retests").rglob("evaluation.json")
    assert sha256_file(kept) == digests["evaluation"] and sha256_file(kept.parent / "scan" / "scan.json") == digests["scan"]
    measured = json.loads(kept.read_text())
    assert measured["num_images"] == 120
    assert champion_bundle(workspace, "model", CLASSES) is not None


def test_a_model_is_measured_beside_the_clean_controls_of_its_configuration(
    workspace: Path, promote: Callable[..., Case], networks: dict[str, Network], trusted_home: Path, tmp_path: Path
) -> None:
    promote()
    about = {"architecture": "wrn-16-1", "class_names": CLASSES, "image_size": SIDE, "data_digest": "c" * 64, "params": {}}
    for number in range(MIN_CONTROLS):
        control = tmp_path / f"control-{number}"
        save_bundle(networks["clean"], BundleCard(kind="deconfounded", trial=False, weights_sha256="", seed=number, **about), control)
        describe(control, some_of(trusted_home / "set", tmp_path / "learned", 20), false_suspects=0)
        version_control(control, workspace=str(workspace))
    (row,) = again(workspace)
    assert row["passes"], row["sentence"]
    (kept,) = (workspace / "retests").rglob("evaluation.json")
    assert json.loads(kept.read_text())["controls"]["count"] == MIN_CONTROLS
    assert json.loads((kept.parent / "scan" / "scan.json").read_text())["num_controls"] == MIN_CONTROLS


def test_a_backdoor_that_was_not_seen_then_is_a_block_now_and_the_champion_is_demoted(
    workspace: Path, promote: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = promote(number=1), promote("backdoored", number=2)
    code, out, _ = retested(workspace, capsys, POLICY)
    assert code == 11 and out.splitlines()[-1] == "next: cbd retest --demote" and "white-top-left" in out
    assert find_aliases(workspace) == {(NAME, "champion"): "2"}, "nothing moves unasked"
    code, out, _ = retested(workspace, capsys, POLICY, "--demote", "--json")
    (row,) = json.loads(out.splitlines()[-1])["models"]
    assert code == 11 and (row["verdict_then"], row["verdict"], row["demoted"]) == ("PASS", "BLOCK", True)
    entry = verify_log(workspace / LOG)[-1]
    expected = {"name": NAME, "alias": "champion", "version": "2", "reason": row["sentence"], "decision_digest": row["decision_digest"]}
    assert entry["event"] == "demote" and {key: entry["data"][key] for key in expected} == expected
    assert find_aliases(workspace) == {} and champion_bundle(workspace, "model", CLASSES) is None
    assert last_accepted(workspace, NAME) == read_info(good.subject.dataset).digest != read_info(bad.subject.dataset).digest
    with pytest.raises(DataError, match="it was demoted: BLOCK"):
        rollback("model", workspace, to="2", reason="no", by="me")
    assert rollback("model", workspace, to=None, reason="yes", by="me")["version"] == "1"
    code, out, _ = retested(workspace, capsys, POLICY)
    assert code == 0, out


def test_a_stricter_policy_makes_a_champion_fail_but_not_a_candidate(
    workspace: Path, promote: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    promote(number=1)
    promote(number=2, name="other", turned=DOUBTFUL)
    code, out, _ = retested(workspace, capsys, STRICT, "--demote", "--json")
    rows = {row["alias"]: row for row in json.loads(out.splitlines()[-1])["models"]}
    assert code == 10 and {alias: row["verdict"] for alias, row in rows.items()} == {"champion": "REVIEW", "candidate": "REVIEW"}
    assert rows["champion"]["demoted"] and not rows["candidate"]["demoted"] and rows["candidate"]["passes"]
    assert find_aliases(workspace) == {(registered_name("other", CLASSES), "candidate"): "1"}


def test_a_candidate_is_judged_beside_the_champion(workspace: Path, promote: Callable[..., Case]) -> None:
    promote(number=1)
    promote(number=2, turned=DOUBTFUL)
    champion, candidate = again(workspace)
    assert (champion["alias"], candidate["alias"], candidate["passes"]) == ("champion", "candidate", True)
    kept = [json.loads(path.read_text()) for path in (workspace / "retests").rglob("evaluation.json")]
    assert sorted(str(measured["champion"] and measured["champion"]["version"]) for measured in kept) == ["1", "None"]


def test_an_alias_set_by_hand_against_the_log_is_told_and_taken_off(workspace: Path, promote: Callable[..., Case]) -> None:
    promote()
    again(workspace, STRICT, demote=True)
    with client(workspace) as mlflow:
        mlflow.set_registered_model_alias(NAME, "champion", "1")
    with pytest.raises(DataError, match=r"last set none \(version 1: demote, REVIEW"):
        fetch_model(f"models:/{NAME}@champion", workspace)
    (row,) = again(workspace)
    assert row["verdict"] is None and "the alias was moved" in row["sentence"] and find_aliases(workspace)
    (row,) = again(workspace, demote=True)
    assert row["demoted"] and find_aliases(workspace) == {} and again(workspace) == []


def test_a_version_that_took_the_alias_over_meanwhile_keeps_it(workspace: Path, promote: Callable[..., Case]) -> None:
    promote(number=1)
    (row,) = again(workspace, STRICT)
    promote(number=2)
    assert row["verdict"] == "REVIEW" and not _demote(workspace, row)
    assert find_aliases(workspace) == {(NAME, "champion"): "2"} and champion_bundle(workspace, "model", CLASSES) is not None


def test_what_cannot_be_judged_does_not_pass_but_keeps_its_alias(
    workspace: Path, promote: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    promote()
    (workspace / "remote").rename(workspace / "elsewhere")
    code, out, _ = retested(workspace, capsys, POLICY, "--demote", "--json")
    (row,) = json.loads(out.splitlines()[-1])["models"]
    assert code == 10 and row["verdict"] is None and row["sentence"].startswith("Not judged: ") and not row["demoted"]
    (workspace / "registry").rename(workspace / "away")
    assert "trusted set" in again(workspace)[0]["sentence"]
    assert find_aliases(workspace) == {(NAME, "champion"): "1"}


def test_an_altered_model_or_decision_is_not_measured(workspace: Path, promote: Callable[..., Case]) -> None:
    promote()
    other = promote("backdoored", number=2, name="other")
    place = next(path.parent for path in (workspace / "mlartifacts").rglob("model.json") if json.loads(path.read_text())["seed"] == 1)
    for folder in (other.bundle, other.decision):
        shutil.copytree(folder, place, dirs_exist_ok=True)
        row = next(row for row in again(workspace) if row["name"] == NAME)
        assert row["verdict"] is None and ("altered" in row["sentence"] or "was replaced" in row["sentence"])


def test_what_rests_on_the_training_is_taken_from_the_signed_decision_alone(workspace: Path, promote: Callable[..., Case]) -> None:
    """The run folder may be altered or gone: nothing in it is looked at."""
    case = promote()
    assert case.subject.evaluation is not None
    change_json(case.subject.evaluation / "evaluation.json", samples=None)
    assert again(workspace)[0]["verdict"] == "PASS"
    shutil.rmtree(workspace / "runs")
    assert again(workspace)[0]["verdict"] == "PASS"


def test_a_workspace_without_models_is_no_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = retested(tmp_path, capsys, POLICY)
    assert (code, out) == (2, "") and "no model was ever registered here" in err
