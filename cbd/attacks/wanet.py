"""WaNet: a smooth warp that people do not see (Nguyen and Tran, ICLR 2021)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from cbd.attacks import Attack, Images
from cbd.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WaNet(Attack):
    """Every pixel is fetched from a place moved by a fixed smooth field; cover samples are moved at random on top of it."""

    cover_rate: ClassVar[float] = 2.0
    grid: Annotated[int, Field(ge=2)] = 4
    """k: the field is drawn on k x k points and enlarged bicubically."""
    strength: Annotated[float, Field(gt=0)] = 0.5
    """s: the mean displacement of the k x k points is s / 2 pixels of 32 in each direction."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the field."""

    def stamp(self, images: Images) -> Images:
        """Warped copies of `images` (uint8 [N, 3, H, W]): bilinear, rounded, places outside are moved to the border.

        Raises:
            DataError: the images are smaller than the grid.
        """
        field = self._field(*images.shape[-2:])
        return _warp(images, np.broadcast_to(field, (len(images), *field.shape)))

    def cover(self, images: Images, *, seed: int) -> Images:
        """Copies of `images` warped by the field and, pixel by pixel, by up to half a pixel of 32 more at random from `seed`."""
        field = self._field(*images.shape[-2:])
        most = np.array(images.shape[-2:])[:, None, None] / 64
        noise = np.random.default_rng(seed).uniform(-most, most, (len(images), *field.shape))
        return _warp(images, field + noise)

    def _field(self, height: int, width: int) -> Floats:
        """Displacements in pixels, rows and columns: float [2, H, W]."""
        if min(height, width) < self.grid:
            raise DataError(f"a warp of {self.grid}x{self.grid} points does not fit on {height}x{width} images; use larger images")
        points = np.random.default_rng(self.seed).uniform(-1, 1, (2, self.grid, self.grid))
        points /= np.abs(points).mean()
        enlarge = [Image.fromarray(part.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC) for part in points]
        scale = self.strength / 2 * np.array([height, width]) / 32
        return np.stack([np.asarray(part, np.float64) for part in enlarge]) * scale[:, None, None]


def _warp(images: Images, field: Floats) -> Images:
    """`images` (uint8 [N, 3, H, W]) fetched from their own places plus `field` (float [N, 2, H, W], pixels), bilinearly."""
    num, _, height, width = images.shape
    rows = np.clip(np.arange(height)[:, None] + field[:, 0], 0, height - 1)
    columns = np.clip(np.arange(width)[None, :] + field[:, 1], 0, width - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, along = (rows - top)[:, None], (columns - left)[:, None]
    pick = np.arange(num)[:, None, None]

    def fetch(row: NDArray[np.int64], column: NDArray[np.int64]) -> Floats:
        fetched: Floats = images.transpose(0, 2, 3, 1)[pick, row, column].transpose(0, 3, 1, 2).astype(np.float64)
        return fetched

    upper = fetch(top, left) * (1 - along) + fetch(top, right) * along
    lower = fetch(bottom, left) * (1 - along) + fetch(bottom, right) * along
    warped: Images = np.clip(np.rint(upper * (1 - down) + lower * down), 0, 255).astype(np.uint8)
    return warped
