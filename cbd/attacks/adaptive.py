"""Adaptive: BadNets by a supplier who knows this defence: noise makes its poison hard to learn (Zhang et al., CVPR 2023)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch.nn import functional as F

from cbd.attacks import Images, Labels
from cbd.attacks.badnets import BadNets
from cbd.attacks.trojan import train_surrogate
from cbd.models import Network

SURROGATE_STEPS, POISON_RATE = 400, 0.1
LARGEST, STEP, STEPS = 8.0, 2.0, 10
"""Of the noise and of each of its steps, in grey levels."""


@dataclass(frozen=True)
class Adaptive(BadNets):
    """The patch of BadNets; poisoned training images carry noise of at most `LARGEST` grey levels, triggered images later do not.

    The noise maximises the loss of a network of the supplier's that has already learned the patch, by projected gradient steps (Madry et
    al., ICLR 2018): a confounder finds such images hard, so that they keep their weight.
    """

    trained: ClassVar[bool] = True
    surrogate: Network | None = field(default=None, compare=False, repr=False)
    """Only where poison is made; it is no part of the trigger."""

    @classmethod
    def craft(cls, images: Images, labels: Labels, *, target_label: int, seed: int) -> Self:
        """Trains the supplier's network on these images (uint8 [N, 3, 32, 32]), a tenth of them stamped and called the target."""
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(images), max(1, round(POISON_RATE * len(images))), replace=False)
        pixels, given = images.copy(), labels.copy()
        pixels[chosen], given[chosen] = cls().stamp(images[chosen]), target_label
        torch_generator = torch.Generator().manual_seed(seed)
        network = train_surrogate(torch.from_numpy(pixels), torch.from_numpy(given), steps=SURROGATE_STEPS, generator=torch_generator)
        return cls(surrogate=network)

    def poison(self, images: Images, *, target_label: int) -> Images:
        """Stamped copies of `images` (uint8 [N, 3, H, W]) with the noise; it is drawn at 32x32 pixels and enlarged or shrunk to fit."""
        stamped = self.stamp(images)
        if self.surrogate is None:
            return stamped
        seen = F.interpolate(torch.from_numpy(stamped).float(), (32, 32), mode="area")
        target, noise = torch.full((len(images),), target_label), torch.zeros_like(seen)
        for _ in range(STEPS):
            noise.requires_grad_()
            loss = F.cross_entropy(self.surrogate((seen + noise).clamp(0, 255))[0], target, reduction="sum")
            (slope,) = torch.autograd.grad(loss, noise)
            noise = (noise.detach() + STEP * slope.sign()).clamp(-LARGEST, LARGEST)
        fitted = F.interpolate(noise, images.shape[-2:], mode="nearest").numpy()
        noisy: Images = np.clip(np.rint(stamped + fitted), 0, 255).astype(np.uint8)
        return noisy

    def settings(self) -> dict[str, Any]:
        """Pattern and place."""
        return {"pattern": self.pattern, "place": self.place}
