"""Blend: a fixed pattern mixed into the whole image (Chen et al., arXiv:1712.05526)."""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from cbd.attacks import Attack, Images


@dataclass(frozen=True)
class Blend(Attack):
    """(1 - alpha) * image + alpha * pattern, with 32x32 pixels of uniform noise from `seed`, enlarged or shrunk to fit."""

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    seed: Annotated[int, Field(ge=0)] = 0

    def stamp(self, images: Images) -> Images:
        """Blended copies of `images` (uint8 [N, 3, H, W]): float arithmetic, rounded, clipped to 0..255."""
        rows, columns = images.shape[-2:]
        noise = np.random.default_rng(self.seed).integers(0, 256, (3, 32, 32)).astype(np.float32)
        pattern = noise[:, (np.arange(rows) * 32 // rows)[:, None], np.arange(columns) * 32 // columns]
        mixed = (1 - self.alpha) * images.astype(np.float32) + self.alpha * pattern
        return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
