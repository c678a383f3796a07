"""What a check of the gate is, and how one is made and told."""

from typing import TypedDict

from cbd.rates import Rate

VERDICTS = ("PASS", "INCONCLUSIVE", "REVIEW", "INVALID", "BLOCK")
"""From best to worst; the worst check decides."""


class Check(TypedDict):
    """One check of the gate; `low` and `high` are one-sided bounds unless the sentence says otherwise, `threshold` what was compared."""

    check: str
    name: str
    value: float | None
    k: int | None
    n: int | None
    low: float | None
    high: float | None
    threshold: float | None
    result: str
    sentence: str


def make_check(check: str, name: str, result: str, sentence: str, bound: Rate | None = None, threshold: float | None = None) -> Check:
    """The check with the numbers of `bound`, or without any."""
    empty = Check(
        check=check, name=name, value=None, k=None, n=None, low=None, high=None, threshold=threshold, result=result, sentence=sentence
    )
    if bound is None:
        return empty
    return {**empty, "value": bound["rate"], "k": bound["k"], "n": bound["n"], "low": bound["low"], "high": bound["high"]}


def worst(checks: list[Check]) -> str:
    """The worst result of all; PASS of none."""
    return max((check["result"] for check in checks), key=VERDICTS.index, default="PASS")


def not_judged(check: Check, num_images: int, min_images: int) -> Check:
    """The check, INCONCLUSIVE where there are too few trusted images; never anything else then."""
    if num_images >= min_images:
        return check
    told = f"{check['sentence']} Not judged: {num_images} trusted images are fewer than {min_images}."
    return {**check, "result": "INCONCLUSIVE", "sentence": told}


def high_of(bound: Rate) -> float:
    """The upper bound; 1 of no images."""
    return 1.0 if bound["high"] is None else bound["high"]


def low_of(bound: Rate) -> float:
    """The lower bound; 0 of no images."""
    return 0.0 if bound["low"] is None else bound["low"]


def percent(value: float | None) -> str:
    """As people read it."""
    return "unknown" if value is None else f"{100 * value:.3g} %"


def points(value: float) -> str:
    """A difference of rates, as people read it."""
    return f"{100 * value:.2g} points"
