"""The third view: a fixed pattern that some images of a class share."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from cbd.attacks.badnets import BadNets
from cbd.attacks.sig import Sig
from cbd.pattern import Pattern, carrier, find_patterns, least_transfer

pytestmark = pytest.mark.usefixtures("torch_one_thread")


class Corner(nn.Module):
    """Calls class 0 what has a bright last pixel in every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_size = 1

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        bright = (images[:, :, -1, -1] > 200).all(1)
        return torch.stack((bright.float(), (~bright).float()), 1), images[:, 0, 0, :1].float()


def smooth_images(num: int = 1200, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Smooth coloured fields of two classes, one brighter than the other: neighbouring pixels are alike, as in photographs."""
    generator = np.random.default_rng(0)
    coarse = torch.from_numpy(generator.uniform(40, 180, (num, 3, 5, 5)))
    fields = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True).numpy()
    labels = np.arange(num) % 2
    noise = generator.normal(0, 3, fields.shape)
    return np.clip(np.rint(fields + noise + 15 * labels[:, None, None, None]), 0, 255).astype(np.uint8), labels


def found(
    images: np.ndarray, labels: np.ndarray, *, losses: np.ndarray | None = None, preferences: np.ndarray | None = None
) -> list[Pattern]:
    """What is found with uninformative views, unless they are given."""
    generator = np.random.default_rng(1)
    views = [generator.random(len(labels)) if view is None else view for view in (losses, preferences)]
    tables = {name: torch.from_numpy(view.astype(np.float32)) for name, view in zip(("losses", "preferences"), views, strict=True)}
    return find_patterns(torch.from_numpy(images), torch.from_numpy(labels), Corner(), **tables, seed=0)  # type: ignore[arg-type]


def test_nothing_is_planted_in_honest_images() -> None:
    patterns = found(*smooth_images())
    assert not [pattern for pattern in patterns if pattern.planted]


def test_a_patch_with_changed_labels_is_found_image_by_image_and_turns_other_images() -> None:
    images, labels = smooth_images()
    chosen = np.flatnonzero(labels == 1)[:100]
    images[chosen], labels[chosen] = BadNets("white").stamp(images[chosen]), 0
    first = found(images, labels)[0]
    assert first.planted and first.label == 0 and first.members.tolist() == chosen.tolist()
    assert first.transfer > 0.8 and first.gap > 5
    assert first.mean[:, -3:, -3:].mean() > 3 * np.abs(first.mean[:, :5, :5]).mean()


def test_a_faint_wave_on_images_that_keep_their_labels_is_found_from_the_easiest_samples() -> None:
    images, labels = smooth_images()
    chosen = np.flatnonzero(labels == 0)[:240]
    images[chosen] = Sig(delta=20, frequency=2).stamp(images[chosen])
    easy = np.random.default_rng(1).uniform(0.2, 1, len(labels))
    easy[chosen[:80]] = 0.1
    first = found(images, labels, losses=easy)[0]
    assert first.label == 0 and first.members.tolist() == chosen.tolist() and first.gap > 5


def test_a_group_grows_whole_in_a_class_with_far_fewer_images_than_pixels() -> None:
    """63 images of 3,072 pixels. A direction made from all of them sets apart whatever group it was made from, so that none could grow."""
    digits = load_digits()
    small = torch.from_numpy(digits.images[:600])[:, None] * 15
    images = nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 255).round().to(torch.uint8).repeat(1, 3, 1, 1).numpy()
    labels = digits.target[:600].astype(np.int64)
    chosen = np.flatnonzero(labels == 0)[:30]
    images[chosen] = Sig(delta=20, frequency=6).stamp(images[chosen])
    easy = np.random.default_rng(1).uniform(0.2, 1, len(labels))
    easy[chosen[:18]] = 0.1
    first = next(pattern for pattern in found(images, labels, losses=easy) if pattern.label == 0)
    assert first.members.tolist() == chosen.tolist() and first.gap > 5


def pattern(*, num: int = 30, **changed: float) -> Pattern:
    values = {"gap": 9.0, "transfer": 0.0, "contradiction": 0.5, "preference": 0.2} | changed
    return Pattern(label=0, members=np.arange(num), mean=np.zeros((3, 4, 4), np.float32), **values)


def test_a_shared_pattern_is_planted_only_if_it_acts_or_its_labels_are_contradicted() -> None:
    """A watermark or a still camera makes a gap as well, but turns nothing and carries honest labels."""
    assert not pattern().planted
    assert pattern(transfer=0.15).planted and not pattern(transfer=0.149).planted and pattern(contradiction=0.8).planted
    assert not pattern(gap=4.9, transfer=1.0, contradiction=1.0).planted


def test_an_honest_group_that_is_a_little_harder_than_other_classes_is_not_contradicted() -> None:
    """75 of 110 honest nines: apart by 5.7, AUROC 0.85, but the pilot's median preference for another digit was 0.02."""
    assert not pattern(gap=5.7, contradiction=0.85, preference=0.02).planted
    assert pattern(gap=5.7, contradiction=0.85, preference=0.31).planted, "a weak pilot, wrong labels"


def test_how_much_a_pattern_must_turn_is_far_more_than_honest_patterns_of_the_same_data_turn() -> None:
    """Median 0.2, median deviation 0.1: 0.2 + 3 * 1.4826 * 0.1 = 0.64478."""
    assert least_transfer([0.0, 0.1, 0.2, 0.3, 0.4]) == pytest.approx(0.64478)
    assert least_transfer([0.01, 0.02, 0.03]) == 0.15 and least_transfer([]) == 0.15
    assert least_transfer([0.1, 0.3, 0.5, 0.7, 0.9]) == 0.9, "0.5 + 3 * 1.4826 * 0.2 could never be reached"
    assert not pattern(transfer=0.6, least_transfer=0.64).planted and pattern(transfer=0.64, least_transfer=0.64).planted


@pytest.mark.parametrize(("num", "seen"), [(29, False), (30, True)])
def test_a_group_of_fewer_than_thirty_is_none(num: int, seen: bool) -> None:
    """15 frames of one road sign are as clear a group as any."""
    images, labels = smooth_images()
    chosen = np.flatnonzero(labels == 1)[:num]
    images[chosen], labels[chosen] = BadNets("white").stamp(images[chosen]), 0
    groups = [pattern.members.tolist() for pattern in found(images, labels) if pattern.gap > 5]
    assert groups == ([chosen.tolist()] if seen else [])


def test_classes_with_few_images_are_left_out() -> None:
    images, labels = smooth_images(60)
    assert found(images, labels) == []


def test_of_two_groups_the_contradicted_one_is_planted_even_if_it_is_the_larger() -> None:
    images, labels = smooth_images()
    chosen = np.flatnonzero(labels == 1)[:500]
    images = np.concatenate([images, smooth_images()[0][chosen]])
    labels = np.concatenate([labels, labels[chosen]])
    rest = np.flatnonzero(labels == 0)
    images[chosen], labels[chosen] = BadNets("white").stamp(images[chosen]), 0
    keep = np.sort(np.concatenate([np.setdiff1d(np.arange(len(labels)), rest), rest[:200]]))
    against = np.where(np.isin(np.arange(len(labels)), chosen), 0.8, 0.2) + 0.1 * np.random.default_rng(0).random(len(labels))
    first = found(images[keep], labels[keep], preferences=against[keep])[0]
    assert first.planted and keep[first.members].tolist() == chosen.tolist() and len(first.members) > 200


def test_two_patterns_in_one_class_are_both_found() -> None:
    images, labels = smooth_images()
    first, second = np.flatnonzero(labels == 1)[:100], np.flatnonzero(labels == 1)[100:200]
    images[first] = BadNets("white").stamp(images[first])
    images[second] = BadNets("checker", "top-left").stamp(images[second])
    labels[first], labels[second] = 0, 0
    against = np.where(np.isin(np.arange(len(labels)), np.concatenate((first, second))), 0.8, 0.2)
    against = against + 0.1 * np.random.default_rng(0).random(len(labels))
    planted = [set(pattern.members.tolist()) for pattern in found(images, labels, preferences=against) if pattern.planted]
    assert set.union(*planted) == set(first.tolist()) | set(second.tolist())


def test_a_group_whose_labels_are_plainly_wrong_carries_the_pattern() -> None:
    """BadNets, 1 % of CIFAR-10: the confounder had not learned it and found the rest of the class easier."""
    unlearned, rest = pattern(gap=11.2, transfer=0.02, contradiction=0.96), pattern(gap=11.2, transfer=0.24, contradiction=0.4)
    chosen = carrier((rest, unlearned), easier=0.97, against=0.1)
    assert (chosen.contradiction, chosen.transfer) == (0.96, 0.24)


def test_a_group_that_is_far_easier_carries_the_pattern_whatever_turns_more() -> None:
    """Blend on CIFAR-10, seed 1: the honest half turned more images (0.958) by lacking the trigger than the other by having it (0.926)."""
    honest, poison = pattern(gap=16.9, transfer=0.958, contradiction=0.62), pattern(gap=16.9, transfer=0.926, contradiction=0.79)
    assert carrier((honest, poison), easier=0.05, against=0.3).contradiction == 0.79
    assert carrier((poison, honest), easier=0.95, against=0.0).contradiction == 0.79, "a pilot that has learned the trigger says nothing"


def test_where_neither_is_far_easier_the_more_contradicted_group_carries_the_pattern() -> None:
    """Dynamic on digits: 102 honest zeros turned 29 % of other digits by their shape, the 115 others none; these are the poison."""
    poison = pattern(gap=10.2, transfer=0.0, contradiction=0.79, preference=0.1)
    honest = pattern(gap=10.2, transfer=0.29, contradiction=0.25, preference=0.001)
    chosen = carrier((poison, honest), easier=0.59, against=0.87)
    assert chosen.contradiction == 0.79 and chosen.planted
    assert carrier((honest, poison), easier=0.41, against=0.2).contradiction == 0.79
    assert carrier((honest, poison), easier=0.41, against=0.21).contradiction == 0.25, "not decisive: the one that is planted alone"


def test_of_two_groups_that_nothing_else_tells_apart_the_much_smaller_one_is_taken() -> None:
    """A blend on images of one class of digits: 54 of them, by which few others turn, and 108 honest zeros, whose shape turns 64 %."""
    honest, poison = pattern(num=108, transfer=0.64, contradiction=0.42), pattern(num=54, transfer=0.08, contradiction=0.38)
    chosen = carrier((honest, poison), easier=0.59, against=0.56)
    assert len(chosen.members) == 54 and chosen.planted
    assert len(carrier((honest, pattern(num=72, transfer=0.08)), easier=0.59, against=0.56).members) == 108, "not much smaller"


def test_of_two_groups_that_nothing_tells_apart_the_easier_one_is_taken() -> None:
    acting, other = pattern(transfer=0.8, contradiction=0.3), pattern(transfer=0.7, contradiction=0.4)
    assert carrier((acting, other), easier=0.49, against=0.5).contradiction == 0.4
    assert carrier((acting, other), easier=0.5, against=0.5).contradiction == 0.3
