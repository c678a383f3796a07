"""Check E, utility: is the candidate good enough, and not worse than the champion on the same images?"""

from cbd.config import Gate
from cbd.gate.check import Check, make_check, not_judged, percent, points
from cbd.gate.statistics import difference_low, holm, loss_p_value
from cbd.measurements import Champion, Evaluation
from cbd.rates import Rate, rate


def check_utility(measured: Evaluation, policy: Gate) -> list[Check]:
    """Check E: not inferior to the champion on the same images, or, without a champion, at least the policy's floor."""
    if measured.champion is not None:
        checks = [_check_champion(measured.champion, policy), _check_classes(measured.champion, policy)]
    else:
        bound = rate(measured.clean_accuracy.k, measured.clean_accuracy.n, confidence=policy.confidence)
        reached = bound["rate"] is not None and bound["rate"] >= policy.min_clean_accuracy
        found = f"Clean accuracy is {bound['k']} of {bound['n']}, {percent(bound['rate'])}"
        sentence = f"{found}: {'at least' if reached else 'under'} the floor of {percent(policy.min_clean_accuracy)} for a first champion."
        checks = [make_check("E", "clean accuracy", "PASS" if reached else "REVIEW", sentence, bound, policy.min_clean_accuracy)]
    return [not_judged(check, measured.num_images, policy.min_images) for check in checks]


def _check_champion(champion: Champion, policy: Gate) -> Check:
    wins, losses, n, alpha = (champion.wins, champion.losses, champion.n, 1 - policy.confidence)
    low, high = (difference_low(wins, losses, n, alpha=alpha), -difference_low(losses, wins, n, alpha=alpha))
    result = "PASS" if low > -policy.accuracy_margin else "REVIEW"
    found = (
        f"On the same {n} images the candidate is right where the champion is wrong {wins} times, wrong where it is right {losses} times"
    )
    verb = "is" if result == "PASS" else "is not shown to be"
    sentence = f"{found}: clean accuracy {verb} at most {points(policy.accuracy_margin)} worse (lower bound {points(low)})."
    bound = Rate(k=wins - losses, n=n, rate=(wins - losses) / n if n else None, low=low, high=high)
    return make_check("E", "clean accuracy against the champion", result, sentence, bound, -policy.accuracy_margin)


def _check_classes(champion: Champion, policy: Gate) -> Check:
    alpha, margin = 1 - policy.confidence, policy.class_margin
    adjusted = holm([loss_p_value(part.wins, part.losses, part.n, margin=margin) for part in champion.per_class])
    worse = [index for index, p_value in enumerate(adjusted) if p_value <= alpha]
    shown = min(range(len(adjusted)), key=lambda i: (adjusted[i], (champion.per_class[i].wins - champion.per_class[i].losses)))
    part = champion.per_class[shown]
    low = difference_low(part.wins, part.losses, part.n, alpha=alpha)
    high = -difference_low(part.losses, part.wins, part.n, alpha=alpha)
    change = (part.wins - part.losses) / part.n if part.n else None
    bound = Rate(k=part.wins - part.losses, n=part.n, rate=change, low=low, high=high)
    found = f"{len(worse)} of {len(adjusted)} classes are significantly more than {points(margin)} worse than the champion"
    sentence = f"{found}; the worst is class {shown} ({part.class_name!r:.60}): {part.wins} won, {part.losses} lost of {part.n}."
    return make_check("E", "worst class against the champion", "REVIEW" if worse else "PASS", sentence, bound, -margin)
