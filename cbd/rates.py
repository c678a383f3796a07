"""Rates with exact bounds: every rate is told as k of n, never as a bare number."""

from typing import TypedDict

from scipy.special import betaincinv

from cbd.errors import DataError


class Rate(TypedDict):
    """k of n, the rate in [0, 1], and its one-sided exact bounds. All but k and n are None when n is 0."""

    k: int
    n: int
    rate: float | None
    low: float | None
    high: float | None


def rate(k: int, n: int, *, confidence: float = 0.95) -> Rate:
    """k of n with one-sided Clopper-Pearson bounds, each at `confidence`.

    Source: Clopper and Pearson, Biometrika 1934: low = Beta(1 - confidence; k, n - k + 1), high = Beta(confidence; k + 1, n - k).

    Raises:
        DataError: not 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise DataError(f"a rate needs 0 <= k <= n, got k = {k}, n = {n}")
    if n == 0:
        return Rate(k=0, n=0, rate=None, low=None, high=None)
    low = float(betaincinv(k, n - k + 1, 1 - confidence)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, confidence)) if k < n else 1.0
    return Rate(k=int(k), n=int(n), rate=k / n, low=low, high=high)
