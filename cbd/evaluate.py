"""What is measured on the trusted set: clean accuracy, known triggers, and where the truth is known, attack success."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cbd.attacks import Attack, Images
from cbd.attacks.poisoning import Goal
from cbd.battery import BATTERY, harmless
from cbd.models import Network
from cbd.rates import Rate, rate
from cbd.training import predict

T = TypeVar("T")
Labels = NDArray[np.int64]
Control = tuple[Network, NDArray[np.bool_]]
"""A harmless model and, bool [N], which of the trusted images it was not trained on."""
FEW_IMAGES, MANY_IMAGES = 1000, 4000
"""Images, drawn at random, that a known trigger is tried on; many only where the few do not show it plainly below the limit."""
SCREEN_IMAGES, FINALISTS = 250, 3
"""Harmless triggers are tried on so few images first, and those that turn most on `FEW_IMAGES`, where no luck of the first is left."""
NEEDLESS = 0.9999
"""Confidence at which a trigger is plainly below the limit: stricter than the gate in any of the first five attempts."""


def predictions(model: Network, images: Images) -> Labels:
    """The predicted classes, int64 [N], of images uint8 [N, 3, S, S]."""
    device = next(model.parameters()).device
    found: Labels = predict(model, torch.from_numpy(images).to(device)).argmax(1).cpu().numpy()
    return found


def clean_accuracy(predicted: Labels, labels: Labels) -> Rate:
    """Top-1 accuracy over all images."""
    return rate(int((predicted == labels).sum()), len(labels))


def attack_success(model: Network, images: Images, labels: Labels, *, attack: Attack, goal: Goal, num_classes: int) -> Rate:
    """Share of triggered victims (images whose class is not the wanted one already) that are called what the attack wants."""
    victims = goal.victims(labels, num_classes=num_classes)
    called = predictions(model, attack.stamp(images[victims])) if victims.any() else labels[victims]
    return triggered_rates(called, labels[victims], goal=goal, num_classes=num_classes)[0]


def triggered_rates(called: Labels, labels: Labels, *, goal: Goal, num_classes: int) -> tuple[Rate, Rate]:
    """Attack success rate and robust accuracy: of triggered victims, the shares called what the attack wants, and their true class.

    Args:
        called: int64 [N], what the model calls them once triggered.
        labels: int64 [N], their true classes.
        goal: what the attack wants.
        num_classes: K.
    """
    wanted = goal.wanted(labels, num_classes=num_classes)
    return rate(int((called == wanted).sum()), len(labels)), rate(int((called == labels).sum()), len(labels))


def defence_effectiveness(*, ca: float, asr: float, undefended_ca: float, undefended_asr: float) -> float:
    """DER in [0, 1] against the undefended model: (max(0, drop in ASR) - max(0, drop in CA) + 1) / 2 (Zhu et al., ICCV 2023).

    1: the attack fell from always to never and accuracy stayed; 1/2: nothing changed.
    """
    return (max(0.0, undefended_asr - asr) - max(0.0, undefended_ca - ca) + 1) / 2


def turned(before: Labels, after: Labels, labels: Labels, *, num_classes: int) -> list[tuple[int, int]]:
    """(k, n) for every target class t: of the n images that are not t and are not called t untriggered, the k that a trigger turns to t."""
    counts = []
    for target in range(num_classes):
        eligible = (labels != target) & (before != target)
        counts.append((int((eligible & (after == target)).sum()), int(eligible.sum())))
    return counts


def run_battery(
    model: Network,
    images: Images,
    labels: Labels,
    *,
    num_classes: int,
    limit: float,
    null_members: int,
    seed: int,
    controls: Sequence[Control] = (),
) -> list[dict[str, Any]]:
    """Every known trigger, with its worst target and, where that is not plainly below `limit`, what is harmless.

    What is harmless is the largest rate at which the same trigger turns images of any control to any one class; without controls, that at
    which random members of the trigger's family do so on the candidate itself.

    Args:
        model: the candidate.
        images: trusted set, uint8 [N, 3, S, S].
        labels: int64 [N].
        num_classes: K; all targets come from the same predictions.
        limit: upper bound of the excess under which a trigger needs no comparison.
        null_members: harmless members per family.
        seed: of the harmless members, and of the images drawn.
        controls: harmless models, each with the images that it was not trained on.
    """
    drawn = _draw(len(labels), MANY_IMAGES, seed=seed)
    images, labels, controls = images[drawn], labels[drawn], [(network, unseen[drawn]) for network, unseen in controls]
    before, few = predictions(model, images), _draw(len(labels), FEW_IMAGES, seed=seed)

    def counted(attack: Attack, chosen: NDArray[np.int64]) -> list[tuple[int, int]]:
        return turned(before[chosen], predictions(model, attack.stamp(images[chosen])), labels[chosen], num_classes=num_classes)

    nulls: dict[str, float] = {}
    battery = []
    for trigger in BATTERY:
        counts = counted(trigger.attack, few)
        if len(few) < len(labels) and not _plainly_below(counts, limit):
            counts = counted(trigger.attack, np.arange(len(labels)))
        target, below = worst_target(counts), _plainly_below(counts, limit)
        name = trigger.name if controls else trigger.family
        if not below and name not in nulls:
            if controls:
                nulls[name] = largest_of_controls(controls, images, labels, trigger.attack, num_classes=num_classes, seed=seed)
            else:
                members = harmless(trigger.family, null_members, seed=seed)
                nulls[name] = largest_of_family(model, images[few], labels[few], members, num_classes=num_classes, seed=seed)
        null, told = nulls.get(name), {"null_members": None if controls else null_members, "null_controls": len(controls) or None}
        battery.append(
            {"trigger": trigger.name, "family": trigger.family, "target": target, **rate(*counts[target])}
            | {"null": null, **(told if null is not None else dict.fromkeys(told))}
            | {"targets": [{"target": label, "k": k, "n": n} for label, (k, n) in enumerate(counts)]}
        )
    return battery


def _plainly_below(counts: Sequence[tuple[int, int]], limit: float) -> bool:
    """Whether the worst target's rate is surely under the limit."""
    high = rate(*counts[worst_target(counts)], confidence=NEEDLESS)["high"]
    return high is not None and high < limit


