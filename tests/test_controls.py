"""Clean controls: built, kept, found for a candidate of their configuration, measured on images they never saw, and what the gate says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delivery_files import png
from harmless_scan import SCAN

from cbd.bundle import BundleCard, bundle_digest, read_card
from cbd.config import Confounder, Deconfounded, Gate, load_params
from cbd.control import TRAINED_ON, config_digest, record_of, trained_on
from cbd.dataset import make_row, read_manifest, to_batches, write_dataset
from cbd.errors import DataError
from cbd.evaluate import run_battery
from cbd.gate import decide
from cbd.measurements import read_evaluation
from cbd.models import make_model, save_bundle
from cbd.rates import rate
from cbd.scan import split
from components.controls import build, describe, find_controls, loaded
from components.evaluate import Compared, evaluate
from components.registry import fetch
from components.scan import scan_run
from components.train_confounder import train_confounder
from components.train_deconfounded import train_deconfounded
from components.version import version_control
from pipelines.cli import cbd

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_one_thread")]
Make = Callable[..., dict[str, Any]]
CLASSES = ("ant", "bee", "cow")
SECTIONS: dict[str, Any] = {"model": {"image_size": 16}, "confounder": {"steps": 2}, "deconfounded": {"epochs": 1}}
POLICY = Gate(min_clean_accuracy=0.5, confidence=0.9, min_images=20, max_excess_asr=0.01, null_members=1)
VALID = {"passed": True, "critical": [], "warnings": []}


def dataset(folder: Path, num: int, *, first: int = 0, classes: tuple[str, ...] = CLASSES, trial: bool = False) -> Path:
    rows = (make_row(png(first + i), label=i % len(classes), original_path=f"{i:03}.png", source="acme") for i in range(num))
    write_dataset(folder, to_batches(rows), class_names=classes, supplier="acme", trial=trial)
    return folder


def bundle(folder: Path, seed: int, **changes: Any) -> Path:
    about = {"kind": "deconfounded", "architecture": "wrn-16-1", "class_names": CLASSES, "image_size": 16, "data_digest": "0" * 64}
    card = BundleCard(**{**about, "params": SECTIONS, "seed": seed, "trial": False, "weights_sha256": "", **changes})
    generator = torch.Generator().manual_seed(seed)
    model = make_model("wrn-16-1", num_classes=len(card.class_names), image_size=card.image_size, generator=generator)
    save_bundle(model, card, folder)
    return folder


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A workspace and its controls' tags; in a folder with a trusted set of 60 images, candidates and a confounder. Not to be changed.

    Five controls match, each trained on the first 20 trusted images; four others do not.
    """
    folder = tmp_path_factory.mktemp("stocked")
    dataset(folder / "trusted", 60)
    learned = dataset(folder / "learned", 20)
    bundle(folder / "model", 100, data_digest="d" * 64)
    bundle(folder / "confounder", 101, kind="confounder")
    bundle(folder / "other", 102, data_digest="e" * 64, params={**SECTIONS, "confounder": {"steps": 3}})
    others: list[dict[str, Any]] = [
        {"class_names": ("ant", "bee", "dog")},
        {"image_size": 8},
        {"params": {**SECTIONS, "confounder": {"steps": 3}}},
        {"data_digest": "d" * 64},
    ]
    tags = []
    for number, changes in enumerate([{}] * 5 + others):
        control = bundle(folder / f"control-{number}", number, **changes)
        describe(control, learned, false_suspects=number)
        tags.append(version_control(control, workspace=str(folder / "ws"), date="2026-01-31")["tag"])
    unknown = bundle(folder / "unknown", 50)
    tags.append(version_control(unknown, workspace=str(folder / "ws"), date="2026-01-31")["tag"])
    return folder, tags


def found(folder: Path, out: Path, *, workspace: Path | None = None, **changes: Any) -> Any:
    about = {"model": folder / "model", "trusted_set": folder / "trusted", "min_images": 20}
    return find_controls(workspace or folder / "ws", out, **{**about, **changes})


