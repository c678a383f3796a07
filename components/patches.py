"""The cheapest test for a trigger: does one and the same small patch sit in the same place of many images of one class alone?"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cbd.images import Pixels

SIDE, WINDOW = 3, 16
"""Side of a patch, and of the window in each corner of an image in which patches are looked for, in pixels."""
PLACES = 4 * (WINDOW - SIDE + 1) ** 2
CORNERS = ("top left", "top right", "bottom left", "bottom right")
MIN_IMAGES = 10
TIMES_AS_OFTEN = 5.0
"""A patch counts if it is this many times as frequent in the class as in all others: skies and black margins are everywhere."""
MAX_P_VALUE = 1e-6


class Repeated(NamedTuple):
    """The patch that most images of a class share."""

    label: int
    share: float
    """Of the class's images, in [0, 1]."""
    elsewhere: float
    """Share of the other classes' images that have it in the same place."""
    num_images: int
    """Of the class that were looked at."""
    place: str
    """Corner, and the offset from it in pixels."""


def repeated_patches(images: Iterable[tuple[Pixels, int]], *, num_classes: int) -> list[Repeated]:
    """For every class in which one stands out, the patch that most of its images share, bit for bit in the same place.

    A patch stands out if at least `MIN_IMAGES` images have it, `TIMES_AS_OFTEN` as large a share as of the other classes, and so many more
    than these let expect by chance (binomial, for all places of the class at once). It finds a trigger that is pasted into images of
    lossless formats; one that is blended, warped or compressed afterwards it does not.

    Args:
        images: uint8 RGB [H, W, 3] and label of each; sides of less than `WINDOW` pixels are skipped.
        num_classes: K.
    """
    from scipy.stats import binom

    codes: list[list[NDArray[np.uint64]]] = [[] for _ in range(num_classes)]
    for pixels, label in images:
        if min(pixels.shape[:2]) >= WINDOW:
            codes[label].append(_codes(pixels))
    nums = np.array([len(of) for of in codes])
    sorted_codes = [np.sort(np.concatenate(of)) if of else np.empty(0, np.uint64) for of in codes]
    found = []
    for label, of in enumerate(codes):
        if len(of) < MIN_IMAGES or nums.sum() == len(of):
            continue
        values, counts = np.unique(sorted_codes[label], return_counts=True)
        values, counts = values[counts >= MIN_IMAGES], counts[counts >= MIN_IMAGES]
        others = sum(
            (_count(sorted_codes[other], values) for other in range(num_classes) if other != label), np.zeros(len(values), np.int64)
        )
        share, elsewhere = counts / len(of), others / (nums.sum() - len(of))
        expected = np.maximum(elsewhere * TIMES_AS_OFTEN, 1 / nums.sum())
        p_values = PLACES * binom.sf(counts - 1, len(of), np.minimum(expected, 1.0))
        standing = np.flatnonzero(p_values <= MAX_P_VALUE)
        if len(standing):
            best = standing[np.argmax(share[standing])]
            place = next(int(np.flatnonzero(image == values[best])[0]) for image in of if (image == values[best]).any())
            found.append(Repeated(label, float(share[best]), float(elsewhere[best]), len(of), _place(place)))
    return sorted(found, key=lambda one: -one.share)


_FACTORS = np.random.default_rng(0).integers(2**63, size=SIDE * SIDE * 3, dtype=np.uint64) * 2 + 1
_SHIFTS = np.random.default_rng(1).integers(2**63, size=PLACES, dtype=np.uint64)


def _codes(pixels: Pixels) -> NDArray[np.uint64]:
    """uint64 [PLACES]: a number for every patch that depends on its pixels and its place."""
    top, bottom = pixels[:WINDOW], pixels[-WINDOW:]
    corners = np.stack((top[:, :WINDOW], top[:, -WINDOW:], bottom[:, :WINDOW], bottom[:, -WINDOW:])).astype(np.uint64)
    side = WINDOW - SIDE + 1
    codes = np.zeros((4, side, side), np.uint64)
    for number, (row, column, channel) in enumerate(np.ndindex(SIDE, SIDE, 3)):
        codes += corners[:, row : row + side, column : column + side, channel] * _FACTORS[number]
    return codes.ravel() + _SHIFTS


def _count(codes: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64 [V]: how often each value is among the sorted codes."""
    found: NDArray[np.int64] = np.searchsorted(codes, values, side="right") - np.searchsorted(codes, values, side="left")
    return found


def _place(index: int) -> str:
    corner, row, column = np.unravel_index(index, (4, WINDOW - SIDE + 1, WINDOW - SIDE + 1))
    down, right = int(row), int(column)
    if corner >= 2:
        down = WINDOW - SIDE - down
    if corner % 2:
        right = WINDOW - SIDE - right
    return f"{CORNERS[corner]}, {down} and {right} pixels from the edges"
