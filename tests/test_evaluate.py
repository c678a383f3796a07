"""Measures on the trusted set, worked out by hand, and the evaluation of a whole bundle."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from delivery_files import png

from cbd.attacks import adaptive, dynamic, make_attack, trojan
from cbd.attacks.badnets import BadNets
from cbd.attacks.poisoning import Goal
from cbd.battery import BATTERY, FAMILIES, harmless
from cbd.bundle import BundleCard, bundle_digest
from cbd.config import AttackName, Gate, Poison
from cbd.dataset import load_samples, make_row, read_info, to_batches, write_dataset
from cbd.errors import DataError
from cbd.evaluate import (
    attack_success,
    clean_accuracy,
    compare,
    defence_effectiveness,
    largest_of_family,
    largest_rates,
    predictions,
    run_battery,
    triggered_rates,
    turned,
    worst_target,
)
from cbd.measurements import read_evaluation
from cbd.models import load_model, make_model, save_bundle
from cbd.truth import read_truth
from components.evaluate import Compared, evaluate
from components.poison import poison

pytestmark = pytest.mark.usefixtures("torch_one_thread")
CLASSES = ("ant", "bee", "cow")


class Corner(torch.nn.Module):
    """Says class 0 where the bottom-right pixel is white, else the class that the top-left red value names."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        named = images[:, 0, 0, 0].long() % 3
        called = torch.where(images[:, 0, -1, -1] == 255, torch.zeros_like(named), named)
        return torch.nn.functional.one_hot(called, 3).float(), torch.zeros(len(images), 1)


