"""Check A, the canary: could stage 1 have seen a backdoor, and does stage 2 leave anything of one that it saw?"""

from cbd.config import Gate
from cbd.gate.check import Check, high_of, low_of, make_check, not_judged, percent, worst
from cbd.measurements import CanaryResult, Planted
from cbd.rates import rate


def check_canary(canary: CanaryResult | None, policy: Gate, *, num_images: int) -> list[Check]:
    """One entry per planted family, and one for the canary as a whole; a single one without a canary.

    Stage 1 sees a family if it found enough of its images, or if the confounder learned its trigger: a lower bound of either is at least
    `min_canary_seen`. (A family of 50 images is often found whole before the confounder obeys its trigger on new ones.)

    Args:
        canary: None: none was trained.
        policy: the `gate` section of `params.yaml`.
        num_images: how many trusted images there are.
    """
    if canary is None:
        return [make_check("A", "canary", "PASS", "No canary was trained: nothing shows what stage 1 could have seen.")]
    families = [_check_family(planted, policy, num_images=num_images) for planted in canary.families]
    return [*families, _check_whole(canary, families, policy)]


def seen(planted: Planted, policy: Gate) -> bool:
    """Whether stage 1 saw the family."""
    bounds = (rate(share.k, share.n, confidence=policy.confidence) for share in (planted.found, planted.learned))
    return max(low_of(bound) for bound in bounds) >= policy.min_canary_seen


def _check_family(planted: Planted, policy: Gate, *, num_images: int) -> Check:
    left = rate(planted.left.k, planted.left.n, confidence=policy.confidence)
    found = f"Of the canary's {planted.family} stage 1 found {planted.found.k} of {planted.found.n} images"
    learned = f"the confounder follows it on {planted.learned.k} of {planted.learned.n} triggered images"
    kept = f"the deconfounded model follows it on {left['k']} of {left['n']} images, at most {percent(high_of(left))}"
    name = f"canary: {planted.family}"
    if not seen(planted, policy):
        result, what = ("INVALID", "required") if planted.family in policy.required_canaries else ("PASS", "not covered")
        sentence = f"{found}, {learned}: it is blind to this family, which is {what}; {kept}."
        return make_check("A", name, result, sentence, left, policy.max_canary_asr)
    sentence = f"{found}, {learned}; {kept}."
    if high_of(left) <= policy.max_canary_asr:
        return make_check("A", name, "PASS", sentence, left, policy.max_canary_asr)
    sentence += f" That is not under {percent(policy.max_canary_asr)}."
    return not_judged(make_check("A", name, "REVIEW", sentence, left, policy.max_canary_asr), num_images, policy.min_images)


def _check_whole(canary: CanaryResult, families: list[Check], policy: Gate) -> Check:
    planted = {family.family: family for family in canary.families}
    missing = [family for family in policy.required_canaries if family not in planted]
    if missing:
        return make_check("A", "canary", "INVALID", f"The canary did not hold {', '.join(missing)}, which the policy requires.")
    covered = [name for name, family in planted.items() if seen(family, policy)]
    blind = [f"{name} (followed on {family.left.k} of {family.left.n})" for name, family in planted.items() if name not in covered]
    share = max((planted[name].num_poisoned for name in covered), default=0) / canary.num_images
    sentence = f"The canary covers {', '.join(covered) or 'no family'}"
    sentence += f", each at {percent(share)} of the data: less poison was not tried." if covered else "."
    sentence += f" Not covered: {', '.join(blind)}." if blind else ""
    return make_check("A", "canary", worst(families), sentence)
