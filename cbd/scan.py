"""Unknown triggers: one is inverted for every class, and stamped on images that the inversion has not seen.

Trigger inversion is that of Neural Cleanse (Wang et al., IEEE S&P 2019, section IV), written from the paper, with all classes in one batch.
A network's input is not changed by `invert`, but `Normalise` works in place on floats, so that every view is made anew.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cbd.evaluate import SCREEN_IMAGES, Labels, finalists, predictions, turned
from cbd.models import Network
from cbd.training import autocast

STEPS, BATCH_SIZE, LEARNING_RATE = 60, 8, 0.15
"""Most steps, images per class and step, and step size of Adam where mask and pattern lie in [0, 1]."""
SUCCESS, MEMORY = 0.9, 0.8
"""Share of images that a trigger must turn, and what its running mean keeps from one step to the next."""
FIRST_WEIGHT, RAISE, LOWER = 0.01, 1.15, 1.3
"""Weight of the mask's norm in pixels against the mean cross-entropy: at first, and the factors by which it follows the success."""
PATIENCE, STALLED = 15, 0.02
"""Stop when the norms fell by less than this share in so many steps."""
TEST_IMAGES = 1000
"""Triggers are stamped on at most so many held-out images, drawn at random: the first ones may all be of one class."""


@dataclass(frozen=True)
class Triggers:
    """One trigger per class: (1 - mask) * image + mask * pattern."""

    masks: Tensor
    """float32 [K, 1, S, S] in [0, 1]."""
    patterns: Tensor
    """float32 [K, 3, S, S] in [0, 1]; 1 is 255."""
    norms: Tensor
    """float32 [K]: sum of each mask, in pixels. S * S for a class whose trigger never reached `SUCCESS`: it has no honest norm."""
    success: Tensor
    """float32 [K] in [0, 1]: running share of calibration images of other classes that the trigger turned to its class."""

    def stamp(self, images: Tensor) -> Tensor:
        """float32 [K, N, 3, S, S] in [0, 255]: `images` (uint8 [N, 3, S, S]) with each trigger."""
        return torch.lerp(images.float()[None], 255 * self.patterns[:, None], self.masks[:, None])


def split(names: Sequence[str]) -> NDArray[np.bool_]:
    """bool [N]: which images are held out for the test, about half; images of one name (sample id or group) are always together."""
    return np.array([hashlib.sha256(name.encode()).digest()[0] % 2 == 1 for name in names], bool)


def invert(network: Network, images: Tensor, labels: Tensor, *, generator: torch.Generator) -> Triggers:
    """The smallest trigger per class that turns `SUCCESS` of the images of other classes to it.

    Each class follows its own mean cross-entropy plus the norm of its mask, whose weight rises while the trigger works and falls while it
    does not. What is kept is the smallest mask at which the running success was high enough.

    Args:
        network: frozen from here on, and in evaluation mode.
        images: calibration images, uint8 [N, 3, S, S], on the network's device.
        labels: int64 [N].
        generator: a CPU generator, of the first masks and patterns and of the batches.
    """
    network.eval().requires_grad_(False)
    num_classes, side, device = network.head.out_features, images.shape[-1], images.device
    masks = 0.5 * torch.rand(num_classes, 1, side, side, generator=generator)
    patterns = torch.rand(num_classes, 3, side, side, generator=generator)
    search = _Search(masks.to(device), patterns.to(device))
    weights = torch.full((num_classes,), FIRST_WEIGHT, device=device)
    kept = _nothing(search.masks, search.patterns)
    curve: list[float] = []
    for step in range(1, STEPS + 1):
        tried = search.step(network, images, labels, weights, generator=generator)
        works = tried.success >= SUCCESS
        kept = _choose(works & (tried.norms < kept.norms), tried, kept)
        weights = torch.where(works, weights * RAISE, weights / LOWER)
        curve.append(float(kept.norms.log().mean()))
        if step >= STEPS // 2 and curve[-PATIENCE] - curve[-1] < STALLED:
            break
    return kept


def squeeze(network: Network, images: Tensor, labels: Tensor, *, triggers: Triggers, budget: float, generator: torch.Generator) -> Triggers:
    """The trigger per class that turns most images with a mask of at most `budget` pixels; every class is given the same chance.

    The honest null of a transfer. A trigger that was optimised on a harmless model turns most held-out images too (universal
    perturbations), so that the rate of a flagged class says nothing by itself; and the other classes' triggers at their own, larger norms
    work as well by construction, so that nothing would be shown; cut down to the flagged norm they would be worse than need be. Hence all
    classes, the flagged one too, are searched anew within the flagged norm, from where `invert` left them, with the same steps: in a
    harmless model the flagged class is then only the easiest of K. What remains is that it was chosen for that, which the margin and
    the p-value before it must carry.

    The weight of the norm rises while the mask is over the budget and falls while it is under it. Arguments else as for `invert`.
    """
    search = _Search(triggers.masks.clone(), triggers.patterns.clone())
    weights, kept = torch.full((len(triggers.masks),), FIRST_WEIGHT, device=images.device), _nothing(triggers.masks, triggers.patterns)
    for _ in range(STEPS):
        tried = search.step(network, images, labels, weights, generator=generator)
        fits = tried.norms <= budget
        kept = _choose(fits & (tried.success >= kept.success), tried, kept)
        weights = torch.where(fits, weights / LOWER, weights * RAISE)
    return kept


