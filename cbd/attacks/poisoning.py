"""A poisoned copy of a set of samples: who is stamped, and with what label."""

import math

import numpy as np
from numpy.typing import NDArray

from cbd.attacks import Attack, Images
from cbd.errors import DataError


def choose_poison(
    labels: NDArray[np.int64], *, poison_rate: float, target_label: int, seed: int, clean_label: bool = False
) -> NDArray[np.int64]:
    """Indices of the samples to poison, ascending: `poison_rate` of all samples, none of them of the target class.

    With `clean_label` all of them are of the target class, and at most half of it: the rest is what the class is learned from.

    Raises:
        DataError: the rate is not in (0, 1), the target is no class of these labels, or there are not enough samples to poison.
    """
    if not 0 < poison_rate < 1:
        raise DataError(f"poison rate {poison_rate}: expected a share in (0, 1)")
    if not (labels == target_label).any():
        raise DataError(f"target label {target_label}: no sample has it; give a label in 0..{int(labels.max())}")
    count, allowed = round(poison_rate * len(labels)), np.flatnonzero((labels == target_label) == clean_label)
    most, where = (
        (len(allowed) // 2, f"half of class {target_label}") if clean_label else (len(allowed), f"those outside class {target_label}")
    )
    if not 1 <= count <= most:
        highest = math.floor(1000 * most / len(labels)) / 1000
        raise DataError(f"poison rate {poison_rate} asks for {count} samples of {most}, {where}; give a rate up to {highest}")
    return np.sort(np.random.default_rng(seed).choice(allowed, count, replace=False))


def choose_cover(labels: NDArray[np.int64], poison: NDArray[np.int64], *, cover_rate: float, seed: int) -> NDArray[np.int64]:
    """Indices of the cover samples, ascending: `cover_rate` for each poisoned one, from all that are not poisoned, as far as they go."""
    others = np.setdiff1d(np.arange(len(labels)), poison)
    count = min(round(cover_rate * len(poison)), len(others))
    return np.sort(np.random.default_rng(seed).choice(others, count, replace=False))


def stamp_each(attack: Attack, images: list[Images]) -> list[Images]:
    """Triggered copies of images of different sizes (each uint8 [3, H, W]).

    Raises:
        DataError: the trigger leaves every image exactly as it was.
    """
    stamped = [attack.stamp(image[None])[0] for image in images]
    if images and all(np.array_equal(before, after) for before, after in zip(images, stamped, strict=True)):
        raise DataError(f"the trigger leaves every pixel of {len(images)} images unchanged; choose another trigger")
    return stamped
