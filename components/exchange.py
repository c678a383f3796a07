"""Poisoned sets of other benchmarks as deliveries with their truth, torchvision's data sets as deliveries, and the way back.

What BackdoorBench keeps on disk: `bd_train_dataset/<original label>/<index>.png`, only what the attack touched, covers with their true
label among it; the given labels stand in a pickled file, which is never opened here. ABL and many others keep arrays.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cbd.config import Ingest
from cbd.dataset import Truth, read_info, read_rows, read_truth, write_truth
from cbd.errors import ConfigError, DataError
from cbd.files import replacing
from cbd.images import Pixels, decode
from components.delivery import read_delivery

UNKNOWN = "imported"
"""Name of an attack whose trigger cannot be made again: detection can be measured on it, attack success cannot."""
BACKDOORBENCH, LABELS = "bd_train_dataset", "labels.csv"
PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".npz"}
TORCHVISION = (
    "MNIST",
    "FashionMNIST",
    "KMNIST",
    "EuroSAT",
    "GTSRB",
    "Flowers102",
    "FGVCAircraft",
    "Food101",
    "OxfordIIITPet",
    "STL10",
    "SVHN",
)
"""Those whose files hold no pickle. CIFAR's do: take its Parquet."""
ROWS = 1000


class Given(NamedTuple):
    """An image as it was given out."""

    data: bytes
    label: int
    true_label: int
    role: str
    path: str


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

        return _write(rows(), out, names, attack=attack, trigger=trigger or {})


