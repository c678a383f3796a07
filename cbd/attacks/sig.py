"""SIG: a faint sinusoid over the whole image, on images that keep their labels (Barni, Kallas and Tondi, ICIP 2019)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from cbd.attacks import Attack, Images


@dataclass(frozen=True)
class Sig(Attack):
    """image + delta * sin(2 pi * column * frequency / width), the same on every row and channel."""

    clean_label: ClassVar[bool] = True
    delta: Annotated[float, Field(gt=0, le=255)] = 40.0
    """Amplitude in grey levels."""
    frequency: Annotated[float, Field(gt=0)] = 6.0
    """Periods over the width of the image."""

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) with the sinusoid: float arithmetic, rounded, clipped to 0..255."""
        width = images.shape[-1]
        wave = self.delta * np.sin(2 * np.pi * np.arange(width) * self.frequency / width)
        stamped: Images = np.clip(np.rint(images + wave), 0, 255).astype(np.uint8)
        return stamped
