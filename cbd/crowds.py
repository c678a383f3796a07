"""Fourth view of every sample: is a class crowded with labels that the pilot contradicts, and which samples do not belong there?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cbd.evidence import MAX_P_VALUE, Floats

CONTRADICTED, CROWDED, MIN_CROWD = 0.5, 2.0, 40
"""Preference above which a label counts as contradicted; how many times as often as in any other class; smallest class that is asked."""


@dataclass(frozen=True)
class Crowd:
    """A class with far more contradicted labels than any other."""

    label: int
    members: NDArray[np.int64]
    """Indices of its harder samples, ascending."""
    posterior: Floats
    """float in (0.5, 1]: of each member, the probability that it is one of the harder samples."""
    p_value: float
    share: float
    """Of its labels that the pilot contradicts, in [0, 1]."""


def crowded_classes(
    losses: Floats,
    preferences: Floats,
    logits: Floats,
    labels: NDArray[np.int64],
    *,
    known: NDArray[np.bool_],
    counts: NDArray[np.int64],
) -> list[Crowd]:
    """Classes that hold far more contradicted labels than any other, and which of their samples do not belong there.

    Poison whose trigger nobody has learned yet is mislabelled data, all of it in one class: hard for the confounder, contradicted by the
    pilot. A class is crowded if the share of its labels that the pilot clearly contradicts is more than `CROWDED` times that of every
    other class (exact binomial test, for all classes at once). Its samples are then split in two by their losses. Honest hard classes are
    confused with each other, so that no single one stands out so far; labels that a supplier got wrong in one class do look like this.
    The pilot was held back from a class as large as the labels that it learned from made it. Where another view has set some of them
    aside, the rest of the class gets back the log of what it was larger by, in the pilot's last look; without that the honest rest would
    look contradicted. It is compared with the last looks at other classes, too: one look contradicts more than a running mean does. In all
    other classes the running preference counts, which jumps less in a class of a few dozen images.

    Args:
        losses: float [N] > 0, the confounder's.
        preferences: float [N] in [0, 1], the pilot's running ones.
        logits: float [N, K], of the pilot's last look, without the log prior of the labels.
        labels: int64 [N], as given.
        known: bool [N], suspects of another view, which are left out.
        counts: int64 [K], how many labels of each class the pilot learned from.
    """
    from scipy.special import softmax
    from scipy.stats import binom
    from sklearn.mixture import GaussianMixture

    num = np.bincount(labels[~known], minlength=logits.shape[1])
    probabilities = softmax(logits + np.log(counts.clip(1) / num.clip(1)), axis=1)
    last = probabilities.max(1) - probabilities[np.arange(len(labels)), labels]
    looks = [np.bincount(labels[~known & (look > CONTRADICTED)], minlength=len(num)) for look in (preferences, last)]
    contradicted = np.where(num == counts, *looks)
    shares = contradicted / num.clip(1)
    crowds = []
    for label in np.flatnonzero(num >= MIN_CROWD):
        others = shares if num[label] == counts[label] else np.maximum(shares, looks[1] / num.clip(1))
        limit = CROWDED * np.delete(others, label).max(initial=0.0)
        p_value = min(1.0, len(num) * float(binom.sf(contradicted[label] - 1, num[label], min(1.0, max(limit, 1 / num[label])))))
        if p_value > MAX_P_VALUE:
            continue
        members = np.flatnonzero((labels == label) & ~known)
        values = np.log(losses[members])[:, None]
        mixture = GaussianMixture(2, n_init=3, random_state=0).fit(values)
        hard = mixture.predict_proba(values)[:, np.argmax(mixture.means_[:, 0])]
        crowds.append(Crowd(int(label), members[hard > 0.5], hard[hard > 0.5], p_value, float(shares[label])))
    return crowds
