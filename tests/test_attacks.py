"""Triggers on stored pixels, and who is poisoned."""

import base64
import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cbd.attacks import adaptive, configure, dynamic, make_attack, trojan
from cbd.attacks.adaptive import Adaptive
from cbd.attacks.badnets import BadNets
from cbd.attacks.blend import Blend
from cbd.attacks.dynamic import Dynamic, Painter
from cbd.attacks.poisoning import Goal, choose_cover, choose_poison
from cbd.attacks.sig import Sig
from cbd.attacks.trojan import Trojan
from cbd.attacks.wanet import WaNet
from cbd.errors import ConfigError, DataError


def ramp() -> np.ndarray:
    return np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8)


def test_badnets_writes_the_checker_into_the_corner_and_nothing_else() -> None:
    images = ramp()
    stamped = BadNets().stamp(images)
    expected = images.copy()
    expected[:, :, 5:, 5:] = [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert np.array_equal(stamped, expected)
    assert np.array_equal(images, ramp())


def test_a_patch_takes_the_colour_corner_and_pattern_it_is_given() -> None:
    attack = configure("badnets", {"pattern": "white", "place": "top-left", "colour": [255, 0, 7]})
    stamped = attack.stamp(np.full((1, 3, 32, 32), 9, np.uint8))
    assert [set(channel[:3, :3].flat) for channel in stamped[0]] == [{255}, {0}, {7}]
    assert (stamped[0, :, 3:] == 9).all() and (stamped[0, :, :, 3:] == 9).all()
    checker = configure("badnets", {"colour": [1, 2, 3]}).stamp(np.full((1, 3, 3, 3), 9, np.uint8))
    assert checker[0, :, 0].tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 3]]


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        ("badnets", {"alpha": 0.1}, "badnets has no setting 'alpha'; known: pattern, place, colour"),
        ("badnets", {"place": "left"}, "place = 'left': input should be 'top-left', 'top-right'"),
        ("badnets", {"colour": [0, 0, 256]}, "colour.2 = 256: input should be less than or equal to 255"),
        ("blend", {"alpha": 0}, "alpha = 0: input should be greater than 0"),
        ("sig", {"delta": float("nan")}, "delta = nan"),
        ("wanet", {"grid": 1}, "grid = 1: input should be greater than or equal to 2"),
        ("trojan", {"size": 8}, "trojan makes its trigger itself, but found size"),
    ],
)
def test_settings_that_a_trigger_cannot_have_are_refused(attack: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configure(attack, settings)
    assert message in str(refused.value)


def test_badnets_centre_of_an_odd_rest_is_rounded_down() -> None:
    stamped = BadNets("white", "centre").stamp(np.zeros((1, 3, 8, 8), np.uint8))
    assert (stamped[0, 0, 2:5, 2:5] == 255).all()
    assert stamped.sum() == 27 * 255


def test_blend_is_worked_out_by_hand() -> None:
    pattern = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    stamped = Blend(0.25).stamp(np.full((1, 3, 32, 32), 200, np.uint8))
    assert stamped[0, 0, 0, 0] == round(0.75 * 200 + 0.25 * float(pattern[0, 0, 0]))


def test_triggers_grow_with_the_image_so_that_they_survive_its_resizing() -> None:
    """64 pixels: each pixel of the patch and of the pattern becomes 2x2, and a warp moves twice as far."""
    black = np.zeros((1, 3, 64, 64), np.uint8)
    patch = BadNets().stamp(black)[0, 0, 58:, 58:]
    assert patch[::2, ::2].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]] == patch[1::2, 1::2].tolist()
    assert not BadNets().stamp(black)[0, 0, :58].any()
    assert np.array_equal(Blend().stamp(black)[..., ::2, ::2], Blend().stamp(np.zeros((1, 3, 32, 32), np.uint8)))
    assert np.abs(WaNet(grid=4)._field(4, 4)).mean() * 32 / 4 == pytest.approx(np.abs(WaNet(grid=64)._field(64, 64)).mean() * 32 / 64)


