"""The canary's plan: known triggers, other ones for other data, that are put into a second copy of it.

A canary shows what stage 1 can see in this very data, and what stage 2 then leaves of it. Its models are never promoted.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cbd.attacks import Labels
from cbd.config import Canary

ATTACK_OF = {"patch": "badnets", "blend": "blend", "sinusoid": "sig", "warp": "wanet"}
"""The attack that puts a family's trigger in."""
LIT = (255, 170, 85)
"""Brightness of the colour channels of a patch."""


@dataclass(frozen=True)
class Plant:
    """One trigger family of a canary."""

    family: str
    attack: str
    trigger: dict[str, Any]
    """Settings of the attack."""
    target_label: int
    num_images: int
    """How many images it poisons."""


def plan_canary(labels: Labels, settings: Canary, *, num_classes: int, data_digest: str, seed: int) -> list[Plant]:
    """What is put in, in the order in which it must be: a clean-label family first, while its class still has enough images.

    Each family poisons max(share of the data set, `min_images`) images and has a target of its own while there are classes enough; one
    whose poison keeps its labels gets a class of which that is at most half, or else half of the largest. Targets and triggers come from
    the data's digest and the seed: the same data has the same canary. Who knows all of the data and the seed can work it out.

    Args:
        labels: int64 [N], as given.
        settings: families, share and least number.
        num_classes: K.
        data_digest: of the data set.
        seed: of the run.
    """
    drawn = np.random.default_rng(int.from_bytes(hashlib.sha256(f"canary {seed} {data_digest}".encode()).digest()[:8]))
    wanted = max(math.ceil(settings.share * len(labels)), settings.min_images)
    counts = np.bincount(labels, minlength=num_classes)
    order = [int(label) for label in drawn.permutation(num_classes)]
    own = next((label for label in order if counts[label] >= 2 * wanted), int(counts.argmax()))
    others = [label for label in order if label != own or "sinusoid" not in settings.families]
    plants = []
    for index, family in enumerate(sorted(settings.families, key=lambda family: family != "sinusoid")):
        trigger = _draw(family, drawn)
        if family == "sinusoid":
            target, most = own, int(counts[own]) // 2
        else:
            target = others[index % len(others)]
            most = (len(labels) - int(counts[target])) // (2 * len(settings.families))
        plants.append(Plant(family, ATTACK_OF[family], trigger, target, min(wanted, most)))
    return [plant for plant in plants if plant.num_images > 0]


def _draw(family: str, drawn: np.random.Generator) -> dict[str, Any]:
    """Settings of a random member of the family."""
    if family == "patch":
        places: Sequence[str] = ("top-left", "top-right", "bottom-left", "bottom-right", "centre")
        colour = [int(level) for level in drawn.permutation(LIT)]
        return {"pattern": "checker", "place": places[int(drawn.integers(len(places)))], "colour": colour}
    if family == "sinusoid":
        return {"frequency": float(drawn.integers(3, 10))}
    return {"seed": int(drawn.integers(1, 2**31))}
