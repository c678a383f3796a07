"""Whether one of K numbers is far below the others: a statistic, and p-values that hold for this K."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_CLASSES = 5
"""With fewer numbers no spread can be told, so that nothing stands out."""
DRAWS = 9_999
"""Of the Monte-Carlo null."""
CONSISTENT = 1.4826
"""Makes the median absolute deviation of normal numbers their standard deviation."""
LEAST_SPREAD = 0.05
"""A norm is repeated by another seed to no less than some percent: a smaller spread of the logarithms is taken for this."""


def anomaly_indices(log_norms: Floats) -> Floats:
    """How many robust standard deviations each number is below the median of its row: float64 [..., K] of float64 [..., K].

    (median - x) / (1.4826 * MAD) of Wang et al., IEEE S&P 2019, section IV, on logarithms: norms are positive and spread by factors.
    """
    median = np.median(log_norms, axis=-1, keepdims=True)
    spread = CONSISTENT * np.median(np.abs(log_norms - median), axis=-1, keepdims=True)
    indices: Floats = (median - log_norms) / np.maximum(spread, LEAST_SPREAD)
    return indices


def rank_p_value(statistic: float, null: Floats) -> float:
    """(1 + number of `null` (float64 [n]) that are at least `statistic`) / (1 + n): exact where all n + 1 are exchangeable."""
    return (1 + int((null >= statistic).sum())) / (1 + len(null))


def monte_carlo_p_value(statistic: float, num_classes: int, *, seed: int) -> float:
    """Rank of a largest anomaly index among those of K independent normal numbers, drawn `DRAWS` times from `seed`.

    The spread of the numbers plays no part, since the index is free of it; that the logarithms of a harmless model's norms are about
    normal is an assumption, which harmless controls (`rank_p_value`) do not need.
    """
    return rank_p_value(statistic, _normal_null(num_classes, seed))


def enough_controls(num_controls: int, alpha: float) -> bool:
    """Whether a rank among so many controls can be as small as `alpha` at all: 1 / (n + 1) <= alpha."""
    return num_controls >= math.ceil(1 / alpha - 1e-9) - 1


def p_value(log_norms: Sequence[float], controls: Sequence[float], *, alpha: float, seed: int) -> tuple[float | None, float | None, str]:
    """(statistic, p-value, method) of K log norms; the first two are None where the method is `not-applicable`.

    `controls`: the rank among the statistics of harmless models, where there are enough of them to reach `alpha`. `monte-carlo`: see
    `monte_carlo_p_value`. `not-applicable`: neither, with fewer than `MIN_CLASSES` classes.
    """
    statistic = float(anomaly_indices(np.array(log_norms, np.float64)).max())
    if enough_controls(len(controls), alpha):
        return statistic, rank_p_value(statistic, np.array(controls, np.float64)), "controls"
    if len(log_norms) < MIN_CLASSES:
        return None, None, "not-applicable"
    return statistic, monte_carlo_p_value(statistic, len(log_norms), seed=seed), "monte-carlo"


@lru_cache(4)
def _normal_null(num_classes: int, seed: int) -> Floats:
    """float64 [DRAWS]: largest anomaly index of so many normal numbers, spread so widely that `LEAST_SPREAD` plays no part."""
    drawn = 100 * np.random.default_rng(seed).standard_normal((DRAWS, num_classes))
    largest: Floats = anomaly_indices(drawn).max(-1)
    return largest
