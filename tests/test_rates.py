"""Rates: exact bounds, worked by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbd.errors import DataError
from cbd.rates import rate


def test_none_of_59_is_just_under_five_percent() -> None:
    """Nothing in n trials: the upper bound solves (1 - p) ** n = 0.05."""
    assert rate(0, 59)["high"] == pytest.approx(1 - 0.05 ** (1 / 59))
    assert rate(0, 58)["high"] == pytest.approx(0.0503, abs=1e-4)
    assert rate(0, 59)["low"] == 0.0


def test_all_of_n_mirrors_none_of_n() -> None:
    """All of n trials: the lower bound solves p ** n = 0.05."""
    assert rate(59, 59) == {"k": 59, "n": 59, "rate": 1.0, "low": pytest.approx(0.05 ** (1 / 59)), "high": 1.0}


def test_one_of_two_by_hand() -> None:
    """1 of 2: low solves 1 - (1 - p)^2 = 0.05, high solves p^2 = 0.95."""
    bounds = rate(1, 2)
    assert bounds["low"] == pytest.approx(1 - 0.95**0.5)
    assert bounds["high"] == pytest.approx(0.95**0.5)


def test_no_images_have_no_rate() -> None:
    assert rate(0, 0) == {"k": 0, "n": 0, "rate": None, "low": None, "high": None}


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, -1)])
def test_impossible_counts_are_refused(k: int, n: int) -> None:
    with pytest.raises(DataError, match="0 <= k <= n"):
        rate(k, n)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_bounds_enclose_the_rate_and_mirror(counts: tuple[int, int], confidence: float) -> None:
    """The bounds of k of n and of n - k of n are mirror images, and the rate lies between them."""
    k, n = counts
    bounds, mirror = rate(k, n, confidence=confidence), rate(n - k, n, confidence=confidence)
    assert 0 <= bounds["low"] <= bounds["rate"] <= bounds["high"] <= 1  # type: ignore[operator]
    assert bounds["low"] == pytest.approx(1 - mirror["high"], abs=1e-9)  # type: ignore[operator]


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Coverage, computed exactly: over all k, the chance that the upper bound is under the true rate is at most 5 %."""
    from math import comb

    n, p = 40, 0.1
    missed = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if (rate(k, n)["high"] or 0) < p)
    assert 0 < missed <= 0.05
