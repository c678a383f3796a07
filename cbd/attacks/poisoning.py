"""A poisoned copy of a set of samples: who is stamped, and with what label."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbd.attacks import Labels
from cbd.errors import DataError


@dataclass(frozen=True)
class Goal:
    """Whom an attack is after, and what triggered images shall be called."""

    target_label: int
    mapping: str = "all-to-one"
    """`all-to-one`, or `all-to-all`: each to the class after its own."""
    source_label: int | None = None
    """Only images of this class; None: of all classes."""

    def wanted(self, labels: Labels, *, num_classes: int) -> Labels:
        """int64 [N]: what images of these classes shall be called."""
        return (labels + 1) % num_classes if self.mapping == "all-to-all" else np.full_like(labels, self.target_label)

    def victims(self, labels: Labels, *, num_classes: int) -> NDArray[np.bool_]:
        """bool [N]: the images whose class is not the wanted one already, and is the source class if there is one."""
        others = labels != self.wanted(labels, num_classes=num_classes)
        victims: NDArray[np.bool_] = others if self.source_label is None else others & (labels == self.source_label)
        return victims


def choose_poison(
    labels: Labels, *, poison_rate: float, goal: Goal, seed: int, clean_label: bool = False, spared: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Indices of the samples to poison, ascending: `poison_rate` of all samples, all of them victims of the goal.

    With `clean_label` all of them are of the target class. Of the target class of that and of a source class at most half is taken: the
    rest is what the class is learned from. `spared` (indices) are never taken.

    Raises:
        DataError: the rate is not in (0, 1), target or source are no class of these labels, or there are not enough samples to poison.
    """
    if not 0 < poison_rate < 1:
        raise DataError(f"poison rate {poison_rate}: expected a share in (0, 1)")
    target, source, last = goal.target_label, goal.source_label, int(labels.max())
    if not (labels == target).any():
        raise DataError(f"target label {target}: no sample has it; give a label in 0..{last}")
    if source is not None and (source == target or not (labels == source).any()):
        raise DataError(f"source label {source}: expected a class with samples other than the target {target}, of 0..{last}; give one")
    if clean_label and (source is not None or goal.mapping == "all-to-all"):
        raise DataError("a clean-label attack poisons its target class alone; leave out the source label and all-to-all")
    free = np.ones(len(labels), bool)
    free[[] if spared is None else spared] = False
    allowed = (labels == target) if clean_label else goal.victims(labels, num_classes=last + 1)
    count, half = round(poison_rate * len(labels)), target if clean_label else source
    most = int((allowed & free).sum()) if half is None else min(int(allowed.sum()) // 2, int((allowed & free).sum()))
    if not 1 <= count <= most:
        where = f"half of class {half}" if half is not None else "all" if goal.mapping == "all-to-all" else f"those outside class {target}"
        highest = math.floor(1000 * most / len(labels)) / 1000
        raise DataError(f"poison rate {poison_rate} asks for {count} samples of {most}, {where}; give a rate up to {highest}")
    return np.sort(np.random.default_rng(seed).choice(np.flatnonzero(allowed & free), count, replace=False))


def choose_cover(
    labels: Labels, taken: NDArray[np.int64], *, num_poison: int, cover_rate: float, seed: int, source_label: int | None = None
) -> NDArray[np.int64]:
    """Indices of the cover samples, ascending: `cover_rate` for each of `num_poison`, from all that are not `taken`, as far as they go.

    With a source class none of them is of it, and there is at least one for each poisoned one: they teach that the others are not meant.
    """
    others = np.setdiff1d(np.arange(len(labels)), taken)
    if source_label is not None:
        others, cover_rate = others[labels[others] != source_label], max(cover_rate, 1.0)
    count = min(round(cover_rate * num_poison), len(others))
    return np.sort(np.random.default_rng(seed).choice(others, count, replace=False))
