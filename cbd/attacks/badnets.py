"""BadNets: a small patch in a fixed place (Gu, Dolan-Gavitt and Garg, arXiv:1708.06733)."""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from cbd.attacks import Attack, Images
from cbd.errors import DataError

CHECKER = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 255]], np.uint8)

Level = Annotated[int, Field(ge=0, le=255)]
Place = Literal["top-left", "top-right", "bottom-left", "bottom-right", "centre"]


@dataclass(frozen=True)
class BadNets(Attack):
    """A 3x3 patch (of 32x32 pixels; larger on larger images), checker or plain, in a corner or the centre."""

    pattern: Literal["checker", "white"] = "checker"
    """`white` is the plain patch."""
    place: Place = "bottom-right"
    colour: tuple[Level, Level, Level] = (255, 255, 255)
    """Red, green and blue of what is white in the pattern."""

    def stamp(self, images: Images) -> Images:
        """Copies of `images` (uint8 [N, 3, H, W]) with the patch.

        Raises:
            DataError: the images are smaller than the patch.
        """
        lit = CHECKER if self.pattern == "checker" else np.full((3, 3), 255, np.uint8)
        patch = np.where(lit, np.array(self.colour, np.uint8)[:, None, None], np.uint8(0))
        return stamp_patch(images, scaled(patch, images.shape[-2:]), place=self.place)


def scaled(patch: Images, size: tuple[int, ...]) -> Images:
    """A patch made for 32x32 pixels, (uint8 [..., h, w]), for images of `size` (rows, columns): each of its pixels becomes a square.

    Images are stamped at their own size and trained on at another, so a patch of fixed pixels would vanish on large ones. Where the
    shorter side is less than 32 it stays as it is.
    """
    side = patch.shape[-1]
    grown = max(side, round(side * min(size) / 32))
    index = np.arange(grown) * side // grown
    return patch[..., index[:, None], index]


def stamp_patch(images: Images, patch: Images, *, place: Place | tuple[int, int]) -> Images:
    """Copies of `images` with `patch` (uint8 [h, w] or [3, h, w]) at a named place or a (row, column)."""
    height, width = patch.shape[-2:]
    rows, columns = images.shape[-2:]
    if rows < height or columns < width:
        raise DataError(f"a {height}x{width} trigger does not fit on {rows}x{columns} images; use larger images")
    row, column = _corner(place, rows - height, columns - width) if isinstance(place, str) else place
    stamped = images.copy()
    stamped[..., row : row + height, column : column + width] = patch
    return stamped


def _corner(place: Place, last_row: int, last_column: int) -> tuple[int, int]:
    if place == "centre":
        return last_row // 2, last_column // 2
    vertical, horizontal = place.split("-")
    return (0 if vertical == "top" else last_row), (0 if horizontal == "left" else last_column)
