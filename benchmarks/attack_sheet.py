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

from cbd.attacks import Attack, attack_class
from pipelines.demo import load_scans
from pipelines.options import ATTACKS

COLUMNS, SIDE, GAP, LEFT, NUM_IMAGES = 4, 64, 6, 84, 2000


def main() -> int:
    """Writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="Parquet in the Hugging Face image convention")
    arguments = parser.parse_args()
    images, labels = images_of(arguments.data)
    attacks = {name: attack_class(name).craft(images, labels, target_label=0, seed=0) for name in ATTACKS}
    draw(images[:COLUMNS], attacks).save(arguments.out, optimize=True)
    print(f"wrote {arguments.out}")
    return 0


def images_of(data: Path | None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first images of a data set or of the demo, uint8 [N, 3, 32, 32], and their labels; the attacks that train do so on these."""
    if data is None:
        scans, labels = load_scans()
        return np.ascontiguousarray(scans.transpose(0, 3, 1, 2)), labels
    table = pq.read_table(data).slice(0, NUM_IMAGES)
    opened = [Image.open(io.BytesIO(item["bytes"])).convert("RGB").resize((32, 32)) for item in table["image"].to_pylist()]
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in opened]), table["label"].to_numpy()


def draw(images: NDArray[np.uint8], attacks: dict[str, Attack]) -> Image.Image:
    """A row per attack: name, then for every image clean, triggered, and 128 + 4 times the difference."""
    cell = 3 * (SIDE + 2) + GAP
    sheet = Image.new("RGB", (LEFT + COLUMNS * cell, GAP + len(attacks) * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (name, attack) in enumerate(attacks.items()):
        stamped = attack.stamp(images)
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