def import_arrays(
    images: Path, labels: Path, out: Path, *, poisoned: Path | None = None, original: Path | None = None, class_names: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Counts of a delivery `out/delivery` made of arrays in `.npy` files, as ABL and others keep them, and its truth `out/truth`.

    Args:
        images: uint8 [N, H, W, 3].
        labels: int [N], as given.
        out: is written whole or not at all.
        poisoned: int indices of what the attack touched; None: nothing is known, and there is no truth.
        original: int [N], the true labels; needed with `poisoned`.
        class_names: in the order of the labels; by default their numbers.

    Raises:
        DataError: an array holds pickled objects, or has another shape or type.
    """
    pixels, given = _array(images, "u1", 4), _array(labels, "i", 1)
    if pixels.shape[3] != 3 or len(pixels) != len(given):
        raise DataError(f"{images}: expected [N, H, W, 3] and N labels, found {pixels.shape} and {len(given)} labels")
    if poisoned is not None and original is None:
        raise ConfigError("--poisoned needs --original: without the true labels poison cannot be told from covers")
    true = given if original is None else _array(original, "i", 1)
    touched = set() if poisoned is None else set(_array(poisoned, "i", 1).tolist())
    if len(true) != len(given) or not touched <= set(range(len(given))):
        raise DataError(f"{original or poisoned}: does not fit {len(given)} images")
    if not class_names and max(given.max(), true.max()) >= len(given):
        raise DataError(
            f"{labels}: a label of {max(given.max(), true.max())} among {len(given)} images; name the classes, or mend the labels"
        )
    names = class_names or tuple(str(number) for number in range(int(max(given.max(), true.max())) + 1))
    if min(given.min(), true.min()) < 0 or max(given.max(), true.max()) >= len(names):
        raise DataError(f"{labels}: labels from {given.min()} to {given.max()}, but {len(names)} classes are named")

    def rows() -> Iterator[Given]:
        for index, image in enumerate(pixels):
            role = "poison" if index in touched else "clean"
            yield Given(_png(image), int(given[index]), int(true[index]), role, f"{index}.png")

    return _write(rows(), out, names, attack=UNKNOWN if touched else None, trigger={})


def import_torchvision(name: str, root: Path, out: Path, *, split: str) -> dict[str, Any]:
    """Counts of a delivery `out/delivery` with one of torchvision's data sets, which is downloaded to `root` if it is not there.

    Raises:
        ConfigError: not one of `TORCHVISION`.
        DataError: it cannot be read or downloaded.
    """
    if name not in TORCHVISION:
        more = "; its files are pickled, take a Parquet copy" if name.startswith("CIFAR") else ""
        raise ConfigError(f"{name}: expected one of {', '.join(TORCHVISION)}{more}")
    import inspect

    from torchvision import datasets

    kind = getattr(datasets, name)
    known = inspect.signature(kind).parameters
    options: dict[str, Any] = {"split": split} if "split" in known else {"train": split == "train"} if "train" in known else {}
    try:
        data = kind(str(root), download=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(f"torchvision {name}: {told}; put its files under {root} as torchvision does, or connect to the network") from None
    labels = sorted({int(data[index][1]) for index in range(len(data))})
    names = tuple(str(one) for one in getattr(data, "classes", [])) or tuple(str(label) for label in labels)

    def rows() -> Iterator[Given]:
        for index in range(len(data)):
            image, label = data[index]
            yield Given(_png(np.asarray(image.convert("RGB"))), int(label), int(label), "clean", f"{name}-{split}-{index}.png")

    return _write(rows(), out, names, attack=None, trigger={})


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
                folder = temporary / ("clean_train_dataset" if role == "clean" else BACKDOORBENCH) / str(true)
                folder.mkdir(parents=True, exist_ok=True)
                data = row.data if row.format == "PNG" else _png(decode(row.data, max_pixels=row.width * row.height).pixels)
                (folder / f"{index}.png").write_bytes(data)
                if role != "clean":
                    writer.writerow([index, row.label])
        (temporary / "classes.json").write_text(json.dumps(list(read_info(dataset).class_names), ensure_ascii=False))
    return counts | {"out": str(out)}


def _touched(record: Path) -> dict[int, Path]:
    """The image files of `bd_train_dataset` by index."""
    folder = record / BACKDOORBENCH
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
            raise DataError(f"{path}: expected {BACKDOORBENCH}/<original label>/<index>.png, each index once; remove it")
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


def _write(
    rows: Iterable[Given], out: Path, class_names: tuple[str, ...], *, attack: str | None, trigger: dict[str, Any]
) -> dict[str, Any]:
    """Writes delivery and truth; what was touched and kept its label is a cover, unless no label was changed at all."""
    ids, roles, true_labels, given = [], [], [], []
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": list(class_names), "_type": "ClassLabel"}}}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    layout = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    with replacing(out) as temporary:
        (temporary / "delivery").mkdir(parents=True)
        with pq.ParquetWriter(temporary / "delivery" / "part-00000.parquet", layout, compression="zstd") as writer:
            pending: list[dict[str, Any]] = []
            for row in rows:
                if not 0 <= row.label < len(class_names):
                    raise DataError(f"{row.path}: label {row.label} is outside the {len(class_names)} classes; mend the labels")
                pending.append({"image": {"bytes": row.data, "path": row.path}, "label": row.label})
                ids.append(hashlib.sha256(row.data).hexdigest())
                roles.append(row.role)
                true_labels.append(row.true_label)
                given.append(row.label)
                if len(pending) == ROWS:
                    writer.write_table(pa.Table.from_pylist(pending, layout))
                    pending = []
            if pending:
                writer.write_table(pa.Table.from_pylist(pending, layout))
        truth = _truth(ids, roles, true_labels, given, num_classes=len(class_names), attack=attack, trigger=trigger)
        write_truth(temporary / "truth", truth)
    told = {role: (truth.roles if truth else roles).count(role) for role in ("clean", "poison", "cover")}
    return {"num_images": len(ids), **told, "paths": {"delivery": str(out / "delivery"), "truth": str(out / "truth")}}


def _truth(
    ids: list[str], roles: list[str], true: list[int], given: list[int], *, num_classes: int, attack: str | None, trigger: dict[str, Any]
) -> Truth | None:
    """What is known: whom the attack was after, and each image's role."""
    touched = [index for index, role in enumerate(roles) if role == "poison"]
    if attack is None or not touched:
        return None
    changed = [index for index in touched if given[index] != true[index]]
    for index in set(touched) - set(changed) if changed else ():
        roles[index] = "cover"
    poison = changed or touched
    targets = {given[index] for index in poison}
    mapping = "all-to-one"
    if len(targets) > 1:
        if any(given[index] != (true[index] + 1) % num_classes for index in poison):
            raise DataError(
                "the poisoned images are sent to several classes, but not each to the one after its own; import one attack at a time"
            )
        mapping = "all-to-all"
    return Truth(attack, min(targets), len(poison) / len(ids), trigger, ids, roles, true, mapping)


def _array(path: Path, kind: str, num_axes: int) -> Any:
    """The array in a `.npy` file, of that kind of numbers and so many axes; never unpickled."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, OSError, EOFError) as error:
        pickled = "objects" in str(error) or "pickle" in str(error).lower()
        told = "holds pickled objects, which are never opened" if pickled else "is no .npy file"
        raise DataError(f"{path}: {told}; save plain arrays with numpy.save (docs/bring-your-data.md shows how)") from None
    fits = array.dtype == np.uint8 if kind == "u1" else array.dtype.kind in "iu"
    if not fits or array.ndim != num_axes or not len(array):
        raise DataError(
            f"{path}: expected {num_axes} axes of {'uint8' if kind == 'u1' else 'whole numbers'}, found {array.dtype} {array.shape}"
        )
    return array


def _png(image: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
    return file.getvalue()