def transfers(
    network: Network, images: NDArray[np.uint8], labels: Labels, *, triggers: Triggers, targets: Sequence[int]
) -> list[tuple[int, int]]:
    """(k, n) per target: of the n images that are neither of the class nor called so untriggered, the k that its trigger turns to it.

    Args:
        network: any network; the triggers may come from another one.
        images: held-out images, uint8 [N, 3, S, S]; stamped pixels are rounded to uint8, as in a real attack.
        labels: int64 [N].
        triggers: one per class.
        targets: the classes whose triggers are tried.
    """
    before, device = predictions(network, images), triggers.masks.device
    counts = []
    for target in targets:
        one = Triggers(triggers.masks[target, None], triggers.patterns[target, None], triggers.norms, triggers.success)
        stamped = one.stamp(torch.from_numpy(images).to(device))[0].round().to(torch.uint8).cpu().numpy()
        counts.append(turned(before, predictions(network, stamped), labels, num_classes=len(triggers.masks))[target])
    return counts


def strongest(network: Network, images: NDArray[np.uint8], labels: Labels, *, triggers: Triggers, targets: Sequence[int]) -> list[int]:
    """The `FINALISTS` of `targets` whose triggers turn most of the first `SCREEN_IMAGES` images. Arguments as for `transfers`."""
    few = slice(SCREEN_IMAGES)
    counts = transfers(network, images[few], labels[few], triggers=triggers, targets=targets)
    return finalists(targets, [k / n if n else 0.0 for k, n in counts])


class _Search:
    """Masks and patterns on their way, in [0, 1], and the running share of images that they turn."""

    def __init__(self, masks: Tensor, patterns: Tensor) -> None:
        self.masks, self.patterns = masks.requires_grad_(), patterns.requires_grad_()
        self.running = torch.zeros(len(masks), device=masks.device)
        self.optimizer = torch.optim.Adam([self.masks, self.patterns], lr=LEARNING_RATE, betas=(0.5, 0.9))

    def step(self, network: Network, images: Tensor, labels: Tensor, weights: Tensor, *, generator: torch.Generator) -> Triggers:
        """One step of all classes on one batch of images; the triggers as they were tried, before it."""
        targets = torch.arange(len(self.masks), device=images.device)
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator).to(images.device)
        eligible = (labels[chosen] != targets[:, None]).float()
        shares = eligible / eligible.sum(1, keepdim=True).clamp(min=1)
        tried = Triggers(self.masks, self.patterns, self.masks.sum((1, 2, 3)), self.running)
        with autocast(images.device):
            logits = network(tried.stamp(images[chosen]).flatten(0, 1))[0].float().unflatten(0, shares.shape)
        losses = F.cross_entropy(logits.transpose(1, 2), targets[:, None].expand_as(shares), reduction="none")
        self.optimizer.zero_grad()
        ((losses * shares).sum() + (weights * tried.norms).sum()).backward()  # type: ignore[no-untyped-call]
        turned_now = ((logits.detach().argmax(2) == targets[:, None]) * shares).sum(1)
        self.running = torch.where(eligible.any(1), MEMORY * self.running + (1 - MEMORY) * turned_now, self.running)
        tried = Triggers(self.masks.detach().clone(), self.patterns.detach().clone(), tried.norms.detach(), self.running)
        self.optimizer.step()
        with torch.no_grad():
            self.masks.clamp_(0, 1)
            self.patterns.clamp_(0, 1)
        return tried


def _nothing(masks: Tensor, patterns: Tensor) -> Triggers:
    """What stands for triggers that were not found: masks of zero, the norm of the full image, no success."""
    zeros = torch.zeros(len(masks), device=masks.device)
    return Triggers(torch.zeros_like(masks), patterns.detach().clone(), zeros + masks[0].numel(), zeros)


def _choose(condition: Tensor, one: Triggers, other: Triggers) -> Triggers:
    """Per class `one` where the condition (bool [K]) holds, else `other`."""
    parts = [(getattr(one, name), getattr(other, name)) for name in ("masks", "patterns", "norms", "success")]
    return Triggers(*(torch.where(condition.view(-1, *[1] * (first.ndim - 1)), first, second) for first, second in parts))