def naming(labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    images = np.zeros((len(labels), 3, 16, 16), np.uint8)
    images[:, 0, 0, 0] = labels
    return images, np.array(labels, np.int64)


def test_turned_counts_only_images_of_other_classes_that_were_not_called_so_before() -> None:
    labels = np.array([0, 1, 1, 2, 2])
    before = np.array([0, 1, 0, 2, 1])
    after = np.array([1, 0, 0, 0, 1])
    # target 0: eligible are 1, 3, 4 (image 0 is of class 0, image 2 was called 0 before); 1 and 3 turn
    # target 1: eligible are 0, 3 (image 4 was called 1 before); 0 turns.  target 2: eligible are 0, 1, 2; none turns
    assert turned(before, after, labels, num_classes=3) == [(2, 3), (1, 2), (0, 3)]


def test_the_worst_target_has_the_highest_rate_not_the_highest_count() -> None:
    assert worst_target([(3, 10), (2, 4), (0, 0)]) == 1


def test_attack_success_leaves_out_images_of_the_target_class() -> None:
    images, labels = naming([0, 0, 1, 2, 1])
    found = attack_success(Corner(), images, labels, attack=BadNets("white"), goal=Goal(0), num_classes=3)
    assert (found["k"], found["n"], found["rate"]) == (3, 3, 1.0)
    elsewhere = attack_success(Corner(), images, labels, attack=BadNets("white", "centre"), goal=Goal(0), num_classes=3)
    assert (elsewhere["k"], elsewhere["n"]) == (0, 3)
    nobody = attack_success(Corner(), *naming([0, 0]), attack=BadNets(), goal=Goal(0), num_classes=3)
    assert nobody["rate"] is None


def test_success_of_all_to_all_and_of_a_source_class_is_counted_over_those_they_are_after() -> None:
    """Stamped, all five are called 0: only the class before 0, class 2, is sent where all-to-all wants it."""
    images, labels = naming([0, 0, 1, 2, 2])
    found = attack_success(Corner(), images, labels, attack=BadNets("white"), goal=Goal(0, "all-to-all"), num_classes=3)
    assert (found["k"], found["n"]) == (2, 5)
    found = attack_success(Corner(), images, labels, attack=BadNets("white"), goal=Goal(0, source_label=1), num_classes=3)
    assert (found["k"], found["n"]) == (1, 1)


def test_success_and_robust_accuracy_are_counted_over_triggered_victims() -> None:
    """Of five victims two are called 0, as the attack wants, two are called what they are, one is called another class."""
    success, kept = triggered_rates(np.array([0, 0, 1, 2, 1]), np.array([1, 2, 1, 2, 2]), goal=Goal(0), num_classes=3)
    assert (success["k"], success["n"], kept["k"], kept["n"]) == (2, 5, 2, 5)
    assert triggered_rates(np.zeros(0, np.int64), np.zeros(0, np.int64), goal=Goal(0), num_classes=3)[0]["rate"] is None


def test_defence_effectiveness_is_worked_out_by_hand() -> None:
    """ASR falls by 0.9 and CA by 0.1: (0.9 - 0.1 + 1) / 2; gains on either side count nothing."""
    assert defence_effectiveness(ca=0.8, asr=0.05, undefended_ca=0.9, undefended_asr=0.95) == pytest.approx(0.9)
    assert defence_effectiveness(ca=0.95, asr=0.99, undefended_ca=0.9, undefended_asr=0.95) == pytest.approx(0.5)


def test_clean_accuracy_is_k_of_n() -> None:
    assert clean_accuracy(np.array([0, 1, 1]), np.array([0, 1, 2]))["rate"] == pytest.approx(2 / 3)


def test_the_battery_finds_the_planted_trigger_and_compares_it_with_harmless_ones() -> None:
    images, labels = naming([0, 1, 2] * 40)
    found = {row["trigger"]: row for row in run_battery(Corner(), images, labels, num_classes=3, limit=0.05, null_members=5, seed=0)}
    assert len(found) == len(BATTERY) == 12
    planted = found["white-bottom-right"]
    assert (planted["target"], planted["k"], planted["n"]) == (0, 80, 80)
    assert planted["null"] is not None
    assert planted["null"] < 0.5
    assert found["white-centre"]["k"] == 0
    assert [count["target"] for count in planted["targets"]] == [0, 1, 2]


def test_of_many_images_the_battery_draws_some_of_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200 images in the order of their classes the first 60 were all of class 0, none of which a trigger could turn to it."""
    monkeypatch.setattr("cbd.evaluate.MANY_IMAGES", 60)
    images, labels = naming([0] * 100 + [1] * 50 + [2] * 50)
    found = run_battery(Corner(), images, labels, num_classes=3, limit=0.05, null_members=1, seed=0)
    planted = next(row for row in found if row["trigger"] == "white-bottom-right")
    assert planted["target"] == 0 and 20 < planted["k"] == planted["n"] < 40
    assert run_battery(Corner(), images, labels, num_classes=3, limit=0.05, null_members=1, seed=0) == found


class Steady(Corner):
    """Says class 0 whatever it sees."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(images), 3), torch.zeros(len(images), 1)


@pytest.mark.parametrize(("num", "measured"), [(10, True), (100, False)])
def test_where_few_images_could_turn_harmless_triggers_are_measured_although_none_turns(num: int, measured: bool) -> None:
    """0 of 20 is at most 36.9 % at 99.99 % confidence, 0 of 200 at most 4.5 %."""
    images, labels = naming([0, 1, 2] * num)
    for row in run_battery(Steady(), images, labels, num_classes=3, limit=0.05, null_members=1, seed=0):
        assert (row["k"], row["n"], row["null"] is not None) == (0, 2 * num, measured)


def test_harmless_members_are_the_same_again_and_differ_from_each_other() -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8)
    for family in FAMILIES:
        stamped = [member.stamp(images).tobytes() for member in harmless(family, 4, seed=1)]
        assert not {trigger.attack.stamp(images).tobytes() for trigger in BATTERY if trigger.family == family} & set(stamped)
        assert stamped == [member.stamp(images).tobytes() for member in harmless(family, 4, seed=1)]
        assert len(set(stamped)) == 4


def test_a_trigger_is_tried_on_many_images_only_where_few_do_not_show_it_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 of 360 images are tried first: 0 of about 67 is at most 13 %, so that a limit of 20 % needs no more."""
    monkeypatch.setattr("cbd.evaluate.FEW_IMAGES", 100)
    images, labels = naming([0, 1, 2] * 120)
    rows = {row["trigger"]: row for row in run_battery(Corner(), images, labels, num_classes=3, limit=0.2, null_members=1, seed=0)}
    planted, other = rows["white-bottom-right"], rows["white-centre"]
    assert (planted["k"], planted["n"]) == (240, 240) and planted["null"] is not None
    assert other["k"] == 0 and 50 < other["n"] < 85


def test_of_harmless_triggers_those_that_turn_most_of_a_few_images_are_measured_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five patches, of which one turns every image: screened on 12 of 90 images, and then alone measured on all."""
    monkeypatch.setattr("cbd.evaluate.SCREEN_IMAGES", 12)
    monkeypatch.setattr("cbd.evaluate.FINALISTS", 1)
    images, labels = naming([0, 1, 2] * 30)
    places = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
    members = [BadNets("white", place) for place in places]
    tried: list[int] = []

    class Counting(Corner):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tried.append(len(images))
            return super().forward(images)

    assert largest_of_family(Counting(), images, labels, members, num_classes=3, seed=0) == 1.0  # type: ignore[arg-type]
    assert sum(tried) == (1 + 5) * 12 + (1 + 1) * 90


