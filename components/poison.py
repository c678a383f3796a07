"""A poisoned copy of a data set, for trials and benchmarks, its ground truth kept apart."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cbd.attacks import Attack, make_attack
from cbd.attacks.poisoning import choose_cover, choose_poison, stamp_each
from cbd.config import Poison
from cbd.dataset import Row, Truth, make_row, read_info, read_manifest, read_rows, to_batches, write_dataset, write_truth
from cbd.errors import ConfigError
from cbd.images import decode

TRIGGERS: dict[str, dict[str, Any]] = {
    "badnets": {"pattern": "checker", "place": "bottom-right"},
    "blend": {"alpha": 0.2, "seed": 0},
    "sig": {"delta": 40.0, "frequency": 6.0},
    "wanet": {"grid": 4, "strength": 0.5, "seed": 0},
}


def poison(dataset: Path, out: Path, *, truth: Path, params: Poison, seed: int) -> dict[str, Any]:
    """Counts of a poisoned copy of `dataset` in `out`, marked as a trial, with the roles in the folder `truth`.

    Stamped images are stored losslessly as PNG at their own size; all others keep their bytes.

    Raises:
        ConfigError: no attack is named, or the target is no class of the data set.
        DataError: the rate or the images do not fit the attack.
    """
    info = read_info(dataset)
    if params.attack is None:
        raise ConfigError(f"poison.attack: expected an attack, found none; give --attack with one of {', '.join(TRIGGERS)}")
    if params.target_label >= len(info.class_names):
        raise ConfigError(f"target label {params.target_label}: the data set has classes 0..{len(info.class_names) - 1}; give one of them")
    labels = np.array(read_manifest(dataset)["label"].to_pylist(), np.int64)
    trigger = TRIGGERS[params.attack]
    attack = make_attack(params.attack, **trigger)
    chosen = choose_poison(
        labels, poison_rate=params.poison_rate, target_label=params.target_label, seed=seed, clean_label=attack.clean_label
    )
    cover = choose_cover(labels, chosen, cover_rate=attack.cover_rate, seed=seed)
    roles_of = dict.fromkeys(chosen.tolist(), "poison") | dict.fromkeys(cover.tolist(), "cover")
    known: list[tuple[str, str, int]] = []
    rows = _poisoned_rows(dataset, roles_of, attack, target_label=params.target_label, seed=seed, known=known)
    written = write_dataset(out, to_batches(rows), class_names=info.class_names, supplier=info.supplier, trial=True)
    ids, roles, true_labels = (list(column) for column in zip(*known, strict=True))
    write_truth(truth, Truth(params.attack, params.target_label, params.poison_rate, trigger, ids, roles, true_labels))
    return {"poisoned": len(chosen), "cover": len(cover), "num_images": written.num_images, "digest": written.digest}


def _poisoned_rows(
    dataset: Path, roles_of: dict[int, str], attack: Attack, *, target_label: int, seed: int, known: list[tuple[str, str, int]]
) -> Iterator[Row]:
    """The rows of the copy; what is done to each is added to `known`."""
    for index, row in enumerate(read_rows(dataset)):
        new, role = row, roles_of.get(index, "clean")
        if role != "clean":
            pixels = decode(row.data, max_pixels=row.width * row.height).pixels.transpose(2, 0, 1)
            stamped = stamp_each(attack, [pixels])[0] if role == "poison" else attack.cover(pixels[None], seed=seed + index)[0]
            label = target_label if role == "poison" else row.label
            new = make_row(_png(stamped.transpose(1, 2, 0)), label=label, original_path=row.original_path, source=row.source)
        known.append((new.sample_id, role, row.label))
        yield new


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()
