"""Triggers on stored pixels, and who is poisoned."""

import hashlib

import numpy as np
import pytest

from cbd.attacks import make_attack
from cbd.attacks.badnets import BadNets
from cbd.attacks.blend import Blend
from cbd.attacks.poisoning import choose_poison, stamp_each
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


def test_badnets_centre_of_an_odd_rest_is_rounded_down() -> None:
    stamped = BadNets("white", "centre").stamp(np.zeros((1, 3, 8, 8), np.uint8))
    assert (stamped[0, 0, 2:5, 2:5] == 255).all()
    assert stamped.sum() == 27 * 255


def test_blend_is_worked_out_by_hand() -> None:
    pattern = np.random.default_rng(0).integers(0, 256, (3, 8, 8))
    stamped = Blend(0.25).stamp(np.full((1, 3, 8, 8), 200, np.uint8))
    assert stamped[0, 0, 0, 0] == round(0.75 * 200 + 0.25 * float(pattern[0, 0, 0]))


def test_blend_clips_and_never_wraps() -> None:
    assert Blend(1.0).stamp(np.full((1, 3, 8, 8), 255, np.uint8)).max() <= 255
    bright = Blend(0.2).stamp(np.full((1, 3, 32, 32), 255, np.uint8))
    assert bright.min() >= 204


@pytest.mark.parametrize(
    ("attack", "golden"),
    [("badnets", "98b70bbd176112ad"), ("blend", "ff4f91c26eea1eed")],
)
def test_triggers_keep_their_golden_bytes(attack: str, golden: str) -> None:
    stamped = make_attack(attack).stamp(ramp())
    assert hashlib.sha256(stamped.tobytes()).hexdigest()[:16] == golden


def test_an_unknown_attack_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: badnets, blend"):
        make_attack("badnet")


def test_a_trigger_larger_than_the_image_is_refused() -> None:
    with pytest.raises(DataError, match="does not fit on 2x2 images"):
        BadNets().stamp(np.zeros((1, 3, 2, 2), np.uint8))


def test_a_trigger_that_changes_no_pixel_is_refused() -> None:
    with pytest.raises(DataError, match="every pixel of 1 images unchanged"):
        stamp_each(BadNets("white"), [np.full((3, 8, 8), 255, np.uint8)])


def test_poison_takes_the_asked_share_and_spares_the_target_class() -> None:
    labels = np.repeat(np.arange(10), 10)
    chosen = choose_poison(labels, poison_rate=0.1, target_label=3, seed=7)
    assert len(chosen) == len(set(chosen.tolist())) == 10
    assert not (labels[chosen] == 3).any()
    assert np.array_equal(chosen, choose_poison(labels, poison_rate=0.1, target_label=3, seed=7))
    assert not np.array_equal(chosen, choose_poison(labels, poison_rate=0.1, target_label=3, seed=8))


@pytest.mark.parametrize(
    ("rate", "target", "message"), [(0.0, 0, "share in"), (1.0, 0, "share in"), (0.95, 0, "95 of 90"), (0.1, 10, "no sample")]
)
def test_impossible_poison_is_refused(rate: float, target: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_poison(np.repeat(np.arange(10), 10), poison_rate=rate, target_label=target, seed=0)
