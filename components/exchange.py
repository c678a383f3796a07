"""Poisoned sets kept as arrays, as ABL and many others have them, and torchvision's data sets, as deliveries with their truth."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cbd.errors import ConfigError, DataError
from cbd.files import replacing
from cbd.images import encode_png
from cbd.truth import Truth, write_truth
from components.tables import Table

UNKNOWN = "imported"
"""Name of an attack whose trigger cannot be made again: detection can be measured on it, attack success cannot."""
PICKLES = frozenset({".pt", ".pth", ".pkl", ".pickle"})
"""Endings of files that are pickles; none is ever opened."""
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


class Given(NamedTuple):
    """An image as it was given out."""

    data: bytes
    label: int
    true_label: int
    role: str
    path: str


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
            yield Given(encode_png(image), int(given[index]), int(true[index]), role, f"{index}.png")

    return write_delivery(rows(), out, names, attack=UNKNOWN if touched else None, trigger={})


def import_torchvision(name: str, root: Path, out: Path, *, split: str) -> dict[str, Any]:
    """Counts of a delivery `out/delivery` with one of torchvision's data sets, which is downloaded to `root` if it is not there.

    Raises:
        ConfigError: not one of `TORCHVISION`.
        DataError: it cannot be read or downloaded.
    """
    if name not in TORCHVISION:
        more = "; its files are pickled, take a Parquet copy" if name.startswith("CIFAR") else ""
        raise ConfigError(f"{name}: expected one of {', '.join(TORCHVISION)}{more}")
    if pickles := sorted(path for path in (root / name).rglob("*") if path.suffix in PICKLES):
        raise DataError(f"{pickles[0]}: is pickled, and is never opened; remove it, the data set is read from its own files")
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
            yield Given(encode_png(np.asarray(image.convert("RGB"))), int(label), int(label), "clean", f"{name}-{split}-{index}.png")

    return write_delivery(rows(), out, names, attack=None, trigger={})


def write_delivery(
    rows: Iterable[Given], out: Path, class_names: tuple[str, ...], *, attack: str | None, trigger: dict[str, Any]
) -> dict[str, Any]:
    """Counts of what this writes to `out/delivery` and `out/truth`, whole or not at all.

    What was touched and kept its label is a cover, unless no label was changed at all.

    Args:
        rows: the images in their order; what was touched has the role `poison`.
        out: the folder.
        class_names: in the order of the labels.
        attack: its name; None: nothing is known, and there is no truth.
        trigger: its settings.

    Raises:
        DataError: a label is outside the classes, or the poison goes to several classes.
    """
    ids, roles, true_labels, given = [], [], [], []
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": list(class_names), "_type": "ClassLabel"}}}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    layout = pa.schema([("image", image), ("label", pa.int64())], metadata=metadata)
    with replacing(out) as temporary:
        (temporary / "delivery").mkdir(parents=True)
        with Table(temporary / "delivery" / "part-00000.parquet", layout) as table:
            for row in rows:
                if not 0 <= row.label < len(class_names):
                    raise DataError(f"{row.path}: label {row.label} is outside the {len(class_names)} classes; mend the labels")
                table.add({"image": {"bytes": row.data, "path": row.path}, "label": row.label}, len(row.data))
                ids.append(hashlib.sha256(row.data).hexdigest())
                roles.append(row.role)
                true_labels.append(row.true_label)
                given.append(row.label)
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
