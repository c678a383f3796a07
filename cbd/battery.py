"""The battery: twelve known triggers, and harmless members of their families with which a model is compared."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cbd.attacks import Attack, Images
from cbd.attacks.badnets import BadNets, scaled, stamp_patch
from cbd.attacks.blend import Blend
from cbd.attacks.sig import Sig
from cbd.attacks.wanet import WaNet

WAVE_LEVELS = 20.0
"""Amplitude of the sinusoids, in grey levels."""
SMOOTH_LEVELS = 30.0
"""Largest change by a low-frequency pattern, in grey levels."""
DARKEST = 0.6
"""A colour filter takes this share of one channel and leaves another whole."""


@dataclass(frozen=True)
class Trigger:
    """A known trigger of the battery."""

    name: str
    family: str
    attack: Attack


@dataclass(frozen=True)
class RandomPatch(Attack):
    """A harmless member of the patch family: random pixels [3, 3, 3] of 32x32, scaled like the patches, at a random place."""

    seed: int

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) with the patch."""
        generator = np.random.default_rng(self.seed)
        patch = scaled(generator.integers(0, 256, (3, 3, 3), np.uint8), images.shape[-2:])
        side = patch.shape[-1]
        return stamp_patch(
            images,
            patch,
            place=(int(generator.integers(images.shape[2] - side + 1)), int(generator.integers(images.shape[3] - side + 1))),
        )


@dataclass(frozen=True)
class Wave(Attack):
    """A harmless member of the sinusoid family: of the same amplitude, 3 to 9 periods, running 30 to 150 degrees from the columns."""

    seed: int

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) with the wave: float arithmetic, rounded, clipped to 0..255."""
        generator = np.random.default_rng(self.seed)
        periods, phase = generator.uniform(3, 9), generator.uniform(0, 2 * np.pi)
        angle = generator.uniform(np.pi / 6, 5 * np.pi / 6)
        rows, columns = (np.arange(side) / side for side in images.shape[-2:])
        along = np.cos(angle) * columns + np.sin(angle) * rows[:, None]
        return _added(images, WAVE_LEVELS * np.sin(2 * np.pi * periods * along + phase))


@dataclass(frozen=True)
class Smooth(Attack):
    """A pattern of low frequencies, on 4x4 random points enlarged bicubically, added to the image (Zeng et al., ICCV 2021)."""

    seed: int

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) with the pattern: float arithmetic, rounded, clipped to 0..255."""
        points = np.random.default_rng(self.seed).uniform(-1, 1, (3, 4, 4)).astype(np.float32)
        rows, columns = images.shape[-2:]
        pattern = np.stack([np.asarray(Image.fromarray(part).resize((columns, rows), Image.Resampling.BICUBIC)) for part in points])
        return _added(images, SMOOTH_LEVELS * pattern / np.abs(pattern).max())


@dataclass(frozen=True)
class Tint(Attack):
    """A colour filter: one channel, chosen by the seed, is darkened to `DARKEST`, another less, the third stays."""

    seed: int

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) behind the filter: float arithmetic, rounded."""
        generator = np.random.default_rng(self.seed)
        shares = generator.permutation(np.array([1.0, generator.uniform(DARKEST, 1), DARKEST]))
        tinted: Images = np.rint(images * shares[:, None, None]).astype(np.uint8)
        return tinted


def _added(images: Images, change: np.ndarray) -> Images:
    added: Images = np.clip(np.rint(images + change), 0, 255).astype(np.uint8)
    return added


BATTERY: tuple[Trigger, ...] = (
    Trigger("white-top-left", "patch", BadNets("white", "top-left")),
    Trigger("white-top-right", "patch", BadNets("white", "top-right")),
    Trigger("white-bottom-left", "patch", BadNets("white", "bottom-left")),
    Trigger("white-bottom-right", "patch", BadNets("white", "bottom-right")),
    Trigger("white-centre", "patch", BadNets("white", "centre")),
    Trigger("checker-bottom-right", "patch", BadNets("checker", "bottom-right")),
    Trigger("blend-0.1", "blend-0.1", Blend(0.1)),
    Trigger("blend-0.2", "blend-0.2", Blend(0.2)),
    Trigger("sinusoid", "sinusoid", Sig(WAVE_LEVELS)),
    Trigger("low-frequency", "low-frequency", Smooth(0)),
    Trigger("warp", "warp", WaNet()),
    Trigger("colour-filter", "colour-filter", Tint(0)),
)
FAMILIES: dict[str, Callable[[int], Attack]] = {
    "patch": RandomPatch,
    "blend-0.1": lambda seed: Blend(0.1, seed=seed),
    "blend-0.2": lambda seed: Blend(0.2, seed=seed),
    "sinusoid": Wave,
    "low-frequency": Smooth,
    "warp": lambda seed: WaNet(seed=seed),
    "colour-filter": Tint,
}
"""Random members of every trigger family at the same strength."""


def harmless(family: str, count: int, *, seed: int) -> list[Attack]:
    """Random members of a trigger family, which no supplier has trained into the model; none is a trigger of the battery."""
    return [FAMILIES[family](seed * 1_000_003 + 1 + index) for index in range(count)]
