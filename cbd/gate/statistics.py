"""The statistics of the gate, exact at any number of images."""

from collections.abc import Sequence

from scipy.special import betainc

from cbd.rates import Rate, rate


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for all of them being tested at once, in the order given (Holm, Scand. J. Statist. 1979)."""
    adjusted = [1.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def tail_p_value(k: int, n: int, rate_under_null: float) -> float:
    """P(X >= k) for X binomial(n, rate_under_null): the exact one-sided test that the true rate is higher."""
    return 1.0 if k == 0 else float(betainc(k, n - k + 1, rate_under_null))


def difference_low(wins: int, losses: int, n: int, *, alpha: float) -> float:
    """Lower bound, at confidence 1 - alpha, of the accuracy difference between two models on the same n images.

    (wins - losses) / n estimates it. The bound is the Clopper-Pearson lower bound of wins / n less the upper bound of losses / n, each at
    alpha / 2: exact by the union bound, so it is wrong at most alpha of the time at any n, at the price of being wide.
    """
    low, high = (rate(wins, n, confidence=1 - alpha / 2)["low"], rate(losses, n, confidence=1 - alpha / 2)["high"])
    return -1.0 if low is None or high is None else low - high


def loss_p_value(wins: int, losses: int, n: int, *, margin: float) -> float:
    """Smallest alpha at which the upper bound of the difference is under -margin; small: significantly worse than the champion."""
    below, above = 0.0, 1.0
    if -difference_low(losses, wins, n, alpha=above) >= -margin:
        return 1.0
    for _ in range(40):
        middle = (below + above) / 2
        if -difference_low(losses, wins, n, alpha=middle) < -margin:
            above = middle
        else:
            below = middle
    return above


def poison_fraction(
    flagged: Rate, found: tuple[int, int], false: tuple[int, int], *, confidence: float, min_gap: float
) -> tuple[float, float, float] | None:
    """Lower bound, estimate and upper bound of the share of poison, by the share of flagged images (Rogan and Gladen, 1978).

    (flagged - false) / (found - false), within [0, 1]; the interval takes each of the three rates at its worse one-sided bound, so it holds
    at 1 - 3 * (1 - confidence) or better on either side. None where the test hardly finds more of the poison than of honest images.

    Args:
        flagged: rate of flagged images with its bounds.
        found: (k, n), of known poison that is flagged.
        false: (k, n), of honest images that are flagged.
        confidence: of each bound.
        min_gap: least difference of the two rates.
    """
    sensitivity, false_rate = (rate(*counts, confidence=confidence) for counts in (found, false))
    if flagged["rate"] is None or sensitivity["rate"] is None or false_rate["rate"] is None:
        return None
    if sensitivity["low"] - false_rate["high"] < min_gap:  # type: ignore[operator]
        return None

    def corrected(share: float, true: float, wrong: float) -> float:
        return min(1.0, max(0.0, (share - wrong) / (true - wrong)))

    return (
        corrected(flagged["low"], sensitivity["high"], false_rate["high"]),  # type: ignore[arg-type]
        corrected(flagged["rate"], sensitivity["rate"], false_rate["rate"]),
        corrected(flagged["high"], sensitivity["low"], false_rate["low"]),  # type: ignore[arg-type]
    )