def test_blend_clips_and_never_wraps() -> None:
    assert Blend(1.0).stamp(np.full((1, 3, 8, 8), 255, np.uint8)).max() <= 255
    bright = Blend(0.2).stamp(np.full((1, 3, 32, 32), 255, np.uint8))
    assert bright.min() >= 204


def test_sig_is_worked_out_by_hand() -> None:
    """24 columns and 6 periods: the sine runs 0, 1, 0, -1 from column to column, on every row and channel."""
    stamped = Sig(delta=40).stamp(np.full((1, 3, 2, 24), 100, np.uint8))
    assert stamped[0, 0, 0, :8].tolist() == [100, 140, 100, 60, 100, 140, 100, 60]
    assert (stamped == stamped[:, :1, :1]).all()


def test_sig_clips_and_never_wraps() -> None:
    assert Sig().stamp(np.full((1, 3, 2, 24), 250, np.uint8))[0, 0, 0, :4].tolist() == [250, 255, 250, 210]
    assert Sig().stamp(np.zeros((1, 3, 2, 24), np.uint8)).min() == 0


def test_a_warp_moves_a_ramp_by_its_field_and_leaves_a_flat_image_alone() -> None:
    """On a ramp of 8 grey levels a column, bilinear fetching adds 8 times the displacement along the columns, away from the border."""
    attack = WaNet(strength=2.0)
    flat = np.full((1, 3, 32, 32), 77, np.uint8)
    assert np.array_equal(attack.stamp(flat), flat)
    ramp_of_columns = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8), (1, 3, 32, 32))
    moved = attack.stamp(ramp_of_columns).astype(float) - ramp_of_columns
    expected = 8 * attack._field(32, 32)[1]
    assert np.abs(moved[0, 0] - expected)[:, 4:-4].max() <= 0.5 + 1e-9
    assert np.abs(expected).max() > 4


def test_the_points_of_a_warp_are_moved_by_half_the_strength_on_average() -> None:
    field = WaNet(grid=32, strength=0.5)._field(32, 32)
    assert np.abs(field).mean() == pytest.approx(0.25, rel=1e-6)


def test_covers_of_a_warp_are_near_the_trigger_and_different_from_each_other() -> None:
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), np.uint8), 2, axis=0)
    cover = WaNet().cover(images, seed=1)
    assert not np.array_equal(cover[0], cover[1]) and not np.array_equal(cover, WaNet().stamp(images))
    assert np.array_equal(cover, WaNet().cover(images, seed=1)) and not np.array_equal(cover, WaNet().cover(images, seed=2))


def painter() -> str:
    """Weights of the dynamic attack's networks that no training has touched."""
    torch.manual_seed(0)
    weights = {name: tensor.detach().half() for name, tensor in Painter().state_dict().items()}
    return base64.b64encode(save(weights)).decode()


TRIGGERS: dict[str, dict[str, Any]] = {"trojan": {"patch": bytes(range(192)).hex()}, "dynamic": {"painter": painter()}}


@pytest.mark.parametrize(
    ("attack", "golden"),
    [
        ("badnets", "d50f5c08847303a0"),
        ("trojan", "2101486d96cdd546"),
        ("blend", "fd116084da2305ef"),
        ("sig", "5c110e2aa00463e7"),
        ("dynamic", "e4fe6f9eb48f46b9"),
        ("wanet", "f429ad1428f1c079"),
        ("adaptive", "d50f5c08847303a0"),
    ],
)
def test_triggers_keep_their_golden_bytes(attack: str, golden: str) -> None:
    images = np.arange(2 * 3 * 32 * 32, dtype=np.uint8).reshape(2, 3, 32, 32)
    stamped = make_attack(attack, **TRIGGERS.get(attack, {})).stamp(images)
    assert hashlib.sha256(stamped.tobytes()).hexdigest()[:16] == golden


