"""Evidence on every sample: do the two views tell a group of samples apart, which ones, and how much may each weigh?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EASY_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Shares of the data set that are tried as `the samples that the confounder finds easiest`."""
CONTRADICTED_SHARES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
"""Shares that are tried as `the samples that the pilot contradicts most`."""
MAX_P_VALUE = 1e-3
"""Largest p-value of the reversal at which a group counts as separated."""
BELIEVED = math.log(2)
"""Largest median final loss of a group: the confounder believes its labels more than all others together, so it has learned something."""
MIN_SUSPECTS = 10
AS_EASY = 0.95
"""Quantile of a group's losses up to which a sample is as easy as the group."""
MIN_SEEDS = 50
"""Smallest group that teaches a detector anything."""
MAX_SHARE = 0.5
"""A larger group cannot be told from the honest samples without knowing which is which."""
NUM_GROUPS = 4
CONCENTRATED = 0.9
"""Share of a part of the plane that must bear the label of the group's own class to count as more of the group."""
NUM_BINS = 40


@dataclass(frozen=True)
class Separation:
    """Whether a group of samples stands apart that the confounder finds easy and the pilot contradicts."""

    separated: bool | None
    """None: not measured, because there was no pilot."""
    p_value: float | None
    """Of the reversal: how probable so strong a one is on honest samples."""
    gap: float | None
    """Mean suspicion (log odds of p_b * preference) of the group less that of the rest, in pooled standard deviations; None: no group."""
    share: float | None
    """Share of the data set in the group, in [0, 1]."""
    posterior: Floats
    """float [N] in [0, 1]: probability that a sample belongs to the group; 0 everywhere if nothing separated."""
    joined: float = 0.0
    """Share of the group that is in it for its class and its low losses alone, in [0, 1]: the pilot does not contradict it."""


@dataclass(frozen=True)
class Reversal:
    """How much more often the pilot contradicts what the confounder finds easy than what it finds hard."""

    p_value: float
    """In (0, 1], for all places tried at once (Bonferroni)."""
    log10_p_value: float
    """The same as a logarithm, which does not underflow."""
    inside: NDArray[np.bool_]
    """bool [N]: the samples that are easy and contradicted, where the excess is least probable by chance."""


def reversal(losses: Floats, preferences: Floats) -> Reversal:
    """Tests whether the confounder and the pilot disagree the wrong way round.

    What is easy for one network is easy for another: honest samples, mislabelled ones included, with a low loss are contradicted no more
    often than those with a high loss (positive quadrant dependence: Lehmann, Ann. Math. Statist. 1966). Only a backdoor with changed
    labels is easy for the one that learned the trigger and contradicted by the one that did not. For every pair of an easy share and a
    contradicted share, Fisher's exact test asks whether there are more samples in both than independence allows, which positive
    dependence makes fewer. Neither a rate nor a shape of any distribution is assumed.

    Args:
        losses: float [N] > 0, the confounder's.
        preferences: float [N] in [0, 1], how far the pilot prefers another class than the given label.
    """
    from scipy.stats import hypergeom

    places = [(np.quantile(losses, easy), np.quantile(preferences, 1 - against)) for easy in EASY_SHARES for against in CONTRADICTED_SHARES]
    best, inside = 0.0, np.zeros(len(losses), bool)
    for loss, preference in places:
        easy, against = losses <= loss, preferences > preference
        log_p = float(hypergeom.logsf((easy & against).sum() - 1, len(losses), against.sum(), easy.sum()))
        if log_p < best:
            best, inside = log_p, easy & against
    log10 = min(0.0, (best + math.log(len(places))) / math.log(10))
    return Reversal(10**log10, log10, inside)


