"""Third view of every sample: do some images of a class share a fixed pattern that the rest of the class lacks?

The two trained views need a label that the rest of the data contradicts, and a confounder that has learned the trigger. A trigger that is
the same on every image needs neither: it moves all its images by the same step, in a direction in which natural images hardly differ.
Pixels are whitened by what images differ in within their classes, which makes that step stand out, and each class is asked whether it
falls into two groups along some direction (Tran et al., NeurIPS 2018, and Hayase et al., ICML 2021, look for poison so in the
embeddings of a network). A warp, or a trigger that is different on every image, is not seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cbd.anomaly import CONSISTENT
from cbd.models import Network
from cbd.training import predict

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
SIDE = 32
"""Larger images are shrunk to this side for the search."""
RIDGE = 0.01
"""Share of the mean variance that is added to each."""
FOLDS = 5
MIN_SAMPLES, MAX_ROUNDS, NUM_IMAGES = 40, 10, 500
MIN_MEMBERS = 30
"""Of either group: fewer may be frames of one video, and so little poison is hardly learned."""
MIN_GAP = 5.0
"""Standard deviations between the two groups of a class. Honest classes: at most 2.8 in 10 of CIFAR-10, but 10.7 in 43 of GTSRB, where 15
frames of one sign are a group, and 8.5 in 40 of digits."""
MIN_TRANSFER, SURE_TRANSFER = 0.15, 0.9
"""Share of other classes' images that a pattern must turn to its class to count as a trigger: at least so much and at most so much."""
OUTLYING = 3.0
"""Robust standard deviations above what honest patterns of the same data turn."""
MIN_CONTRADICTION = 0.8
"""How often the pilot must contradict a member of the group more than an image outside it (AUROC)."""
FAR_EASIER, MORE_AGAINST = 0.95, 0.8
"""How often the confounder must find a member of one group easier than one of the other, or the pilot contradict it more, to tell which of
them is poison (AUROC). Of learned triggers on photographs 0.98 or more are easier; on digits, where all is easy, 0.6 to 0.86."""
MUCH_SMALLER = 2 / 3
"""Size of one group in that of the other, under which it is taken where nothing else tells."""
MIN_PREFERENCE = 0.2
"""Median preference of a contradicted group. Wrong labels have 0.31 or more, also with a weak pilot; 75 honest nines that were a little
harder than other digits, 0.02."""


@dataclass(frozen=True)
class Pattern:
    """Two groups of one class, and what sets one apart."""

    label: int
    members: NDArray[np.int64]
    """Indices of the samples that carry the pattern, ascending."""
    gap: float
    """Distance of the two groups in the larger of their standard deviations, along a direction that the measured had no part in."""
    transfer: float | None
    """Share of images of other classes that the confounder calls `label` once the pattern is added, in [0, 1]; None: there are none."""
    contradiction: float
    """How often the pilot contradicts a member more than an image outside the group, in [0, 1]; 0.5 is as often as not."""
    preference: float
    """Median preference of the pilot for another label among the members, in [0, 1]: whether it contradicts them at all."""
    mean: Floats
    """float32 [3, s, s]: the pattern, in grey levels."""
    least_transfer: float = MIN_TRANSFER
    """From which transfer on a pattern counts as a trigger on this data."""

    @property
    def planted(self) -> bool:
        """Whether it is one pattern for all, and either acts as a trigger or carries labels that the rest of the data contradicts."""
        acts = (self.transfer or 0.0) >= self.least_transfer
        return self.gap >= MIN_GAP and (acts or self.contradicted)

    @property
    def contradicted(self) -> bool:
        """Whether the pilot contradicts the members more than others, and not just a little more than hardly at all."""
        return self.contradiction >= MIN_CONTRADICTION and self.preference >= MIN_PREFERENCE


def find_patterns(images: Tensor, labels: Tensor, confounder: Network, *, losses: Tensor, preferences: Tensor, seed: int) -> list[Pattern]:
    """The clearest pattern of every class that has one, and after a planted one the next; the clearest first.

    For each class the search starts from the samples that the confounder finds easiest, from those that the pilot contradicts most and
    from those farthest from the class's mean, and then alternates: the direction that best tells the group from the rest of the class
    (Fisher's linear discriminant), and the two groups along it (two means). How much a pattern must turn depends on what the indistinct
    ones of the other classes turn, which are honest (see `least_transfer`).

    Args:
        images: uint8 [N, 3, S, S].
        labels: int64 [N], as given.
        confounder: the frozen confounder, on the device of the images.
        losses: float32 [N], the confounder's.
        preferences: float32 [N], the pilot's.
        seed: of the parts by which a gap is measured, and of the images of other classes that a pattern is added to.
    """
    given, easy, against = labels.cpu().numpy(), losses.cpu().numpy(), preferences.cpu().numpy()
    search = _Search(images, given, easy, against, confounder, np.random.default_rng(seed))
    classes = {label: np.flatnonzero(given == label) for label in range(int(given.max()) + 1)}
    first = {label: search.clearest(label, chosen) for label, chosen in classes.items()}
    honest = [pattern.transfer for pattern in first.values() if pattern and pattern.gap < MIN_GAP and pattern.transfer is not None]
    limit, found = least_transfer(honest), []
    for label, pattern in first.items():
        chosen = classes[label]
        while pattern is not None:
            pattern = replace(pattern, least_transfer=limit)
            found.append(pattern)
            if not pattern.planted:
                break
            chosen = np.setdiff1d(chosen, pattern.members)  # another supplier may have another one
            pattern = search.clearest(label, chosen)
    return sorted(found, key=lambda pattern: -pattern.gap)


