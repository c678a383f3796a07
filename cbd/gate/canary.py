"""Check A, the canary: could stage 1 have seen a backdoor, and does stage 2 leave anything of one that it saw?"""

from cbd.config import Gate
from cbd.gate.check import Check, high_of, low_of, make_check, not_judged, percent, worst
from cbd.measurements import CanaryResult, Planted
from cbd.rates import rate


def check_canary(canary: CanaryResult | None, policy: Gate, *, num_images: int) -> list[Check]:
    """One entry per planted family, and one for the canary as a whole; a single one without a canary.

    A family is covered if stage 1 saw it and stage 2 left nothing of it. Stage 1 sees a family if it found enough of its images, or if the
    confounder learned its trigger: a lower bound of either is at least `min_canary_seen`. (A family of 50 images is often found whole
    before the confounder obeys its trigger on new ones.) A family that the policy requires is INVALID where it was not seen, and REVIEW
    where it was and is followed; any other one is named as not covered, for a PASS speaks of the covered families alone.

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


def removed(planted: Planted, policy: Gate) -> bool:
    """Whether stage 2 left nothing of the family."""
    return high_of(rate(planted.left.k, planted.left.n, confidence=policy.confidence)) <= policy.max_canary_asr


def covered(planted: Planted, policy: Gate) -> bool:
    """Whether stage 1 saw the family and stage 2 left nothing of it: only of such families does a PASS speak."""
    return seen(planted, policy) and removed(planted, policy)


def _check_family(planted: Planted, policy: Gate, *, num_images: int) -> Check:
    left = rate(planted.left.k, planted.left.n, confidence=policy.confidence)
    found = f"Of the canary's {planted.family} stage 1 found {planted.found.k} of {planted.found.n} images"
    learned = f"the confounder follows it on {planted.learned.k} of {planted.learned.n} triggered images"
    kept = f"the deconfounded model on {left['k']} of {left['n']}, at most {percent(high_of(left))}"
    told, required = f"{found}, {learned}, {kept}", planted.family in policy.required_canaries
    if covered(planted, policy):
        result, why = "PASS", "covered"
    elif not required:
        result, why = "PASS", "not covered, and not required"
    elif not seen(planted, policy):
        result, why = "INVALID", "stage 1 is blind to this family, which is required"
    else:
        result, why = "REVIEW", f"stage 2 keeps this family, which is required: not under {percent(policy.max_canary_asr)}"
    check = make_check("A", f"canary: {planted.family}", result, f"{told}: {why}.", left, policy.max_canary_asr)
    return not_judged(check, num_images, policy.min_images) if result == "REVIEW" else check


def _check_whole(canary: CanaryResult, families: list[Check], policy: Gate) -> Check:
    planted = {family.family: family for family in canary.families}
    missing = [family for family in policy.required_canaries if family not in planted]
    if missing:
        return make_check("A", "canary", "INVALID", f"The canary did not hold {', '.join(missing)}, which the policy requires.")
    named = [name for name, family in planted.items() if covered(family, policy)]
    others = [f"{name} (followed on {family.left.k} of {family.left.n})" for name, family in planted.items() if name not in named]
    share = max((planted[name].num_poisoned for name in named), default=0) / canary.num_images
    sentence = f"The canary covers {', '.join(named) or 'no family'}"
    sentence += f", each at {percent(share)} of the data: less poison was not tried." if named else "."
    sentence += f" Not covered: {', '.join(others)}." if others else ""
    return make_check("A", "canary", worst(families), sentence)
