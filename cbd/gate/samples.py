"""Check D, the samples: how much of the data is suspected; was the candidate trained on suspects, and does it follow their labels?"""

from cbd.config import Gate
from cbd.gate.check import Check, high_of, low_of, make_check, percent
from cbd.gate.statistics import holm, poison_fraction, tail_p_value
from cbd.measurements import CanaryResult, Controls, Samples, Share, Subset
from cbd.rates import rate

MIN_GAP = 0.1
"""Where stage 1 finds hardly more of the poison than of honest images, no fraction can be told."""


def check_samples(samples: Samples | None, canary: CanaryResult | None, policy: Gate, *, controls: Controls | None = None) -> list[Check]:
    """Whether the candidate was trained on suspects or follows them (the verdict depends on it), and what is told of the delivery alone.

    Args:
        samples: None: there is no evidence table, so nothing was tested.
        canary: tells the share of poison that stage 1 finds.
        policy: the `gate` section of `params.yaml`.
        controls: tell the share of honest images that stage 1 suspects, in place of the canary.
    """
    if samples is None:
        return [make_check("D", "suspects", "REVIEW", "There is no evidence on the training images: nothing was tested.")]
    return [
        _check_kept(samples, policy),
        _check_followed(samples, policy),
        _tell_fraction(samples, canary, controls, policy),
        *_tell_excess(samples, policy),
    ]


def _check_kept(samples: Samples, policy: Gate) -> Check:
    """Suspects that the model was trained on as if they were honest: their labels may be true, or the pilot may have learned the trigger.

    A shared pattern on images of one class alone is such a case; no other check sees it where the trigger is not in the battery and turns
    images of one source class only.
    """
    if samples.kept is None:
        told = "On how many suspects the model was trained was not measured: evaluate it again."
        return make_check("D", "suspects kept", "REVIEW" if samples.suspects else "PASS", told)
    told = f"The model was trained on {samples.kept.k} of {samples.suspects} suspects"
    bound = rate(samples.kept.k, samples.kept.n, confidence=policy.confidence)
    if (bound["rate"] or 0.0) > policy.max_followed:
        return make_check("D", "suspects kept", "REVIEW", f"{told}: it may have learned them.", bound, policy.max_followed)
    return make_check("D", "suspects kept", "PASS", f"{told}.", bound, policy.max_followed)


def _check_followed(samples: Samples, policy: Gate) -> Check:
    """Suspects whose labels another view contradicts: a model that follows these has learned the poison.

    So few that even 0 of n misses the limit cannot show that it does not; none followed is then enough, any is INCONCLUSIVE.
    """
    bound, limit = rate(samples.followed.k, samples.followed.n, confidence=policy.confidence), policy.max_followed
    if not samples.followed.n:
        return make_check("D", "suspects", "PASS", f"None of {samples.num_images} training images is suspected of a false label.")
    told = f"The model follows the label of {bound['k']} of {bound['n']} suspects with doubtful labels, at most {percent(high_of(bound))}"
    few = high_of(rate(0, samples.followed.n, confidence=policy.confidence)) > limit
    if high_of(bound) <= limit or (few and not bound["k"]):
        return make_check("D", "suspects", "PASS", f"{told}: it has not learned them.", bound, limit)
    if few and low_of(bound) <= limit:
        return make_check("D", "suspects", "INCONCLUSIVE", f"{told}: too few to stay under {percent(limit)}.", bound, limit)
    return make_check("D", "suspects", "REVIEW", f"{told}, not under {percent(limit)}: it may have learned them.", bound, limit)


def _tell_fraction(samples: Samples, canary: CanaryResult | None, controls: Controls | None, policy: Gate) -> Check:
    flagged = rate(samples.suspects, samples.num_images, confidence=policy.confidence)
    told = f"{samples.suspects} of {samples.num_images} training images are suspects"
    if canary is None:
        return make_check("D", "poison fraction", "PASS", f"{told}; without a canary their share of the poison is unknown.", flagged)
    found, false = canary.pooled_found(), _false_suspects(samples, canary, controls)
    fraction = poison_fraction(flagged, (found.k, found.n), (false.k, false.n), confidence=policy.confidence, min_gap=MIN_GAP)
    if fraction is None:
        return make_check("D", "poison fraction", "PASS", f"{told}; stage 1 found too little of the canary's poison to tell a fraction.")
    low, value, high = fraction
    sentence = f"{told}: {percent(value)} of the data is poison of the kinds in the canary, from {percent(low)} to {percent(high)}"
    bound = {**flagged, "rate": value, "low": low, "high": high}
    smallest = min((family.num_poisoned for family in canary.families), default=0)
    sentence += f". Fewer than {smallest} images of a kind ({percent(smallest / canary.num_images)}) were not tried."
    if controls is not None:
        sentence += f" {false.k} of {false.n} honest images of {controls.count} clean controls were suspects."
    return make_check("D", "poison fraction", "PASS", sentence, bound)  # type: ignore[arg-type]


def _false_suspects(samples: Samples, canary: CanaryResult, controls: Controls | None) -> Share:
    """Of honest images, the suspects: of the controls' training images; else of the canary's that hold none of its own triggers.

    What the canary says is taken on the data itself, poison and all: other suspects of a canary on this data are the data's own, not false.
    """
    if controls is not None:
        return controls.false_suspects
    if canary.data_digest == samples.data_digest:
        return canary.false_suspects.model_copy(update={"k": max(0, canary.false_suspects.k - samples.suspects)})
    return canary.false_suspects


def _tell_excess(samples: Samples, policy: Gate) -> list[Check]:
    """Which classes and suppliers have more suspects than their share (exact binomial tests against the rest, adjusted by Holm)."""
    checks = []
    for what, subsets in (("class", samples.per_class), ("supplier", samples.per_source)):
        p_values = [_excess_p_value(subset, samples) for subset in subsets]
        over = [subset for subset, adjusted in zip(subsets, holm(p_values), strict=True) if adjusted <= 1 - policy.confidence]
        named = ", ".join(f"{subset.name!r:.60} ({subset.k} of {subset.n})" for subset in sorted(over, key=lambda each: -each.k)[:3])
        told = f"{len(over)} of {len(subsets)} {'classes' if what == 'class' else 'suppliers'} have more suspects than the others"
        checks.append(make_check("D", f"suspects by {what}", "PASS", f"{told}{f': {named}' if named else ''}."))
    return checks


def _excess_p_value(subset: Subset, samples: Samples) -> float:
    others, suspects = samples.num_images - subset.n, samples.suspects - subset.k
    return 1.0 if not others or not subset.n else tail_p_value(subset.k, subset.n, max(suspects / others, 1 / samples.num_images))