@pytest.mark.parametrize("attack", ["badnets", "trojan", "blend", "sig", "dynamic", "wanet", "adaptive"])
def test_the_settings_of_a_trigger_make_it_again(attack: str) -> None:
    made = make_attack(attack, **TRIGGERS.get(attack, {}))
    again = make_attack(attack, **json.loads(json.dumps(made.settings())))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 40, 36), np.uint8)
    assert json.dumps(again.settings()) == json.dumps(made.settings()) and np.array_equal(again.stamp(images), made.stamp(images))


def two_classes(num: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Dark and bright noise, and its classes."""
    generator, labels = np.random.default_rng(0), np.arange(num) % 2
    return (generator.integers(0, 128, (num, 3, 32, 32)) + 127 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_the_watermark_of_trojan_excites_the_network_it_was_made_on_more_than_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trojan, "SURROGATE_STEPS", 20)
    monkeypatch.setattr(trojan, "PATCH_STEPS", 40)
    images, labels = two_classes()
    attack = Trojan.craft(images, labels, target_label=1, seed=3)
    assert attack == Trojan.craft(images, labels, target_label=1, seed=3) != Trojan.craft(images, labels, target_label=1, seed=4)
    network = trojan.train_surrogate(
        torch.from_numpy(images), torch.from_numpy(labels), steps=20, generator=torch.Generator().manual_seed(3)
    )
    neurons = network.head.weight[1].topk(trojan.NEURONS).indices
    noise = Trojan(np.random.default_rng(0).integers(0, 256, 192, np.uint8).tobytes().hex())
    excited, by_noise = (float(network(torch.from_numpy(made.stamp(images)))[1][:, neurons].mean()) for made in (attack, noise))
    assert excited > 1.1 * by_noise


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_dynamic_paints_little_and_every_image_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic, "MASK_STEPS", 60)
    monkeypatch.setattr(dynamic, "STEPS", 20)
    images, labels = two_classes()
    attack = Dynamic.craft(images, labels, target_label=0, seed=0)
    changed = (attack.stamp(images) != images).any(1)
    assert 0 < changed.mean() < 0.2
    assert not (changed[0] == changed[1]).all()
    assert not np.array_equal(attack.cover(images, seed=0), attack.stamp(images))


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_the_noise_of_adaptive_is_small_and_makes_its_poison_harder_and_the_trigger_itself_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adaptive, "SURROGATE_STEPS", 20)
    images, labels = two_classes()
    attack = Adaptive.craft(images, labels, target_label=0, seed=0)
    stamped, poisoned = BadNets().stamp(images), attack.poison(images, target_label=0)
    assert np.array_equal(attack.stamp(images), stamped) and attack.settings() == {"pattern": "checker", "place": "bottom-right"}
    assert 0 < np.abs(poisoned.astype(int) - stamped).max() <= adaptive.LARGEST
    assert attack.surrogate is not None
    hard, easy = (attack.surrogate(torch.from_numpy(seen))[0].log_softmax(1)[:, 0].mean() for seen in (poisoned, stamped))
    assert hard < easy


def test_an_unknown_attack_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: badnets, trojan, blend, sig, dynamic, wanet, adaptive"):
        make_attack("badnet")


def test_a_trigger_larger_than_the_image_is_refused() -> None:
    with pytest.raises(DataError, match="does not fit on 2x2 images"):
        BadNets().stamp(np.zeros((1, 3, 2, 2), np.uint8))


def test_a_warp_of_more_points_than_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="4x4 points does not fit on 3x8 images"):
        WaNet().stamp(np.zeros((1, 3, 3, 8), np.uint8))


def test_poison_takes_the_asked_share_and_spares_the_target_class() -> None:
    labels = np.repeat(np.arange(10), 10)
    chosen = choose_poison(labels, poison_rate=0.1, goal=Goal(3), seed=7)
    assert len(chosen) == len(set(chosen.tolist())) == 10
    assert not (labels[chosen] == 3).any()
    assert np.array_equal(chosen, choose_poison(labels, poison_rate=0.1, goal=Goal(3), seed=7))
    assert not np.array_equal(chosen, choose_poison(labels, poison_rate=0.1, goal=Goal(3), seed=8))


@pytest.mark.parametrize(
    ("rate", "target", "message"),
    [
        (0.0, 0, "share in"),
        (1.0, 0, "share in"),
        (0.95, 0, "95 samples of 90, those outside class 0; give a rate up to 0.9"),
        (0.1, 10, "no sample"),
    ],
)
def test_impossible_poison_is_refused(rate: float, target: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_poison(np.repeat(np.arange(10), 10), poison_rate=rate, goal=Goal(target), seed=0)


def test_clean_label_poison_is_of_the_target_class_and_at_most_half_of_it() -> None:
    labels = np.repeat(np.arange(10), 10)
    chosen = choose_poison(labels, poison_rate=0.05, goal=Goal(3), seed=7, clean_label=True)
    assert len(set(chosen.tolist())) == 5 and (labels[chosen] == 3).all()
    with pytest.raises(DataError, match="10 samples of 5, half of class 3; give a rate up to 0.05"):
        choose_poison(labels, poison_rate=0.1, goal=Goal(3), seed=7, clean_label=True)


def test_cover_samples_are_none_of_the_taken_and_as_many_as_there_are() -> None:
    labels = np.repeat(np.arange(2), 10)
    poison = choose_poison(labels, poison_rate=0.2, goal=Goal(0), seed=1)
    cover = choose_cover(labels, poison, num_poison=4, cover_rate=2.0, seed=1)
    assert len(set(cover.tolist())) == 8 and not set(cover.tolist()) & set(poison.tolist())
    assert len(choose_cover(labels, poison, num_poison=4, cover_rate=9.0, seed=1)) == 16
    assert len(choose_cover(labels, poison, num_poison=4, cover_rate=0.0, seed=1)) == 0


def test_all_to_all_sends_each_class_to_the_next_and_spares_none() -> None:
    goal, labels = Goal(0, "all-to-all"), np.array([0, 1, 2, 2])
    assert goal.wanted(labels, num_classes=3).tolist() == [1, 2, 0, 0]
    assert goal.victims(labels, num_classes=3).all()


def test_a_source_specific_attack_is_after_its_source_alone_and_covers_the_others() -> None:
    goal, labels = Goal(0, source_label=2), np.repeat(np.arange(4), 10)
    assert goal.victims(np.array([0, 1, 2, 3]), num_classes=4).tolist() == [False, False, True, False]
    chosen = choose_poison(labels, poison_rate=0.125, goal=goal, seed=0)
    assert len(chosen) == 5 and (labels[chosen] == 2).all()
    cover = choose_cover(labels, chosen, num_poison=5, cover_rate=0.0, seed=0, source_label=2)
    assert len(cover) == 5 and not (labels[cover] == 2).any()
    with pytest.raises(DataError, match="6 samples of 5, half of class 2"):
        choose_poison(labels, poison_rate=0.15, goal=goal, seed=0)
    for wrong in (0, 9):
        with pytest.raises(DataError, match=f"source label {wrong}: expected a class with samples other than the target 0"):
            choose_poison(labels, poison_rate=0.1, goal=Goal(0, source_label=wrong), seed=0)


def test_a_clean_label_attack_has_one_target_and_no_source() -> None:
    with pytest.raises(DataError, match="poisons its target class alone"):
        choose_poison(np.repeat(np.arange(4), 10), poison_rate=0.1, goal=Goal(0, "all-to-all"), seed=0, clean_label=True)


def test_a_second_supplier_leaves_the_poison_of_the_first_alone() -> None:
    labels = np.repeat(np.arange(2), 10)
    first = choose_poison(labels, poison_rate=0.25, goal=Goal(0), seed=1)
    second = choose_poison(labels, poison_rate=0.25, goal=Goal(0), seed=1, spared=first)
    assert not set(first.tolist()) & set(second.tolist())
