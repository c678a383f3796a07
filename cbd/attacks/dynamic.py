"""Dynamic: a trigger of its own for every image, drawn by a network (Nguyen and Tran, NeurIPS 2020, input-aware attack)."""

import base64
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from cbd.attacks import Attack, Images, Labels
from cbd.models import make_model

SIDE, BATCH_SIZE, MASK_STEPS, STEPS = 32, 64, 100, 300
CHUNK = 16
"""Images painted at once: twice as fast as 256, whose float64 buffers are returned to the system every time."""
DENSITY = 0.032
"""Largest mean of the mask: the share of an image that its trigger may cover."""
MASK_WEIGHT, DIVERSITY_WEIGHT, ATTACKED, CROSSED = 100.0, 1.0, 0.1, 0.1


class Hourglass(nn.Module):
    """Images [N, 3, 32, 32] in [-1, 1] to maps [N, C, 32, 32]: two levels down and up again, instance norms."""

    def __init__(self, channels_out: int) -> None:
        super().__init__()
        widths = [(3, 16, 1), (16, 32, 2), (32, 48, 2), (48, 32, 1), (32, 16, 1)]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in widths)
        self.last = nn.Conv2d(16, channels_out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for index, convolution in enumerate(self.convolutions):
            if index >= 3:
                x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = F.relu(F.instance_norm(convolution(x)))
        found: Tensor = self.last(x)
        return found


class Painter(nn.Module):
    """The two networks of the attacker: what is painted, and where."""

    def __init__(self) -> None:
        super().__init__()
        self.pattern, self.mask = Hourglass(3), Hourglass(1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pattern [N, 3, 32, 32] in [-1, 1] and mask [N, 1, 32, 32] in [0, 1] for images in [-1, 1]."""
        return self.pattern(images).tanh(), self.where(images)

    def where(self, images: Tensor) -> Tensor:
        """The mask alone."""
        found: Tensor = (10 * self.mask(images).tanh()).tanh() / 2 + 0.5
        return found


@dataclass(frozen=True)
class Dynamic(Attack):
    """(1 - mask) * image + mask * pattern, both drawn for each image; the trigger of one image does nothing on another.

    Cover samples carry another image's trigger and their true labels (the `cross-trigger` of the paper).
    """

    trained: ClassVar[bool] = True
    cover_rate: ClassVar[float] = CROSSED / ATTACKED
    painter: str
    """The weights of the `Painter`: safetensors of float16 in base64."""

    @classmethod
    def craft(cls, images: Images, labels: Labels, *, target_label: int, seed: int) -> Self:
        """Trains the painter together with a classifier that falls for it.

        First the mask alone: different for different images, and no larger than `DENSITY`. Then both networks with the classifier: a
        tenth of each batch is painted and called the target, a tenth is painted with the trigger of another image and called by its name.

        Args:
            images: uint8 [N, 3, 32, 32].
            labels: int64 [N].
            target_label: class that painted images are to be called.
            seed: of everything drawn.
        """
        generator = torch.Generator().manual_seed(seed)
        model = make_model("wrn-16-1", num_classes=int(labels.max()) + 1, image_size=SIDE, generator=generator).train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            painter = Painter()
        classify = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        find = torch.optim.Adam(painter.mask.parameters(), lr=0.01)
        paint = torch.optim.Adam(painter.pattern.parameters(), lr=0.01)
        given = torch.from_numpy(labels)
        for step in range(MASK_STEPS + STEPS):
            chosen, others = torch.randint(len(images), (2, BATCH_SIZE), generator=generator)
            x, other = _signed(images[chosen.numpy()]), _signed(images[others.numpy()])
            if step < MASK_STEPS:
                mask = painter.where(x)
                loss = _diversity(x, other, mask, painter.where(other)) + MASK_WEIGHT * _excess(mask)
                _take(find, loss)
                continue
            loss = _joint(painter, model, x, other, given[chosen], target_label=target_label)
            classify.zero_grad()
            _take(paint, loss)
            classify.step()
        weights = {name: tensor.detach().half().contiguous() for name, tensor in painter.state_dict().items()}
        return cls(base64.b64encode(save(weights)).decode())

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]), each with its own trigger: computed in float64, rounded, clipped to 0..255."""
        return self._painted(images, images)

    def cover(self, images: Images, *, seed: int) -> Images:
        """Copies of `images`, each with a stranger's trigger: that of itself upside down and inverted."""
        return self._painted(images, 255 - images[..., ::-1, ::-1])

    @cached_property
    def _painter(self) -> Painter:
        painter = Painter()
        painter.load_state_dict(load(base64.b64decode(self.painter)))
        return painter.double().eval()

    def _painted(self, images: Images, models: Images) -> Images:
        """`images` with the triggers of `models`, in parts that fit into memory."""
        painted = np.empty_like(images)
        for start in range(0, len(images), CHUNK):
            part = slice(start, start + CHUNK)
            with torch.no_grad():
                seen = F.interpolate(_signed(models[part]).double(), (SIDE, SIDE), mode="area")
                pattern, mask = self._painter(seen)
                pattern, mask = (F.interpolate(drawn, images.shape[-2:], mode="nearest") for drawn in (pattern, mask))
                mixed = (1 - mask) * torch.from_numpy(images[part]) + mask * (pattern + 1) * 127.5
            painted[part] = mixed.round().clamp(0, 255).to(torch.uint8).numpy()
        return painted


def _joint(painter: Painter, model: nn.Module, x: Tensor, other: Tensor, given: Tensor, *, target_label: int) -> Tensor:
    """Cross-entropy of attacked, crossed and clean images of one batch, and the diversity of the patterns."""
    attacked, crossed = round(ATTACKED * len(x)), round(CROSSED * len(x))
    with torch.no_grad():
        mask, other_mask = painter.where(x), painter.where(other)
    pattern, other_pattern = painter.pattern(x).tanh(), painter.pattern(other).tanh()
    until = attacked + crossed
    painted = torch.cat(
        (
            x[:attacked] + (pattern[:attacked] - x[:attacked]) * mask[:attacked],
            x[attacked:until] + (other_pattern[attacked:until] - x[attacked:until]) * other_mask[attacked:until],
            x[until:],
        )
    )
    labels = given.clone()
    labels[:attacked] = target_label
    cross_entropy = F.cross_entropy(model((painted + 1) * 127.5)[0], labels)
    return cross_entropy + DIVERSITY_WEIGHT * _diversity(x, other, pattern, other_pattern)


def _diversity(x: Tensor, other: Tensor, drawn: Tensor, other_drawn: Tensor) -> Tensor:
    """Mean of how far two images are apart over how far their triggers are: small if different images have different triggers."""
    apart = (x - other).square().mean((1, 2, 3)).sqrt()
    drawn_apart = (drawn - other_drawn).square().mean((1, 2, 3)).add(1e-8).sqrt()
    return (apart / (drawn_apart + 1e-3)).mean()


def _excess(mask: Tensor) -> Tensor:
    """By how much the mask is larger than `DENSITY`."""
    return F.relu(mask - DENSITY).mean()


def _signed(images: Images) -> Tensor:
    return torch.from_numpy(images).float() / 127.5 - 1


def _take(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