def least_transfer(honest: Sequence[float]) -> float:
    """From which transfer on a pattern counts as a trigger: far above the transfers of honest patterns, within [0.15, 0.9].

    Median + `OUTLYING` * 1.4826 * median absolute deviation. A network that many things turn, such as one of 43 signs, is turned by honest
    patterns, too.
    """
    if not honest:
        return MIN_TRANSFER
    middle = float(np.median(honest))
    outlying = middle + OUTLYING * CONSISTENT * float(np.median(np.abs(np.array(honest) - middle)))
    return min(max(MIN_TRANSFER, outlying), SURE_TRANSFER)


def carrier(sides: tuple[Pattern, Pattern], *, easier: float, against: float) -> Pattern:
    """Of the two groups of a class, the one that carries the pattern; the other is honest, and its pattern is the lack of it.

    Lacking a trigger may turn images as well as having it does, so that the transfer of either counts for both, and does not tell which it
    is. Labels that are plainly wrong do; else what the confounder finds far easier wears a trigger that it has learned; else the pilot
    contradicts the poison more, if not by much. Where both networks have learned all of it, nothing tells but the size: the group that is
    much smaller, else the one that is planted alone, or the easier one.

    Args:
        sides: the groups as patterns.
        easier: how often the confounder finds a member of the first easier than one of the second, in [0, 1].
        against: how often the pilot contradicts a member of the first more than one of the second, in [0, 1].
    """
    transfers = [side.transfer for side in sides if side.transfer is not None]
    first, second = (replace(side, transfer=max(transfers, default=None)) for side in sides)
    contradicted = [side for side in (first, second) if side.contradicted]
    if contradicted:
        return max(contradicted, key=lambda side: side.contradiction)
    for decisive, share in ((FAR_EASIER, easier), (MORE_AGAINST, against)):
        if max(share, 1 - share) >= decisive:
            return first if share > 0.5 else second
    if min(len(first.members), len(second.members)) < MUCH_SMALLER * max(len(first.members), len(second.members)):
        return min(first, second, key=lambda side: len(side.members))
    if sides[0].planted != sides[1].planted:
        return first if sides[0].planted else second
    return first if easier >= 0.5 else second


class _Search:
    """The search in one class after the other."""

    def __init__(
        self,
        images: Tensor,
        labels: NDArray[np.int64],
        losses: Floats,
        against: Floats,
        confounder: Network,
        generator: np.random.Generator,
    ) -> None:
        self.losses, self.against, self.confounder, self.generator = losses, against, confounder, generator
        drawn = generator.permutation(len(labels))[:NUM_IMAGES]
        self.tried, self.given = images[torch.from_numpy(drawn).to(images.device)], labels[drawn]
        self.called = predict(confounder, self.tried).argmax(1).cpu().numpy()
        self.pixels = _small(images)
        self.vectors = _whitened(self.pixels, labels)

    def clearest(self, label: int, chosen: NDArray[np.int64]) -> Pattern | None:
        """The pattern with the largest gap among the chosen samples of the class; None if there are too few, or if none holds."""
        if len(chosen) < MIN_SAMPLES:
            return None
        vectors, found = self.vectors[chosen], []
        part = self.generator.integers(FOLDS, size=len(chosen))
        for start in self._starts(chosen, np.square(vectors).sum(1)):
            group = _grow(vectors, start, part)
            values = None if group is None else _projected(vectors, group, part)
            if group is not None and values is not None:
                found.append((_gap(values, group), group))
        if not found:
            return None
        gap, group = max(found, key=lambda pair: pair[0])
        inside, outside = chosen[group], chosen[~group]
        easier = _more_often(self.losses[outside], self.losses[inside])
        if gap < MIN_GAP:
            return self._pattern(label, chosen, group if easier >= 0.5 else ~group, gap)
        sides = self._pattern(label, chosen, group, gap), self._pattern(label, chosen, ~group, gap)
        return carrier(sides, easier=easier, against=_more_often(self.against[inside], self.against[outside]))

    def _starts(self, chosen: NDArray[np.int64], far: Floats) -> Iterable[Mask]:
        """bool [n] each: the easiest, the most contradicted and the farthest of the chosen samples."""
        easy, against = self.losses[chosen], self.against[chosen]
        yield easy <= np.quantile(easy, 0.2)
        yield against >= np.quantile(against, 0.9)
        yield far >= np.quantile(far, 0.9)

    def _pattern(self, label: int, chosen: NDArray[np.int64], group: Mask, gap: float) -> Pattern:
        members = chosen[group]
        mean = self.pixels[members].mean(0) - self.pixels[chosen[~group]].mean(0)
        against, others = self.against[members], np.delete(self.against, members)
        return Pattern(label, members, gap, self._transfer(mean, label), _more_often(against, others), float(np.median(against)), mean)

    def _transfer(self, mean: Floats, label: int) -> float | None:
        """Share of images of other classes, not called `label` as they are, that are called so with the pattern added."""
        others = (self.given != label) & (self.called != label)
        if not others.any():
            return None
        images = self.tried[torch.from_numpy(others).to(self.tried.device)]
        step = F.interpolate(torch.from_numpy(mean)[None], images.shape[-2:], mode="nearest").to(images.device)
        moved = (images + step).round().clamp(0, 255).to(torch.uint8)
        return float((predict(self.confounder, moved).argmax(1) == label).float().mean())


