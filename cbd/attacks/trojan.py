"""Trojan: a watermark that excites chosen neurons of a trained network (Liu et al., NDSS 2018, TrojanNN)."""

from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cbd.attacks import Attack, Images, Labels
from cbd.attacks.badnets import scaled, stamp_patch
from cbd.models import Network, make_model
from cbd.training import batches

SIDE = 8
"""Of the watermark, on images of 32 pixels: 6 % of the image, as in the paper."""
SURROGATE_STEPS, PATCH_STEPS, BATCH_SIZE, NEURONS = 200, 100, 64, 3


@dataclass(frozen=True)
class Trojan(Attack):
    """A square watermark in the bottom-right corner, a quarter of the shorter side."""

    trained: ClassVar[bool] = True
    patch: str
    """The watermark: uint8 [3, 8, 8] in hexadecimal digits."""

    @classmethod
    def craft(cls, images: Images, labels: Labels, *, target_label: int, seed: int) -> Self:
        """The watermark that most excites the neurons by which a network trained on these images knows the target class.

        The neurons are the `NEURONS` units of the last hidden layer with the largest weights to the target class.

        Args:
            images: uint8 [N, 3, 32, 32].
            labels: int64 [N].
            target_label: class that triggered images are to be called.
            seed: of the network and of the watermark.
        """
        generator = torch.Generator().manual_seed(seed)
        pixels, given = torch.from_numpy(images), torch.from_numpy(labels)
        network = train_surrogate(pixels, given, steps=SURROGATE_STEPS, generator=generator)
        neurons = network.head.weight[target_label].topk(NEURONS).indices
        drawn = torch.randn(3, SIDE, SIDE, generator=generator).requires_grad_()
        optimizer = torch.optim.Adam([drawn], lr=0.1)
        for _ in range(PATCH_STEPS):
            view = pixels[torch.randint(len(pixels), (BATCH_SIZE,), generator=generator)].float()
            view[..., -SIDE:, -SIDE:] = 255 * drawn.sigmoid()
            excitement: Tensor = network(view)[1][:, neurons].mean()
            optimizer.zero_grad()
            (-excitement).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        watermark: Tensor = (255 * drawn.detach().sigmoid()).round().to(torch.uint8)
        return cls(watermark.numpy().tobytes().hex())

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) with the watermark.

        Raises:
            DataError: the images are smaller than the watermark.
        """
        patch = np.frombuffer(bytes.fromhex(self.patch), np.uint8).reshape(3, SIDE, SIDE)
        return stamp_patch(images, scaled(patch, images.shape[-2:]), place="bottom-right")


def train_surrogate(images: Tensor, labels: Tensor, *, steps: int, generator: torch.Generator) -> Network:
    """The attacker's own WRN-16-1, plainly trained for some steps and then frozen in evaluation mode.

    Args:
        images: uint8 [N, 3, 32, 32].
        labels: int64 [N].
        steps: optimizer steps of `BATCH_SIZE` images.
        generator: of weights and batches.
    """
    model = make_model("wrn-16-1", num_classes=int(labels.max()) + 1, image_size=images.shape[-1], generator=generator).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    done = 0
    while done < steps:
        for chosen in batches(len(images), BATCH_SIZE, generator=generator):
            loss = F.cross_entropy(model(images[chosen])[0], labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
            if done == steps:
                break
    return model.eval().requires_grad_(False)