def separate(losses: Floats, preferences: Floats, final_losses: Floats, labels: NDArray[np.int64], *, seed: int) -> Separation:
    """Looks for poison as a group of its own in the plane of what the two views say, both as log odds.

    The coordinates are the log odds of p_b = exp(-loss) and of the preference. Whether there is a group is decided by the `reversal`; who
    belongs to it by a Gaussian mixture of `NUM_GROUPS`, whose first component starts from the samples where the reversal shows; another
    one of which nearly all have the label that most of the first have is more of the same. A
    confounder that has learned nothing yet finds the most frequent classes easy, which an adjusted pilot contradicts: so it must believe
    the group's labels in the end. Clean-label poison is not seen by this: nothing contradicts its labels.

    The losses of two moments are tried: first the mean over the training, which ranks better, and if it shows nothing the last ones, since
    a trigger that was learned late (after many classes) is hard on average and easy in the end.

    Args:
        losses: float [N] > 0, the confounder's.
        preferences: float [N] in [0, 1], how far the pilot prefers another class than the given label.
        final_losses: float [N] > 0, the confounder's at its end.
        labels: int64 [N], as given.
        seed: of the other components' starting points.
    """
    found = reversal(losses, preferences)
    if 2 * found.p_value > MAX_P_VALUE and (late := reversal(final_losses, preferences)).p_value < found.p_value:
        found, losses = late, final_losses
    p_value = min(1.0, 2 * found.p_value)
    nothing = Separation(False, p_value, None, 0.0, np.zeros(len(losses)))
    if p_value > MAX_P_VALUE or len(losses) < 10 * NUM_GROUPS:
        return nothing
    posterior, joined = _membership(np.column_stack((_log_odds(np.exp(-losses)), _log_odds(preferences))), found.inside, labels, seed=seed)
    group = posterior > 0.5
    if not MIN_SUSPECTS <= group.sum() <= MAX_SHARE * len(group) or np.median(final_losses[group]) > BELIEVED:
        return nothing
    share = float((group & (joined > 0.5)).sum() / group.sum())
    return Separation(True, p_value, _gap(losses, preferences, group), float(group.mean()), posterior, share)


def swallowed(separation: Separation, losses: Floats, labels: NDArray[np.int64]) -> NDArray[np.bool_] | None:
    """bool [N]: what a pilot must do without to judge it, since the one that has flown has learned the trigger; None if it has not.

    It has if it no longer contradicts most of the group. These are the samples of the group's class that the confounder finds as easy as
    nearly all of the group.

    Args:
        separation: of the pilot that has flown.
        losses: float [N] > 0, the confounder's.
        labels: int64 [N], as given.
    """
    if separation.joined <= 0.5:
        return None
    group = separation.posterior > 0.5
    own_class = labels == np.bincount(labels[group]).argmax()
    as_easy: NDArray[np.bool_] = own_class & (losses <= np.quantile(losses[group], AS_EASY))
    return as_easy


def teaches(separation: Separation, labels: NDArray[np.int64], patterns: Sequence[NDArray[np.int64]]) -> bool:
    """Whether the group can teach a detector anything: it is large enough, of one class, and no pattern explains the most of it.

    Args:
        separation: by confounder and pilot.
        labels: int64 [N], as given.
        patterns: indices of the samples that carry each planted pattern.
    """
    group = separation.posterior > 0.5
    if not separation.separated or group.sum() < MIN_SEEDS:
        return False
    one_class = (labels[group] == np.bincount(labels[group]).argmax()).mean() >= CONCENTRATED
    explained = group[np.unique(np.concatenate(patterns))].sum() if patterns else 0
    return bool(one_class and explained < 0.5 * group.sum())


def with_groups(separation: Separation, groups: Sequence[tuple[NDArray[np.int64], Floats | float]]) -> Separation:
    """The separation with more suspects: groups that another view has found, as sample indices and posteriors; unchanged without any."""
    if not groups:
        return separation
    posterior = separation.posterior.copy()
    for members, probability in groups:
        posterior[members] = np.maximum(posterior[members], probability)
    return replace(separation, separated=True, share=float((posterior > 0.5).mean()), posterior=posterior)