def test_the_largest_rate_of_no_member_is_zero() -> None:
    images, labels = naming([0, 1, 2])
    assert largest_rates(Corner(), images, labels, [], num_classes=3) == []  # type: ignore[arg-type]
    assert largest_of_family(Corner(), images, labels, [], num_classes=3, seed=0) == 0.0  # type: ignore[arg-type]


def test_candidate_and_champion_are_paired_on_the_same_images() -> None:
    labels, candidate, champion = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), np.array([0, 1, 0, 1])
    found = compare(candidate, champion, labels, ("a", "b"))
    assert (found["k"], found["n"], found["wins"], found["losses"]) == (2, 4, 2, 1)
    assert found["per_class"][1] == {"class_name": "b", "n": 2, "wins": 1, "losses": 1}


def dataset(folder: Path, num: int) -> Path:
    rows = (make_row(png(i), label=i % 3, original_path=f"{i:03}.png", source="acme") for i in range(num))
    write_dataset(folder, to_batches(rows), class_names=CLASSES, supplier="acme")
    return folder


def bundle(folder: Path, *, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    model = make_model("wrn-16-1", num_classes=len(classes), image_size=16, generator=torch.Generator().manual_seed(seed))
    values: dict[str, Any] = {"architecture": "wrn-16-1", "class_names": classes, "image_size": 16, "data_digest": "0" * 64}
    save_bundle(model, BundleCard(kind="deconfounded", params={}, seed=0, trial=False, weights_sha256="", **values), folder)
    return folder


def test_an_evaluation_is_what_the_gate_reads_and_leaves_the_unmeasured_null(tmp_path: Path) -> None:
    trusted, model = dataset(tmp_path / "trusted", 60), bundle(tmp_path / "model")
    policy = Gate(min_clean_accuracy=0.5, null_members=2)
    evaluate(model, trusted, tmp_path / "out", policy=policy, compared=Compared(), seed=0)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    measured = read_evaluation(found)
    assert measured.model_digest == bundle_digest(model)
    assert measured.trusted_digest == read_info(trusted).digest
    assert found["confounder"] == {"steps": 0, "separated": None, "gap": None, "asr": None}
    assert (found["champion"], found["detection"], found["baseline"]) == (None, None, None)


def test_the_truth_adds_its_attack_by_name_and_a_champion_is_paired(tmp_path: Path) -> None:
    clean, model = dataset(tmp_path / "clean", 60), bundle(tmp_path / "model")
    told = poison(clean, tmp_path / "poisoned", truth=tmp_path / "truth", params=Poison(attack="blend", target_label=2), seed=3)
    assert told["poisoned"] == 6
    truth = read_truth(tmp_path / "truth")
    compared = Compared(undefended=model, champion=(model, "7"), truth=truth)
    evaluate(model, clean, tmp_path / "out", policy=Gate(min_clean_accuracy=0.5, null_members=1), compared=compared, seed=0)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["attack_success_rate"]["blend"]["n"] == 40
    assert (found["champion"]["version"], found["champion"]["wins"], found["champion"]["losses"]) == ("7", 0, 0)
    assert found["baseline"]["asr"] == found["attack_success_rate"]["blend"]
    read_evaluation(found)


def test_the_champion_is_measured_and_not_the_candidate_again(tmp_path: Path) -> None:
    trusted, candidate, champion = dataset(tmp_path / "trusted", 60), bundle(tmp_path / "model"), bundle(tmp_path / "champion", seed=1)
    samples = load_samples(trusted, image_size=16)
    ours, theirs = (predictions(load_model(one)[0], samples.images) == samples.labels for one in (candidate, champion))
    assert (ours != theirs).any()
    policy, compared = Gate(min_clean_accuracy=0.5, null_members=1), Compared(champion=(champion, "7"))
    evaluate(candidate, trusted, tmp_path / "out", policy=policy, compared=compared, seed=0)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["champion"]
    assert found["digest"] == bundle_digest(champion)
    assert (found["k"], found["wins"], found["losses"]) == (theirs.sum(), (ours & ~theirs).sum(), (theirs & ~ours).sum())


def test_a_trusted_set_of_other_classes_is_refused(tmp_path: Path) -> None:
    trusted, model = dataset(tmp_path / "trusted", 30), bundle(tmp_path / "model", classes=("ant", "cow", "bee"))
    with pytest.raises(DataError, match=r"classes \['ant', 'bee', 'cow'\], expected the model's \['ant', 'cow', 'bee'\]"):
        evaluate(model, trusted, tmp_path / "out", policy=Gate(min_clean_accuracy=0.5), compared=Compared(), seed=0)
    assert not (tmp_path / "out").exists()


def test_altered_weights_are_refused_by_name(tmp_path: Path) -> None:
    trusted, model = dataset(tmp_path / "trusted", 30), bundle(tmp_path / "model")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match=r"model\.safetensors: altered"):
        evaluate(model, trusted, tmp_path / "out", policy=Gate(min_clean_accuracy=0.5), compared=Compared(), seed=0)