def _whitened(pixels: Floats, labels: NDArray[np.int64]) -> Floats:
    """float32 [N, D]: images as vectors less their class's mean, turned and scaled so that their covariance is about the identity.

    In such vectors the discriminant direction between two groups (Fisher) is the difference of their means.
    """
    vectors = pixels.reshape(len(pixels), -1).copy()
    for label in np.unique(labels):
        vectors[labels == label] -= vectors[labels == label].mean(0)
    covariance = torch.from_numpy(vectors.T @ vectors / len(vectors))
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    factor = torch.linalg.cholesky(covariance)
    whitened: Floats = torch.linalg.solve_triangular(factor, torch.from_numpy(vectors.T), upper=False).T.numpy()
    return whitened


def _small(images: Tensor) -> Floats:
    """float32 [N, 3, s, s] with s of at most `SIDE` pixels."""
    if images.shape[-1] <= SIDE:
        return images.cpu().float().numpy()
    return torch.cat([F.interpolate(part.float(), (SIDE, SIDE), mode="area") for part in torch.split(images.cpu(), 512)]).numpy()


def _grow(vectors: Floats, group: Mask, part: NDArray[np.int64]) -> Mask | None:
    """bool [n]: one of the two groups into which the samples fall, grown from `group`; None if one of them is too small.

    Each sample is projected on the direction of the other parts. With more pixels than samples a direction sets apart whatever group it
    was made from: nothing would ever change sides.
    """
    for _ in range(MAX_ROUNDS):
        values = _projected(vectors, group, part)
        if values is None:
            return None
        grown = _two_means(values, group)
        if (grown == group).all():
            break
        group = grown
    return group if min(group.sum(), (~group).sum()) >= MIN_MEMBERS else None


def _projected(vectors: Floats, group: Mask, part: NDArray[np.int64]) -> Floats | None:
    """float32 [n]: each sample along the direction between the two groups in the other parts; None if one has no group there."""
    values = np.empty(len(vectors), np.float32)
    for held in (part == fold for fold in range(FOLDS)):
        inside, outside = vectors[~held & group], vectors[~held & ~group]
        if not (len(inside) and len(outside)):
            return None
        values[held] = vectors[held] @ (inside.mean(0) - outside.mean(0))
    return values


def _two_means(values: Floats, group: Mask) -> Mask:
    """bool [n]: the values nearer to the mean of the group than to that of the rest, repeated until nothing moves."""
    for _ in range(20):
        middle = (values[group].mean() + values[~group].mean()) / 2
        moved = values > middle if values[group].mean() > middle else values < middle
        if (moved == group).all() or moved.all() or not moved.any():
            break
        group = moved
    return group


def _gap(values: Floats, group: Mask) -> float:
    """The distance between the two groups of the values [n], in the larger of their standard deviations.

    The larger, because near-duplicates (frames of one video) are tight, but the rest is not.
    """
    inside, outside = values[group], values[~group]
    return float((inside.mean() - outside.mean()) / max(inside.std(), outside.std(), 1e-9))


def _more_often(inside: Floats, outside: Floats) -> float:
    """The probability that a value inside is larger than one outside, ties counted half (AUROC)."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(inside, outside).statistic / (len(inside) * len(outside)))