def test_only_controls_of_the_candidates_classes_size_and_configuration_are_used_and_the_others_are_told(
    stocked: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, tags = stocked
    controls = found(folder, tmp_path)
    assert {bundle_digest(one) for one in controls.bundles} == {bundle_digest(folder / f"control-{number}") for number in range(5)}
    assert list(controls.unused) == tags[5:]
    for tag, said in zip(
        tags[5:],
        ("expected ['ant', 'bee', 'cow']", "8 pixels, expected wrn-16-1 at 16", "configuration", "own data", "was not made by"),
        strict=True,
    ):
        assert said in controls.unused[tag]


def test_too_few_controls_or_images_that_they_never_saw_compare_nothing(stocked: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, tags = stocked
    few = found(folder, tmp_path / "few", model=folder / "other")
    assert few.bundles == [] and few.unused[tags[7]] == "one of 1 that match, expected at least 5"
    assert found(folder, tmp_path / "all", min_images=80).bundles
    seen = found(folder, tmp_path / "seen", min_images=81)
    assert seen.bundles == [] and seen.unused[tags[0]] == "only 40 trusted images that it was not trained on, expected at least 41"
    assert found(folder, tmp_path / "none", workspace=tmp_path / "none") == ([], {})


@pytest.mark.parametrize("name", ["model.safetensors", TRAINED_ON])
def test_a_tampered_control_is_refused_by_name(stocked: tuple[Path, list[str]], tmp_path: Path, name: str) -> None:
    folder, tags = stocked
    shutil.copytree(folder / "ws", tmp_path / "ws")
    told = (folder / "control-0" / name).read_bytes()
    for path in (path for path in (tmp_path / "ws" / "remote").rglob("*") if path.is_file() and path.read_bytes() == told):
        path.chmod(0o644)
        path.write_bytes(told[:-2] + bytes([told[-2] ^ 1]) + told[-1:])
    with pytest.raises(DataError, match=r"^control/2026-01-31/[0-9a-f]+: .*altered") as refused:
        found(folder, tmp_path / "out", workspace=tmp_path / "ws")
    assert any(tag in str(refused.value) for tag in tags[:5])


def test_a_list_of_training_images_that_differs_from_the_card_is_refused(tmp_path: Path) -> None:
    control = bundle(tmp_path / "control", 0)
    assert trained_on(control) == frozenset()
    describe(control, dataset(tmp_path / "learned", 6), false_suspects=0)
    assert len(trained_on(control)) == 6
    (control / TRAINED_ON).write_text("")
    with pytest.raises(DataError, match=r"trained-on\.txt: altered"):
        trained_on(control)
    (control / TRAINED_ON).unlink()
    with pytest.raises(DataError, match=r"trained-on\.txt: missing"):
        trained_on(control)


class Corner(torch.nn.Module):
    """Says class 0 where the bottom-right pixel is white, else the class that the top-left red value names."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = images[:, 0, 0, 0].long() % 3
        white = (images[:, 0, -1, -1] == 255) & (images[:, 1, 0, 0] == 0)
        return torch.nn.functional.one_hot(torch.where(white, torch.zeros_like(named), named), 3).float(), torch.zeros(len(images), 1)


def test_the_null_is_what_the_trigger_does_to_a_control_on_images_that_it_never_saw() -> None:
    """The green top-left value keeps a control from the trigger: of class 1 and 2 it turns 20 of 80 images seen and unseen, none unseen."""
    labels = np.array([0, 1, 2] * 40)
    images = np.zeros((120, 3, 16, 16), np.uint8)
    images[:, 0, 0, 0] = labels
    candidate: Any = Corner()
    images[30:, 1, 0, 0] = 1
    about = {"num_classes": 3, "limit": 0.12, "null_members": 2, "seed": 0}  # 0 of 80 is at most 10.9 % at 99.99 % confidence
    everything, held_out = np.ones(120, bool), np.arange(120) >= 30

    def row(unseen: np.ndarray) -> dict[str, Any]:
        controls = [(candidate, held_out)] * 4 + [(candidate, unseen)]
        return {row["trigger"]: row for row in run_battery(candidate, images, labels, controls=controls, **about)}["white-bottom-right"]

    assert (row(everything)["null"], row(everything)["null_members"], row(everything)["null_controls"]) == (20 / 80, None, 5)
    assert row(held_out)["null"] == 0.0
    battery = {row["trigger"]: row for row in run_battery(candidate, images, labels, controls=[(candidate, everything)] * 5, **about)}
    assert (battery["white-centre"]["null"], battery["white-centre"]["null_controls"]) == (None, None)
    plain = {row["trigger"]: row for row in run_battery(candidate, images, labels, **about)}["white-bottom-right"]
    assert (plain["null_members"], plain["null_controls"]) == (2, None)


def test_an_evaluation_beside_controls_is_what_the_gate_reads(stocked: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = stocked
    controls, trusted = found(folder, tmp_path / "controls").bundles, folder / "trusted"
    (_, unseen), *_ = loaded(controls, trusted)
    assert unseen.tolist() == [False] * 20 + [True] * 40
    evaluate(folder / "model", trusted, tmp_path / "out", policy=POLICY, compared=Compared(controls=controls), seed=0)
    measured = read_evaluation(json.loads((tmp_path / "out" / "evaluation.json").read_text()))
    assert measured.controls is not None
    assert (measured.controls.count, measured.controls.false_suspects.k, measured.controls.false_suspects.n) == (5, 10, 100)
    assert {trigger.null_controls for trigger in measured.battery} == {5} and all(t.null is not None for t in measured.battery)
    evaluate(folder / "model", trusted, tmp_path / "alone", policy=POLICY, compared=Compared(), seed=0)
    alone = read_evaluation(json.loads((tmp_path / "alone" / "evaluation.json").read_text()))
    assert alone.controls is None and {trigger.null_members for trigger in alone.battery} == {1}


def test_a_scan_counts_the_controls_that_match(stocked: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 4, "PATIENCE": 2, "BATCH_SIZE": 2}.items():
        monkeypatch.setattr(f"cbd.scan.{name}", value)
    folder, _ = stocked
    paths = {"model": folder / "model", "confounder": folder / "confounder", "trusted_set": folder / "trusted"}
    scan_run(paths, tmp_path / "out", policy=POLICY.model_dump(mode="json"), seed=0, workspace=str(folder / "ws"))
    assert json.loads((tmp_path / "out" / "scan.json").read_text())["num_controls"] == 5


PARAMS = """
model: {image_size: 16}
confounder: {steps: 2, batch_size: 16, pilot: false, until_slow: false}
deconfounded: {epochs: 1, batch_size: 16}
gate: {min_clean_accuracy: 0.5}
"""


def test_controls_learn_from_half_of_the_trusted_set_and_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS)
    trusted = dataset(tmp_path / "trusted", 60)
    assert cbd.main(["controls", "build", "--trusted", "trusted", "--count", "2", "--json"], standalone_mode=False) == 0
    built = json.loads(capsys.readouterr().out.splitlines()[-1])["controls"]
    assert [row["seed"] for row in built] == [0, 1] and len({row["digest"] for row in built}) == 2
    workspace = tmp_path / "cbd-workspace"
    fetch(built[1]["tag"], tmp_path / "control", workspace=workspace)
    manifest = read_manifest(trusted)
    kept = ~split(manifest["sample_id"].to_pylist())
    assert trained_on(tmp_path / "control") == {manifest["pixel_digest"].to_pylist()[index] for index in np.flatnonzero(kept)}
    record = record_of(read_card(tmp_path / "control"))
    assert record is not None and record.num_images == kept.sum() == built[1]["num_images"]
    params = load_params(tmp_path / "params.yaml")
    assert config_digest(read_card(tmp_path / "control").params) == config_digest(params.model_dump(mode="json"))

    def today(*arguments: str) -> list[bool]:
        cbd.main(["controls", "list", "--json", *arguments], standalone_mode=False)
        return [row["today"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["controls"]]

    assert (today(), today("--seed", "7"), today("--epochs", "2")) == ([True] * 2, [True] * 2, [False] * 2)


def test_of_other_honest_images_controls_learn_but_what_is_in_the_trusted_set(tmp_path: Path) -> None:
    trusted, family = dataset(tmp_path / "trusted", 30), dataset(tmp_path / "family", 60, first=15)
    (tmp_path / "params.yaml").write_text(PARAMS)
    params = load_params(tmp_path / "params.yaml")
    (built,) = build(trusted, family, params=params, count=1, workspace=tmp_path / "ws")
    fetch(built["tag"], tmp_path / "control", workspace=tmp_path / "ws")
    own, seen = (set(read_manifest(one)["pixel_digest"].to_pylist()) for one in (trusted, family))
    assert trained_on(tmp_path / "control") == seen - own and len(seen & own) == 15


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trial": True}, "poisoned on purpose"),
        ({"classes": ("ant", "bee", "dog")}, "expected the trusted set's"),
        ({"num": 2, "first": 90}, "no image of class 'cow'"),
    ],
)
def test_what_no_control_can_learn_from_is_refused_before_any_training(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    family = dataset(tmp_path / "family", **{"num": 60, **changes})
    (tmp_path / "params.yaml").write_text(PARAMS)
    with pytest.raises(DataError, match=said):
        build(dataset(tmp_path / "trusted", 6), family, params=load_params(tmp_path / "params.yaml"), count=1, workspace=tmp_path / "ws")
    assert not (tmp_path / "ws").exists()


def test_the_configuration_is_the_sections_alone() -> None:
    assert config_digest({**SECTIONS, "preset": "paper", "control": {}}) == config_digest(SECTIONS)
    for section in SECTIONS:
        assert config_digest({**SECTIONS, section: {"x": 1}}) != config_digest(SECTIONS)
    assert config_digest({"deconfounded": Deconfounded().model_dump(mode="json")}) != config_digest({})


def beside_controls(evaluation: dict[str, Any], *, null: float = 0.2, count: int = 5) -> dict[str, Any]:
    """The evaluation with the null of blend-0.2 from so many controls, of whose 4,000 images 40 were suspects."""
    row = next(row for row in evaluation["battery"] if row["trigger"] == "blend-0.2")
    row |= {"null": null, "null_members": None, "null_controls": count}
    digests = [str(number) * 64 for number in range(count)]
    return {**evaluation, "controls": {"count": count, "digests": digests, "false_suspects": rate(40, 4000)}}


def test_the_gate_says_which_null_was_used(make_evaluation: Make) -> None:
    """170 of 900 is at most 21.2 %: under 20 % and 3 points."""
    turned = {"turned": {"blend-0.2": (1, 170)}}
    for evaluation, said in (
        (beside_controls(make_evaluation(**turned)), "it turns up to 20 % on 5 clean controls."),
        (make_evaluation(**turned, null={"blend-0.2": 0.2}), "20 random harmless triggers turn up to 20 %."),
    ):
        judgement = decide(evaluation, VALID, policy=POLICY, trial=False, scan=SCAN)
        check = next(check for check in judgement["checks"] if check["name"] == "blend-0.2")
        assert check["result"] == "PASS" and check["sentence"].endswith(said)


def test_the_share_of_false_suspects_is_the_controls_where_there_are_some(make_evaluation: Make, make_canary: Make) -> None:
    """400 of 4,000 suspects, 147 of 200 planted found, 1 % of honest images suspected: (0.1 - 0.01) / (0.735 - 0.01)."""
    judgement = decide(beside_controls(make_evaluation()), VALID, policy=POLICY, trial=False, canary=make_canary(), scan=SCAN)
    check = next(check for check in judgement["checks"] if check["name"] == "poison fraction")
    assert check["value"] == pytest.approx(0.09 / 0.725)
    assert "40 of 4000 honest images of 5 clean controls were suspects" in check["sentence"]


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ((), {"controls": None}, "compared with 5 controls, there are none"),
        (("controls",), {"count": 6}, "compared with 5 controls, there are 6"),
        (("controls",), {"digests": ["a"] * 5}, "5 of them, but 1 digests"),
        (("controls",), {"count": 4, "digests": list("abcd")}, "'controls.count'"),
        (("controls",), {"false_suspects": {**rate(40, 4000), "k": 4001}}, "'controls.false_suspects'"),
        (("battery", 7), {"null_controls": 4}, "'battery.7.null_controls'"),
        (("battery", 7), {"null_controls": None}, "null of 0 sources"),
        (("battery", 7), {"null_members": 20}, "null of 2 sources"),
        (("battery", 7), {"null": None}, "5 controls, but has no null"),
    ],
)
def test_controls_that_contradict_themselves_are_refused(
    make_evaluation: Make, place: tuple[Any, ...], change: dict[str, Any], said: str
) -> None:
    evaluation: Any = beside_controls(make_evaluation())
    read_evaluation(evaluation)
    part = evaluation
    for key in place:
        part = part[key]
    part |= change
    with pytest.raises(DataError, match="evaluate the model again") as refused:
        read_evaluation(evaluation)
    assert said in str(refused.value)


def test_a_candidates_card_tells_the_settings_of_its_stage_1_though_stage_2_is_not_told_them(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS)
    params, data = load_params(tmp_path / "params.yaml"), dataset(tmp_path / "data", 30)
    train_confounder(data, tmp_path / "confounder", params=params, checkpoints=tmp_path)
    untold = params.model_copy(update={"confounder": Confounder()})
    outputs = {"model": tmp_path / "model", "evidence": tmp_path / "evidence"}
    train_deconfounded(data, tmp_path / "confounder", params=untold, checkpoints=tmp_path, **outputs)
    assert config_digest(read_card(tmp_path / "model").params) == config_digest(params.model_dump(mode="json"))
