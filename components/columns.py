"""What the suite on a delivery looks at: the manifest of the data set, with columns that the suite cannot compute itself."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cbd.anomaly import CONSISTENT
from cbd.config import Validation
from cbd.dataset import DatasetInfo, read_manifest, read_samples
from cbd.images import Pixels, Refused, decode, extension_matches
from components.lookalikes import MIN_ENTROPY, lookalikes
from components.patches import repeated_patches

OUTLYING = 6.0
"""Robust standard deviations from the median beyond which brightness or entropy is an outlier."""
MIN_OF_CLASS = 20
MAX_PATCH_IMAGES, MAX_PIXELS = 50_000, 50_000_000


def manifest_frame(dataset: Path, info: DatasetInfo, trusted_set: Path, trusted_info: DatasetInfo) -> Any:
    """The manifest as a pandas frame, with what the suite cannot compute added as columns."""
    frame = read_manifest(dataset).to_pandas()
    trusted = read_manifest(trusted_set).to_pandas()
    trusted_digests = trusted["pixel_digest"].value_counts()
    counts = frame["label"].value_counts()
    frame["label_is_known"] = frame["label"].between(0, len(info.class_names) - 1)
    frame["class_images"] = frame["label"].map(counts)
    frame["class_share"] = frame["class_images"] / max(1, len(frame))
    frame["classes_match_trusted"] = info.class_names == trusted_info.class_names
    frame["num_empty_classes"] = sum(here == 0 < there for here, there in zip(info.class_counts, trusted_info.class_counts, strict=False))
    frame["num_copies_in_trusted"] = frame["pixel_digest"].map(trusted_digests).fillna(0).astype(int)
    frame["smaller_side"] = np.minimum(frame["width"], frame["height"])
    frame["aspect_ratio"] = np.maximum(frame["width"], frame["height"]) / np.maximum(1, frame["smaller_side"])
    paths = [path if isinstance(path, str) else "" for path in frame["original_path"]]
    frame["extension_matches"] = [extension_matches(path, format) for path, format in zip(paths, frame["format"], strict=True)]
    frame["path_is_plain"] = [path.isprintable() for path in paths]
    _add_lookalikes(frame, trusted)
    frame["is_outlier"] = _is_outlier(frame["brightness"]) | _is_outlier(frame["entropy"])
    newest = frame["batch"].iloc[-1] if len(frame) else ""
    new = (frame["batch"] == newest).to_numpy()
    frame["class_drift"] = np.where(new, drift(frame["label"].to_numpy(), new), 0.0)
    frame["supplier_ratio"] = supplier_ratios(frame["label"].to_numpy(), frame["source"].fillna("").to_numpy(str))
    return frame


def _add_lookalikes(frame: Any, trusted: Any) -> None:
    """Whether an image looks like another one of its class, of another class, or of the trusted set; a flat image like none.

    NaN where so many hashes are alike that it was not measured, which fails the check.
    """
    told = (frame["entropy"] >= MIN_ENTROPY).to_numpy()
    labels = np.where(frame["label_is_known"], frame["label"], 0).astype(np.int64)
    hashes = frame["phash"].to_numpy(np.uint64)
    near = lookalikes(hashes[told], labels[told], hashes[told], labels[told])
    sharp = trusted[trusted["entropy"] >= MIN_ENTROPY]
    copies = lookalikes(sharp["phash"].to_numpy(np.uint64), np.zeros(len(sharp), np.int64), hashes[told], np.zeros(told.sum(), np.int64))
    found = {
        "has_lookalike": near and near[0] > 1,
        "has_contradicting_lookalike": near and near[1] > near[0],
        "has_trusted_lookalike": copies and copies[1] > 0,
    }
    for name, values in found.items():
        frame[name] = np.nan if values is None else 0.0
        if values is not None:
            frame.loc[told, name] = values.astype(float)


def _is_outlier(values: Any) -> Any:
    """Whether each value is more than `OUTLYING` robust standard deviations from the median."""
    distance = (values - values.median()).abs()
    return distance > OUTLYING * max(CONSISTENT * distance.median(), 1.0)


def drift(labels: npt.NDArray[np.int64], new: npt.NDArray[np.bool_]) -> float:
    """Population stability index of the class shares: the sum of (p - q) * ln(p / q), new images against all others; 0 if there are none.

    Half an image is added to every count, so that no share is 0. By custom, under 0.1 is no shift and over 0.2 a clear one.

    Args:
        labels: int64 [N] >= 0.
        new: bool [N].
    """
    if new.all() or not new.any():
        return 0.0
    num_classes = int(labels.max()) + 1
    counts = [np.bincount(labels[chosen].clip(0), minlength=num_classes) + 0.5 for chosen in (new, ~new)]
    p, q = (count / count.sum() for count in counts)
    return float(((p - q) * np.log(p / q)).sum())


def supplier_ratios(labels: npt.NDArray[np.int64], suppliers: npt.NDArray[np.str_]) -> npt.NDArray[np.float64]:
    """float64 [N]: how many times as large the share of an image's class is at its supplier as at all others.

    1 where there is one supplier only, or where he sent fewer than `MIN_OF_CLASS` of the class; half an image is added to theirs.

    Args:
        labels: int64 [N] >= 0.
        suppliers: str [N].
    """
    ratios = np.ones(len(labels))
    for supplier in np.unique(suppliers):
        own = suppliers == supplier
        for label in np.unique(labels[own]):
            of = labels == label
            here, elsewhere = (own & of).sum(), (~own & of).sum()
            if here >= MIN_OF_CLASS and not own.all():
                ratios[own & of] = (here / own.sum()) / ((elsewhere + 0.5) / (~own).sum())
    return ratios


def add_patches(frame: Any, dataset: Path, info: DatasetInfo, limits: Validation) -> list[dict[str, Any]]:
    """The repeated patch of each class that has one; its share becomes a column."""
    most = min(limits.patch_images, MAX_PATCH_IMAGES // len(info.class_names))
    shuffled = frame[frame["label_is_known"] & frame["sample_id"].notna()].sample(frac=1, random_state=0)
    chosen = shuffled.groupby("label").head(most)
    label_of = dict(zip(chosen["sample_id"], chosen["label"], strict=True))

    def images() -> Iterator[tuple[Pixels, int]]:
        for row in read_samples(dataset, label_of, columns=["image", "sample_id"]):
            with contextlib.suppress(Refused):
                yield decode(row["image"]["bytes"], max_pixels=MAX_PIXELS).pixels, label_of[row["sample_id"]]

    found = repeated_patches(images(), num_classes=len(info.class_names))
    share = {patch.label: patch.share for patch in found}
    frame["repeated_patch"] = frame["label"].map(share).fillna(0.0)
    return [{"class_name": info.class_names[patch.label], **patch._asdict()} for patch in found]