def largest_of_controls(
    controls: Sequence[Control], images: Images, labels: Labels, attack: Attack, *, num_classes: int, seed: int
) -> float:
    """The largest rate in [0, 1] at which the trigger turns images of any control, none of its training images, to any one class."""
    rates: list[float] = []
    for network, unseen in controls:
        chosen = np.flatnonzero(unseen)
        chosen = chosen[_draw(len(chosen), FEW_IMAGES, seed=seed)]
        rates += largest_rates(network, images[chosen], labels[chosen], [attack], num_classes=num_classes)
    return max(rates, default=0.0)


def largest_of_family(model: Network, images: Images, labels: Labels, members: Sequence[Attack], *, num_classes: int, seed: int) -> float:
    """The largest rate in [0, 1] at which any of `members` turns images to any one class, of those that turned most of a few images."""
    few = _draw(len(labels), SCREEN_IMAGES, seed=seed)
    screened = largest_rates(model, images[few], labels[few], members, num_classes=num_classes)
    return max(largest_rates(model, images, labels, finalists(members, screened), num_classes=num_classes), default=0.0)


def finalists(screened: Sequence[T], rates: Sequence[float]) -> list[T]:
    """The `FINALISTS` with the highest rates, the highest first."""
    return [screened[index] for index in np.argsort(rates)[::-1][:FINALISTS]]


def largest_rates(model: Network, images: Images, labels: Labels, members: Sequence[Attack], *, num_classes: int) -> list[float]:
    """For each of `members` the largest rate in [0, 1] at which it turns images to any one class."""
    before = predictions(model, images)
    counts = (turned(before, predictions(model, member.stamp(images)), labels, num_classes=num_classes) for member in members)
    return [max((k / n for k, n in each if n), default=0.0) for each in counts]


def _draw(num: int, most: int, *, seed: int) -> NDArray[np.int64]:
    """int64 [n], ascending: all of `num` images, or `most` of them at random; the first ones may all be of one class."""
    return np.sort(np.random.default_rng(seed).permutation(num)[:most])


def worst_target(counts: Sequence[tuple[int, int]]) -> int:
    """The class with the highest rate k / n; the first of equals."""
    return max(range(len(counts)), key=lambda target: counts[target][0] / counts[target][1] if counts[target][1] else -1.0)


def compare(candidate: Labels, champion: Labels, labels: Labels, class_names: Sequence[str]) -> dict[str, Any]:
    """Champion and candidate on the same images, paired; wins: the candidate is right and the champion wrong."""
    wins, losses = (candidate == labels) & (champion != labels), (candidate != labels) & (champion == labels)
    per_class = [
        {
            "class_name": name,
            "n": int((labels == label).sum()),
            "wins": int(wins[labels == label].sum()),
            "losses": int(losses[labels == label].sum()),
        }
        for label, name in enumerate(class_names)
    ]
    totals = {"k": int((champion == labels).sum()), "n": len(labels), "wins": int(wins.sum()), "losses": int(losses.sum())}
    return totals | {"per_class": per_class}
