"""Evidence on every sample: do the two views tell a group of samples apart, which ones, and how much may each weigh?"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MIN_GAP = 3.0
"""Least distance, in pooled standard deviations, between the suspects and every other group."""
MIN_PREFERENCE = 0.15
"""Least mean preference of the pilot for another class in a suspect group."""
EASY = math.log(math.log(2))
"""Log of the loss at even odds: below it the confounder believes the given label more than all others together."""
MIN_SUSPECTS = 10
MAX_SHARE = 0.5
"""A larger group cannot be told from the honest samples without knowing which is which."""
NUM_GROUPS = 4
NUM_BINS = 40


@dataclass(frozen=True)
class Separation:
    """Whether a group of samples stands apart that the confounder finds easy and the pilot contradicts."""

    separated: bool | None
    """None: not measured, because there was no pilot."""
    gap: float | None
    """Distance to the nearest other group in pooled standard deviations; larger is clearer."""
    share: float | None
    """Share of the data set in the group, in [0, 1]."""
    posterior: Floats
    """float [N] in [0, 1]: probability that a sample belongs to the group; 0 everywhere if nothing separated."""


def separate(losses: Floats, preferences: Floats, *, seed: int) -> Separation:
    """Looks for poison as a group of its own in the plane of log confounder loss and the pilot's preference for another class.

    A Gaussian mixture of `NUM_GROUPS` is fitted to the plane; suspect are the groups that the confounder believes and the pilot does not.
    Only a dirty-label backdoor is low in the one and high in the other: easy clean samples are low in both, hard and mislabelled ones
    high in both. Clean-label poison is not seen by this.

    Args:
        losses: float [N] > 0, the confounder's.
        preferences: float [N] in [0, 1], how far the pilot prefers another class than the given label.
        seed: of the mixture's starting points.
    """
    from sklearn.mixture import GaussianMixture

    plane = np.column_stack((np.log(losses), preferences))
    spread = plane.std(0)
    if len(plane) < 10 * NUM_GROUPS or not (spread > 1e-9).all():
        return Separation(False, 0.0, 0.0, np.zeros(len(plane)))
    scaled = (plane - plane.mean(0)) / spread
    mixture = GaussianMixture(NUM_GROUPS, n_init=2, random_state=seed, reg_covar=1e-4).fit(scaled)
    means = mixture.means_ * spread + plane.mean(0)
    suspect = (means[:, 0] < EASY) & (means[:, 1] >= MIN_PREFERENCE)
    if not suspect.any() or suspect.all():
        return Separation(False, 0.0, 0.0, np.zeros(len(plane)))
    posterior = mixture.predict_proba(scaled)[:, suspect].sum(1)
    inside = posterior > 0.5
    gap = min(_distance(mixture, int(one), int(other)) for one in np.flatnonzero(suspect) for other in np.flatnonzero(~suspect))
    found = gap >= MIN_GAP and MIN_SUSPECTS <= inside.sum() <= MAX_SHARE * len(plane)
    return Separation(bool(found), round(gap, 3), float(inside.mean()), posterior if found else np.zeros(len(plane)))


def _distance(mixture: Any, one: int, other: int) -> float:
    """Mahalanobis distance between two components under their mean covariance."""
    apart = mixture.means_[one] - mixture.means_[other]
    covariance = (mixture.covariances_[one] + mixture.covariances_[other]) / 2
    return float(np.sqrt(apart @ np.linalg.solve(covariance, apart)))


def rank_samples(posterior: Floats, losses: Floats, preferences: Floats) -> NDArray[np.int64]:
    """int64 [N]: rank of every sample, 0 the most suspicious: by posterior, then by exp(-loss) * preference."""
    order = np.lexsort((-np.exp(-losses) * preferences, -posterior))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def histogram(losses: Floats) -> dict[str, list[float]]:
    """Counts of log10(loss) in equal bins, as the report draws them."""
    counts, edges = np.histogram(np.log10(losses), NUM_BINS)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def detection(scores: Floats, poisoned: NDArray[np.bool_]) -> dict[str, float] | None:
    """AUROC, average precision and true-positive rate at 1 % false positives of `scores` (high: suspicious); None without both kinds."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if poisoned.all() or not poisoned.any():
        return None
    limit = np.quantile(scores[~poisoned], 0.99)
    return {
        "auroc": float(roc_auc_score(poisoned, scores)),
        "average_precision": float(average_precision_score(poisoned, scores)),
        "tpr_at_1_percent_fpr": float((scores[poisoned] > limit).mean()),
    }
