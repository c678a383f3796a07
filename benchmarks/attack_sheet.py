"""A picture sheet of the attacks: clean, triggered and their difference, on the demo's digits or on a data set of yours.

python benchmarks/attack_sheet.py docs/attacks.png [--data train.parquet]
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbd.attacks import make_attack
from components.poison import TRIGGERS
from pipelines.demo import load_scans

COLUMNS, SIDE, GAP, LEFT = 4, 64, 6, 84


def main() -> int:
    """Writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="Parquet in the Hugging Face image convention")
    arguments = parser.parse_args()
    draw(images_of(arguments.data)).save(arguments.out, optimize=True)
    print(f"wrote {arguments.out}")
    return 0


def images_of(data: Path | None) -> NDArray[np.uint8]:
    """The first images of a data set or of the demo: uint8 [COLUMNS, 3, 32, 32]."""
    if data is None:
        return load_scans()[0][:COLUMNS].transpose(0, 3, 1, 2)
    encoded = pq.read_table(data).slice(0, COLUMNS)["image"].to_pylist()
    opened = [Image.open(io.BytesIO(item["bytes"])).convert("RGB").resize((32, 32)) for item in encoded]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in opened])


def draw(images: NDArray[np.uint8]) -> Image.Image:
    """A row per attack: name, then for every image clean, triggered, and 128 + 4 times the difference."""
    cell = 3 * (SIDE + 2) + GAP
    sheet = Image.new("RGB", (LEFT + COLUMNS * cell, GAP + len(TRIGGERS) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, trigger) in enumerate(TRIGGERS.items()):
        stamped = make_attack(name, **trigger).stamp(images)
        difference = np.clip(128 + 4 * (stamped.astype(int) - images), 0, 255).astype(np.uint8)
        top = GAP + row * (SIDE + GAP)
        pen.text((GAP, top + SIDE // 2 - 6), name, fill="black", font_size=14)
        for column in range(COLUMNS):
            for place, shown in enumerate((images, stamped, difference)):
                tile = Image.fromarray(shown[column].transpose(1, 2, 0)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                sheet.paste(tile, (LEFT + column * cell + place * (SIDE + 2), top))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
