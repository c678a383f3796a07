"""The demo: scanned digits from a supplier who slips a backdoor and a dozen damaged files into the delivery."""

import datetime
import hashlib
import importlib.util
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cbd.attacks.badnets import BadNets
from cbd.config import Params
from cbd.errors import EnvironmentFault
from cbd.files import replacing
from cbd.images import encode_png
from cbd.truth import Truth, write_truth
from pipelines.damages import DAMAGES, HONEST_DAMAGES

NUM_TRUSTED_PER_CLASS = 70
POISON_RATE = 0.1
TARGET_LABEL = 0
SIZE = 32
TRAINING = {"deconfounded__epochs": 16, "deconfounded__crop": 2}
"""Enough for digits, which fill their frame; photographs need the longer training and the wider crops of params.yaml."""
SEED = 20230306
TRIGGER = {"pattern": "white", "place": "bottom-right"}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DemoData:
    """Where the demo's data lies."""

    delivery: Path
    """1,097 files in class folders "0" to "9"; 12 of them are no usable images."""
    trusted: Path
    """700 images, 70 per class, that never were in the supplier's hands."""
    truth: Path
    """Which images the supplier poisoned. Read by the evaluation only."""


def run_demo(out: Path, params: Params, *, baseline: bool, poisoned: bool = True) -> dict[str, Any]:
    """The result of the pipeline on the demo's data, in a fresh workspace in a new folder under `out`."""
    from pipelines.launch import Order, check_workspace, launch

    folder = out.resolve() / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    check_workspace(folder / "workspace")
    data = write_demo_data(folder, poisoned=poisoned)
    order = Order(
        data=str(data.delivery),
        trusted=str(data.trusted),
        workspace=folder / "workspace",
        name="digits",
        supplier="demo-supplier",
        truth=str(data.truth) if poisoned else "",
        baseline=baseline,
    )
    return launch(order, params)


def write_demo_data(folder: Path, *, poisoned: bool = True, seed: int = SEED) -> DemoData:
    """The demo's delivery, trusted set and ground truth, written to `folder`; always the same bytes.

    Args:
        folder: gets the folders `delivery`, `trusted` and `truth`.
        poisoned: without, the supplier is honest and eleven files are damaged by accident.
        seed: of who is trusted, who is damaged and who is poisoned.
    """
    images, labels = load_scans()
    generator = np.random.default_rng(seed)
    trusted, delivered = _split(labels, generator)
    damages = DAMAGES if poisoned else HONEST_DAMAGES
    damaged = generator.choice(delivered, len(damages), replace=False)
    intact = np.setdiff1d(delivered, damaged)
    candidates = intact[labels[intact] != TARGET_LABEL]
    poison = generator.choice(candidates, round(POISON_RATE * len(delivered)) if poisoned else 0, replace=False)
    data = DemoData(folder / "delivery", folder / "trusted", folder / "truth")
    with replacing(data.trusted) as temporary:
        for index in trusted:
            _write(temporary, int(labels[index]), index, encode_png(images[index]))
    given, pixels = labels.copy(), images.copy()
    given[poison] = TARGET_LABEL
    pixels[poison] = BadNets(**TRIGGER).stamp(images[poison].transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)  # type: ignore[arg-type]
    encoded = {int(index): encode_png(pixels[index]) for index in intact}
    with replacing(data.delivery) as temporary:
        for index, content in encoded.items():
            _write(temporary, int(given[index]), index, content)
        for index, damage in zip(damaged, damages, strict=True):
            damage(temporary / str(labels[index]) / f"scan-{index:04d}", images[index])
    roles = ["poison" if index in set(poison.tolist()) else "clean" for index in encoded]
    ids = [hashlib.sha256(content).hexdigest() for content in encoded.values()]
    truth = Truth("badnets", TARGET_LABEL, POISON_RATE, dict(TRIGGER), ids, roles, [int(labels[index]) for index in encoded])
    write_truth(data.truth, truth if poisoned else None)
    return data


def load_scans() -> tuple[Pixels, NDArray[np.int64]]:
    """scikit-learn's 1,797 scanned digits: images uint8 [N, 32, 32, 3] scaled up from 8x8, and labels int64 [N]."""
    from PIL import Image

    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise EnvironmentFault("scikit-learn is missing: its digits are the demo's data; run `make setup`")
    # Read from its file: importing scikit-learn to read 70 KB costs seconds.
    table = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    scans = np.rint(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    enlarged = [np.asarray(Image.fromarray(scan).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for scan in scans]
    return np.repeat(np.stack(enlarged)[..., None], 3, axis=3), table[:, 64].astype(np.int64)


def _split(labels: NDArray[np.int64], generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the trusted and of the delivered scans: the same number of each class is trusted."""
    trusted = [generator.choice(np.flatnonzero(labels == label), NUM_TRUSTED_PER_CLASS, replace=False) for label in range(10)]
    held_apart = np.sort(np.concatenate(trusted))
    return held_apart, np.setdiff1d(np.arange(len(labels)), held_apart)


def _write(folder: Path, label: int, index: int, content: bytes) -> None:
    path = folder / str(label) / f"scan-{index:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
