"""A poisoned copy of a data set, for trials and benchmarks, its ground truth kept apart."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from cbd.attacks import Attack, attack_class, configure
from cbd.attacks.poisoning import Goal, choose_cover, choose_poison
from cbd.config import AttackName, Poison
from cbd.dataset import Row, make_row, read_info, read_manifest, read_rows, to_batches, write_dataset
from cbd.errors import ConfigError, DataError
from cbd.images import decode, encode_png, resize
from cbd.truth import Truth, read_truth, write_truth
from components.records import progress

CHUNK = 2048
"""Rows that are held in memory at once."""
CRAFT_SIZE, CRAFT_IMAGES = 32, 10_000
"""Attacks that train a network do so on at most so many images, at this side in pixels."""


def poison(dataset: Path, out: Path, *, truth: Path, params: Poison, seed: int, before: Sequence[Path] = ()) -> dict[str, Any]:
    """Counts of a poisoned copy of `dataset` in `out`, marked as a trial, with the roles in the folder `truth`.

    Stamped images are stored losslessly as PNG at their own size; all others keep their bytes.

    Args:
        dataset: left unchanged.
        out: gets the copy.
        truth: gets the ground truth of this attack.
        params: attack, rate and goal.
        seed: of the choice of samples, and of an attack that trains a network.
        before: ground truths of the attacks that are already in `dataset`; their poison and covers are left alone.

    Raises:
        ConfigError: no attack is named, it has no such trigger, or target or source are no class of the data set.
        DataError: the rate or the images do not fit the attack, or its trigger changes no image.
    """
    info = read_info(dataset)
    if params.attack is None:
        raise ConfigError(f"poison.attack: expected an attack, found none; give --attack with one of {', '.join(get_args(AttackName))}")
    for name, label in (("target", params.target_label), ("source", params.source_label)):
        if label is not None and label >= len(info.class_names):
            raise ConfigError(f"{name} label {label}: the data set has classes 0..{len(info.class_names) - 1}; give one of them")
    manifest = read_manifest(dataset)
    labels = np.array(manifest["label"].to_pylist(), np.int64)
    goal, kind = Goal(params.target_label, params.mapping, params.source_label), attack_class(params.attack)
    spared = _marked(before, manifest["sample_id"].to_pylist()) if before else None
    chosen = choose_poison(labels, poison_rate=params.poison_rate, goal=goal, seed=seed, clean_label=kind.clean_label, spared=spared)
    cover = choose_cover(
        labels,
        chosen if spared is None else np.union1d(chosen, spared),
        num_poison=len(chosen),
        cover_rate=kind.cover_rate,
        seed=seed,
        source_label=goal.source_label,
    )
    roles_of = dict.fromkeys(chosen.tolist(), "poison") | dict.fromkeys(cover.tolist(), "cover")
    stamps = _Stamps(_craft(kind, dataset, goal, params=params, seed=seed), goal, roles_of, num_classes=len(info.class_names), seed=seed)
    written = write_dataset(out, to_batches(stamps.rows(dataset)), class_names=info.class_names, supplier=info.supplier, trial=True)
    if not stamps.changed:
        raise DataError(f"the trigger leaves every pixel of {len(chosen)} images unchanged; choose another trigger")
    ids, roles, true_labels = (list(column) for column in zip(*stamps.known, strict=True))
    about = (params.attack, params.target_label, params.poison_rate, stamps.attack.settings())
    write_truth(truth, Truth(*about, ids, roles, true_labels, goal.mapping, goal.source_label))
    return {"poisoned": len(chosen), "cover": len(cover), "num_images": written.num_images, "digest": written.digest}


def _craft(kind: type[Attack], dataset: Path, goal: Goal, *, params: Poison, seed: int) -> Attack:
    """The attack; one that trains a network sees the first images of the data set."""
    if params.trigger or not kind.trained:
        return configure(str(params.attack), params.trigger)
    progress("poison", 0, 2, f"training the network of the {kind.__name__.lower()} attack")
    rows = list(itertools.islice(read_rows(dataset), CRAFT_IMAGES))
    images = np.empty((len(rows), 3, CRAFT_SIZE, CRAFT_SIZE), np.uint8)
    for index, row in enumerate(rows):
        images[index] = resize(decode(row.data, max_pixels=row.width * row.height).pixels, CRAFT_SIZE).transpose(2, 0, 1)
    return kind.craft(images, np.array([row.label for row in rows], np.int64), target_label=goal.target_label, seed=seed)


def _marked(truths: Sequence[Path], sample_ids: list[str]) -> npt.NDArray[np.int64]:
    """Indices of the samples that other attacks have stamped."""
    known = [truth for truth in map(read_truth, truths) if truth]
    stamped = set().union(*(truth.samples_with("poison", "cover") for truth in known))
    return np.array([index for index, sample in enumerate(sample_ids) if sample in stamped], np.int64)


class _Stamps:
    """The rows of the poisoned copy, and what was done to each of them."""

    def __init__(self, attack: Attack, goal: Goal, roles_of: dict[int, str], *, num_classes: int, seed: int) -> None:
        self.attack, self.goal, self.roles_of, self.num_classes, self.seed = attack, goal, roles_of, num_classes, seed
        self.known: list[tuple[str, str, int]] = []
        """Sample id, role and true label of every row so far."""
        self.changed = 0
        """Poisoned images whose pixels the trigger changed."""

    def rows(self, dataset: Path) -> Iterator[Row]:
        """The rows of `dataset`, stamped by their roles."""
        numbered = enumerate(read_rows(dataset))
        while part := list(itertools.islice(numbered, CHUNK)):
            stamped = self._stamped([(index, row) for index, row in part if index in self.roles_of])
            for index, row in part:
                new = stamped.get(index, row)
                self.known.append((new.sample_id, self.roles_of.get(index, "clean"), row.label))
                yield new

    def _stamped(self, marked: list[tuple[int, Row]]) -> dict[int, Row]:
        """The new rows by index; images of the same role, label and size are stamped together."""
        groups: dict[tuple[str, int, int, int], list[tuple[int, Row, npt.NDArray[np.uint8]]]] = {}
        for index, row in marked:
            pixels = decode(row.data, max_pixels=row.width * row.height).pixels.transpose(2, 0, 1)
            groups.setdefault((self.roles_of[index], row.label, *pixels.shape[1:]), []).append((index, row, pixels))
        made = {}
        for (role, label, *_), members in groups.items():
            images = np.stack([pixels for _, _, pixels in members])
            if role == "poison":
                label = int(self.goal.wanted(np.array([label]), num_classes=self.num_classes)[0])
                stamped = self.attack.poison(images, target_label=label)
                self.changed += int((stamped != images).any((1, 2, 3)).sum())
            else:
                stamped = self.attack.cover(images, seed=self.seed + members[0][0])
            for (index, row, _), pixels in zip(members, stamped, strict=True):
                new = make_row(encode_png(pixels.transpose(1, 2, 0)), label=label, original_path=row.original_path, source=row.source)
                made[index] = new._replace(batch=row.batch)
        return made
