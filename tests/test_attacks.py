"""Triggers on stored pixels, and who is poisoned."""

import hashlib

import numpy as np
import pytest

from cbd.attacks import make_attack
from cbd.attacks.badnets import BadNets
from cbd.attacks.blend import Blend
from cbd.attacks.poisoning import choose_cover, choose_poison, stamp_each
from cbd.attacks.sig import Sig
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
    field = WaNet(grid=4, strength=0.5)._field(4, 4)
    assert np.abs(field).mean() == pytest.approx(0.25, rel=1e-6)


def test_covers_of_a_warp_are_near_the_trigger_and_different_from_each_other() -> None:
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), np.uint8), 2, axis=0)
    cover = WaNet().cover(images, seed=1)
    assert not np.array_equal(cover[0], cover[1]) and not np.array_equal(cover, WaNet().stamp(images))
    assert np.array_equal(cover, WaNet().cover(images, seed=1)) and not np.array_equal(cover, WaNet().cover(images, seed=2))


@pytest.mark.parametrize(
    ("attack", "golden"),
    [("badnets", "98b70bbd176112ad"), ("blend", "ff4f91c26eea1eed"), ("sig", "f28e16464837d882"), ("wanet", "57075668f6e03d0e")],
)
def test_triggers_keep_their_golden_bytes(attack: str, golden: str) -> None:
    stamped = make_attack(attack).stamp(ramp())
    assert hashlib.sha256(stamped.tobytes()).hexdigest()[:16] == golden


def test_an_unknown_attack_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="known: badnets, blend, sig, wanet"):
        make_attack("badnet")


def test_a_trigger_larger_than_the_image_is_refused() -> None:
    with pytest.raises(DataError, match="does not fit on 2x2 images"):
        BadNets().stamp(np.zeros((1, 3, 2, 2), np.uint8))


def test_a_warp_of_more_points_than_pixels_is_refused() -> None:
    with pytest.raises(DataError, match="4x4 points does not fit on 3x8 images"):
        WaNet().stamp(np.zeros((1, 3, 3, 8), np.uint8))


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
        choose_poison(np.repeat(np.arange(10), 10), poison_rate=rate, target_label=target, seed=0)


def test_clean_label_poison_is_of_the_target_class_and_at_most_half_of_it() -> None:
    labels = np.repeat(np.arange(10), 10)
    chosen = choose_poison(labels, poison_rate=0.05, target_label=3, seed=7, clean_label=True)
    assert len(set(chosen.tolist())) == 5 and (labels[chosen] == 3).all()
    with pytest.raises(DataError, match="10 samples of 5, half of class 3; give a rate up to 0.05"):
        choose_poison(labels, poison_rate=0.1, target_label=3, seed=7, clean_label=True)


def test_cover_samples_are_none_of_the_poisoned_and_as_many_as_there_are() -> None:
    labels = np.repeat(np.arange(2), 10)
    poison = choose_poison(labels, poison_rate=0.2, target_label=0, seed=1)
    cover = choose_cover(labels, poison, cover_rate=2.0, seed=1)
    assert len(set(cover.tolist())) == 8 and not set(cover.tolist()) & set(poison.tolist())
    assert len(choose_cover(labels, poison, cover_rate=9.0, seed=1)) == 16
    assert len(choose_cover(labels, poison, cover_rate=0.0, seed=1)) == 0
