"""BackdoorBench's poisoned sets as deliveries with their truth, and the way back.

What it keeps on disk: `bd_train_dataset/<original label>/<index>.png`, only what the attack touched, covers with their true label among it;
the given labels stand in a pickled file, which is never opened here.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cbd.config import Ingest
from cbd.dataset import read_info, read_rows
from cbd.errors import ConfigError, DataError
from cbd.files import replacing
from cbd.images import decode, encode_png
from cbd.truth import read_truth
from components.delivery import read_delivery
from components.exchange import PICKLES, UNKNOWN, Given, write_delivery

TOUCHED, LABELS = "bd_train_dataset", "labels.csv"


def import_backdoorbench(
    record: Path, clean: str, out: Path, *, target_label: int | None = None, attack: str = UNKNOWN, trigger: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Counts of the delivery `out/delivery` and its truth `out/truth`: a clean training set, with what BackdoorBench's attack made of it.

    Args:
        record: the attack's folder; with a `labels.csv` (`index,label`) the given labels are read from it.
        clean: the training set that was attacked, as a delivery in the same order.
        out: is written whole or not at all.
        target_label: the given label of all images where there is no `labels.csv`.
        attack: its name here, if the trigger is one of ours.
        trigger: its settings.

    Raises:
        DataError: pickles alone, images that are not the clean set's, or labels that are of no known kind.
    """
    touched = _touched(record)
    given = _given_labels(record / LABELS, touched) if (record / LABELS).is_file() else None
    if given is None and target_label is None:
        raise ConfigError(
            f"{record}: no {LABELS}, so the given labels are not known; name the target with --target-label, or write the file"
        )
    with read_delivery(clean, name="clean set", limits=Ingest()) as delivery:
        names = delivery.class_names
        if names is None:
            raise DataError(f"clean set {clean!r}: names no classes in their order; give Parquet with `huggingface` metadata")
        index_of = {name: number for number, name in enumerate(names)}

        def rows() -> Iterator[Given]:
            for index, raw in enumerate(delivery.files):
                if raw.data is None or raw.label_name is None:
                    why = raw.refusal.reason if raw.refusal else "no label"
                    raise DataError(f"clean set {clean!r}: image {index} is not usable ({why}); give the set that was attacked, whole")
                true, path = index_of[raw.label_name], touched.pop(index, None)
                if path is None:
                    yield Given(raw.data, true, true, "clean", raw.original_path)
                    continue
                if path.parent.name != str(true):
                    was = f"{path}: was of class {path.parent.name}, image {index} of the clean set is of class {true}"
                    raise DataError(f"{was}; give the set in the order in which it was attacked")
                yield Given(path.read_bytes(), given[index] if given else int(target_label or 0), true, "poison", raw.original_path)
            if touched:
                raise DataError(f"{next(iter(touched.values()))}: the clean set has no such image; give the set that was attacked, whole")

        return write_delivery(rows(), out, names, attack=attack, trigger=trigger or {})


def export_backdoorbench(dataset: Path, truth: Path, out: Path) -> dict[str, Any]:
    """Counts of what this writes to `out` in BackdoorBench's layout: touched images, the others in `clean_train_dataset`, and `labels.csv`.

    Raises:
        DataError: data set or truth are missing, or do not belong together.
    """
    known = read_truth(truth)
    if known is None:
        raise DataError(f"{truth}: knows of no poison; give the truth that `cbd poison` wrote")
    role_of = {sample: (role, true) for sample, role, true in zip(known.sample_ids, known.roles, known.true_labels, strict=True)}
    counts = dict.fromkeys(("clean", "poison", "cover"), 0)
    with replacing(out) as temporary:
        temporary.mkdir()
        with (temporary / LABELS).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "label"])
            for index, row in enumerate(read_rows(dataset)):
                if row.sample_id not in role_of:
                    raise DataError(f"{truth}: does not know image {row.sample_id[:12]} of the data set; give the truth of this data set")
                role, true = role_of[row.sample_id]
                counts[role] += 1
                folder = temporary / ("clean_train_dataset" if role == "clean" else TOUCHED) / str(true)
                folder.mkdir(parents=True, exist_ok=True)
                data = row.data if row.format == "PNG" else encode_png(decode(row.data, max_pixels=row.width * row.height).pixels)
                (folder / f"{index}.png").write_bytes(data)
                if role != "clean":
                    writer.writerow([index, row.label])
        (temporary / "classes.json").write_text(json.dumps(list(read_info(dataset).class_names), ensure_ascii=False))
    return counts | {"out": str(out)}


def _touched(record: Path) -> dict[int, Path]:
    """The image files of `bd_train_dataset` by index."""
    folder = record / TOUCHED
    if not folder.is_dir():
        pickles = sorted(path.name for path in record.glob("*") if path.suffix in PICKLES)
        what = f"only {pickles[0]}, which is pickled and is never opened" if pickles else "no such folder"
        raise DataError(f"{folder}: {what}; export the images where BackdoorBench runs (docs/bring-your-data.md shows how)")
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        plain = path.is_file() and not path.is_symlink() and path.parent.parent == folder and path.parent.name.isdecimal()
        if not plain or path.suffix != ".png" or not path.stem.isdecimal() or int(path.stem) in found:
            raise DataError(f"{path}: expected {TOUCHED}/<original label>/<index>.png, each index once; remove it")
        found[int(path.stem)] = path
    if not found:
        raise DataError(f"{folder}: holds no image; export the images where BackdoorBench runs")
    return found


def _given_labels(path: Path, touched: dict[int, Path]) -> dict[int, int]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            rows = [(int(row["index"]), int(row["label"])) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error):
            raise DataError(f"{path}: expected the columns index and label, whole numbers; write it again") from None
    given = dict(rows)
    if len(given) < len(rows):
        raise DataError(f"{path}: names an image twice; write it again")
    if missing := sorted(set(touched) - set(given)):
        raise DataError(f"{path}: has no label of image {missing[0]}; write it again")
    return given
