"""A delivery on which the whole pipeline or a red team runs in seconds: scanned digits, three classes."""

from pathlib import Path

import numpy as np

from cbd.images import encode_png
from pipelines.demo import load_scans

PARAMS = """
seed: 0
confounder: {steps: 24, batch_size: 16}
deconfounded: {epochs: 3, batch_size: 16, crop: 2}
canary: {every: 0}
gate: {min_clean_accuracy: 0.2, min_images: 30, warn_images: 30, null_members: 2}
"""
REDTEAM_PARAMS = """
confounder: {steps: 12, batch_size: 16}
deconfounded: {epochs: 2, batch_size: 16, crop: 2}
gate: {min_clean_accuracy: 0.2}
presets:
  none: {deconfounded: {weight: none, mi_weight: 0}}
"""


def write_small(root: Path, *, params: str = PARAMS, first: int = 0) -> Path:
    """The folder, with `delivery` and `trusted`, 30 and 16 scans a class, from each one's scan `first` on, and `params.yaml`."""
    images, labels = load_scans()
    for label in range(3):
        for number, index in enumerate(np.flatnonzero(labels == label)[first : first + 46]):
            path = root / ("delivery" if number < 30 else "trusted") / str(label) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(images[index]))
    (root / "params.yaml").write_text(params)
    return root