def isolation_weights(posterior: Floats) -> Floats:
    """max(0, 1 - 2 * posterior), float [N] in [0, 1]: a suspect weighs nothing, a sample of whom nothing is said 1."""
    weights: Floats = (1 - 2 * posterior).clip(0)
    return weights


def _membership(plane: Floats, inside: NDArray[np.bool_], labels: NDArray[np.int64], *, seed: int) -> tuple[Floats, Floats]:
    """float [N] twice: posterior of the component that starts from the points `inside` with those of hardly any other label than its own,
    and of the latter alone.

    The other components start from clusters of the rest.
    """
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    scaled = (plane - plane.mean(0)) / plane.std(0).clip(1e-9)
    start = np.zeros((len(plane), NUM_GROUPS))
    start[inside, 0] = 1
    rest = np.flatnonzero(~inside)
    start[rest, 1 + KMeans(NUM_GROUPS - 1, n_init=3, random_state=seed).fit(scaled[rest]).labels_] = 1
    sizes, ridge = start.sum(0), 1e-3
    means = (start.T @ scaled) / sizes[:, None]
    offsets = [scaled[start[:, group] == 1] - means[group] for group in range(NUM_GROUPS)]
    precisions = [np.linalg.inv(offset.T @ offset / len(offset) + ridge * np.eye(2)) for offset in offsets]
    mixture = GaussianMixture(
        NUM_GROUPS,
        weights_init=sizes / sizes.sum(),
        means_init=means,
        precisions_init=np.array(precisions),
        reg_covar=ridge,
        max_iter=200,
        random_state=seed,
    )
    posteriors = mixture.fit(scaled).predict_proba(scaled)
    nearest = posteriors.argmax(1)
    same = labels == np.bincount(labels[nearest == 0] if (nearest == 0).any() else labels).argmax()
    more = [part for part in range(1, NUM_GROUPS) if (nearest == part).any() and same[nearest == part].mean() >= CONCENTRATED]
    joined = posteriors[:, more].sum(1)
    return (posteriors[:, 0] + joined).clip(0, 1), joined


def _log_odds(probabilities: Floats) -> Floats:
    clipped = probabilities.clip(1e-3, 1 - 1e-3)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds


def _gap(losses: Floats, preferences: Floats, group: NDArray[np.bool_]) -> float:
    suspicion = _log_odds(np.exp(-losses) * preferences)
    inside, outside = suspicion[group], suspicion[~group]
    pooled = math.sqrt((inside.var() + outside.var()) / 2)
    return round(float(inside.mean() - outside.mean()) / max(pooled, 1e-9), 3)


def rank_samples(
    posterior: Floats, losses: Floats, preferences: Floats, final_losses: Floats, labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """int64 [N]: rank of every sample, 0 the most suspicious.

    First those whose posterior is 1 (shared patterns, whose labels may be true), then by the sum of the log odds of the posterior, of
    1 - p_c, where p_c = exp(-final loss) is how far the deconfounded model, which was trained without the suspects, believes the label
    after all, and of the mean posterior of all that have the same label: who found some poison in a class expects the rest there. Ties by
    exp(-loss) * preference.

    Args:
        posterior: float [N] in [0, 1]; of doubted samples 1/2.
        losses: float [N] > 0, the confounder's.
        preferences: float [N] in [0, 1], the pilot's.
        final_losses: float [N] >= 0, the deconfounded model's.
        labels: int64 [N] >= 0, as given.
    """
    of_class = np.bincount(labels, posterior) / np.bincount(labels).clip(1)
    doubt = np.where(posterior == 1, np.inf, _log_odds(posterior) + _log_odds(1 - np.exp(-final_losses)) + _log_odds(of_class)[labels])
    order = np.lexsort((-np.exp(-losses) * preferences, -doubt))
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