def test_a_poisoned_copy_is_a_trial_with_its_roles_apart(tmp_path: Path) -> None:
    clean = dataset(tmp_path / "clean", 60)
    for name in ("one", "two"):
        poison(clean, tmp_path / name, truth=tmp_path / f"{name}-truth", params=Poison(attack="badnets", target_label=0), seed=5)
    info, truth = read_info(tmp_path / "one"), read_truth(tmp_path / "one-truth")
    assert info.trial
    assert info.digest == read_info(tmp_path / "two").digest != read_info(clean).digest
    assert (info.class_counts[0], sum(info.class_counts)) == (26, 60)
    assert truth is not None
    assert truth.roles.count("poison") == 6
    assert all(label != 0 for label, role in zip(truth.true_labels, truth.roles, strict=True) if role == "poison")
    assert "role" not in json.dumps(info.model_dump(mode="json"))


def test_covers_keep_their_labels_and_clean_label_poison_too(tmp_path: Path) -> None:
    clean = dataset(tmp_path / "clean", 60)
    told = poison(clean, tmp_path / "warped", truth=tmp_path / "warped-truth", params=Poison(attack="wanet", target_label=0), seed=5)
    truth = read_truth(tmp_path / "warped-truth")
    assert truth is not None and (told["poisoned"], told["cover"]) == (6, 12)
    assert (truth.roles.count("poison"), truth.roles.count("cover")) == (6, 12)
    assert read_info(tmp_path / "warped").class_counts[0] == 26
    sig = Poison(attack="sig", target_label=0, poison_rate=0.1)
    poison(clean, tmp_path / "sig", truth=tmp_path / "sig-truth", params=sig, seed=5)
    truth = read_truth(tmp_path / "sig-truth")
    assert truth is not None and {label for label, role in zip(truth.true_labels, truth.roles, strict=True) if role == "poison"} == {0}
    assert read_info(tmp_path / "sig").class_counts == read_info(clean).class_counts
    with pytest.raises(DataError, match=r"half of class 0; give a rate up to 0\.166"):
        poison(clean, tmp_path / "more", truth=tmp_path / "more-truth", params=sig.model_copy(update={"poison_rate": 0.2}), seed=5)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("attack", get_args(AttackName))
@pytest.mark.usefixtures("torch_one_thread")
def test_every_attack_poisons_a_data_set_and_its_truth_makes_its_trigger_again(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, names in (
        (adaptive, ("SURROGATE_STEPS",)),
        (dynamic, ("MASK_STEPS", "STEPS")),
        (trojan, ("SURROGATE_STEPS", "PATCH_STEPS")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 2)
    clean = dataset(tmp_path / "clean", 60)
    params = Poison(attack=attack, target_label=0)  # type: ignore[arg-type]
    poison(clean, tmp_path / "poisoned", truth=tmp_path / "truth", params=params, seed=5)
    truth = read_truth(tmp_path / "truth")
    assert truth is not None and truth.roles.count("poison") == 6
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    stamped = make_attack(truth.attack, **truth.trigger).stamp(images)
    assert stamped.shape == images.shape and (stamped != images).any((1, 2, 3)).all()
