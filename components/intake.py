"""One delivery on its way in: every file decoded once, then staged or quarantined, then cleared of duplicates and conflicts."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cbd.config import Ingest
from cbd.dataset import Row, to_batches
from cbd.images import Refused
from cbd.shards import GROUP_ROWS, schema
from components.accepted import Earlier
from components.decoding import decode_files
from components.rawfiles import Delivery, RawFile
from components.tables import Table

_QUARANTINE = pa.schema(
    [
        ("original_path", pa.string()),
        ("label_name", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("image", pa.binary()),
    ]
)
_REJECTED = Refused("rejected", "a person rejected this image")
_DUPLICATES = pa.schema([(name, pa.string()) for name in ("original_path", "label_name", "sample_id", "duplicate_of", "kept_sample_id")])


class Summary(NamedTuple):
    """Where all delivered files went: accepted + duplicates + quarantined = delivered."""

    delivered: int
    accepted: int
    """New ones."""
    duplicates: int
    quarantined: int
    known: int
    """Duplicates of images that were accepted with an earlier delivery."""
    released: int
    """Files that people released from the quarantine, counted among the delivered ones."""
    reasons: dict[str, int]


@dataclass(slots=True)
class Intake:
    """What is known of a delivery when every file was seen once. Per staged image: its label, pixel digest and fate."""

    stage: Path
    """Parquet of everything that could be decoded, in the order of delivery; labels are indices into `label_names`."""
    delivered: int = 0
    label_names: list[str] = field(default_factory=list)
    """In the order of their first sight."""
    seen_names: set[str] = field(default_factory=set)
    """Names of all classes that were delivered, decodable or not."""
    labels: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    duplicate_of: dict[int, int] = field(default_factory=dict)
    """Staged image: the first one with the same pixels and label."""
    known: set[int] = field(default_factory=set)
    """Staged images that were accepted with an earlier delivery."""
    refused: dict[int, Refused] = field(default_factory=dict)
    """Staged images that do not go with others: under several labels, under another one than before, or rejected by a person."""
    released: dict[int, str] = field(default_factory=dict)
    """Staged images that a person released from the quarantine: whom each came from."""
    num_released: int = 0
    """Files that a person released, decodable or not, counted among the delivered ones."""
    reasons: Counter[str] = field(default_factory=Counter)

    def kept(self) -> npt.NDArray[np.bool_]:
        """Per staged image, whether it is accepted."""
        kept = np.ones(len(self.labels), bool)
        kept[[*self.duplicate_of, *self.known, *self.refused]] = False
        return kept

    def evenly(self, keep: npt.NDArray[np.bool_], num_images: int) -> npt.NDArray[np.bool_]:
        """The first so many of the images to keep, taking turns among the classes; all of them where 0 or more than there are is asked."""
        labels, kept = np.asarray(self.labels), np.flatnonzero(keep)
        turn = np.zeros(len(kept), np.int64)
        for label in np.unique(labels[kept]):
            turn[labels[kept] == label] = np.arange((labels[kept] == label).sum())
        few = np.zeros(len(keep), bool)
        few[kept[np.lexsort((kept, turn))][: num_images or None]] = True
        return few

    def counts(self) -> dict[str, int]:
        """Accepted images by class name, for every class that was delivered."""
        accepted = Counter(self.label_names[label] for label, kept in zip(self.labels, self.kept(), strict=True) if kept)
        return {name: accepted[name] for name in sorted(self.seen_names)}

    def summary(self) -> Summary:
        """The counts of the quarantine's `summary.json`."""
        reasons = dict(sorted(self.reasons.items()))
        duplicates = len(self.duplicate_of) + len(self.known)
        known = (len(self.known), self.num_released)
        return Summary(self.delivered, int(self.kept().sum()), duplicates, sum(reasons.values()), *known, reasons)

    @property
    def usable(self) -> int:
        """Files of the delivery itself that are accepted, or were with an earlier one."""
        kept = self.kept()
        return int(kept.sum()) + len(self.known) - sum(1 for index in self.released if kept[index] or index in self.known)

    def suppliers(self, supplier: str) -> set[str]:
        """Whom the accepted images came from; `supplier` delivered all that were not released."""
        return {self.released.get(index, supplier) for index in np.flatnonzero(self.kept()).tolist()}

    def batch(self) -> str:
        """12 hex digits over the pixels of all accepted images, whatever their order."""
        kept = sorted(digest for digest, chosen in zip(self.digests, self.kept(), strict=True) if chosen)
        return hashlib.sha256(b"".join(kept)).hexdigest()[:12]

    def accepted(self, class_names: list[str], keep: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
        """The staged images where `keep` is true, as batches of a data set with these class names."""
        name = self.batch()
        index = {name: number for number, name in enumerate(class_names)}
        new_label = np.array([index.get(name, -1) for name in self.label_names], np.int64)
        for start, batch in self._staged():
            labels = pa.array(new_label[batch["label"].to_numpy()])
            batch = batch.set_column(batch.schema.names.index("label"), "label", labels)
            batch = batch.set_column(batch.schema.names.index("batch"), "batch", pa.array([name] * len(batch), pa.string()))
            yield batch.filter(pa.array(keep[start : start + len(batch)]))

    def _staged(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        start = 0
        with pq.ParquetFile(self.stage) as file:
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(batch_size=GROUP_ROWS, row_groups=[group]):
                    yield start, batch
                    start += len(batch)

    def sort_out(self, quarantine: Table, duplicates: Table, earlier: Earlier) -> None:
        """Decides between equal pixels, earlier ones included: under one label the first is kept, under several labels none is.

        What was accepted before keeps its label, and a label that a person gave on release counts against all others.
        """
        names = [self.label_names[label] for label in self.labels]
        ruled = earlier.labels | {
            self.digests[index]: names[index] for index in sorted(self.released) if self.digests[index] not in earlier.labels
        }
        first: dict[bytes, int] = {}
        torn = set()
        for index, digest in enumerate(self.digests):
            if digest not in ruled and names[first.setdefault(digest, index)] != names[index]:
                torn.add(digest)
        first = {}
        for index, digest in enumerate(self.digests):
            if digest in earlier.rejected and index not in self.released:
                self.refused[index] = _REJECTED
            elif digest in torn:
                self.refused[index] = Refused("conflicting-labels", "the same image came under several labels")
            elif digest in ruled and names[index] != ruled[digest]:
                self.refused[index] = Refused("conflicts-with-accepted", f"the same image is accepted as {ruled[digest]!r}")
            elif digest in earlier.labels:
                self.known.add(index)
            elif first.setdefault(digest, index) != index:
                self.duplicate_of[index] = first[digest]
        self._tell(quarantine, duplicates, earlier)

    def _tell(self, quarantine: Table, duplicates: Table, earlier: Earlier) -> None:
        wanted = {*self.refused, *self.known, *self.duplicate_of, *self.duplicate_of.values()}
        if not wanted:
            return
        kept: dict[int, tuple[str, str]] = {}
        for start, batch in self._staged():
            for index in sorted(wanted.intersection(range(start, start + len(batch)))):
                row = batch.slice(index - start, 1).to_pylist()[0]
                path, sample_id, name = row["original_path"], row["sample_id"], self.label_names[row["label"]]
                if index in self.refused:
                    self.refuse(quarantine, RawFile(path, name, row["image"]["bytes"], row["num_bytes"], self.refused[index]))
                elif index in self.known or index in self.duplicate_of:
                    before = (None, earlier.ids[self.digests[index]]) if index in self.known else kept[self.duplicate_of[index]]
                    duplicates.add(dict(zip(_DUPLICATES.names, (path, name, sample_id, *before), strict=True)))
                else:
                    kept[index] = (path, sample_id)

    def refuse(self, quarantine: Table, raw: RawFile) -> None:
        """Writes a refused file to the quarantine and counts its reason."""
        if raw.refusal is None:
            raise ValueError(f"{raw.original_path!r} was not refused")
        self.reasons[raw.refusal.reason] += 1
        sha256 = None if raw.data is None else hashlib.sha256(raw.data).hexdigest()
        columns = (raw.original_path, raw.label_name, raw.refusal.reason, raw.refusal.detail, raw.num_bytes, sha256, raw.data)
        quarantine.add(dict(zip(_QUARANTINE.names, columns, strict=True)), len(raw.data or b""))


def take_in(
    delivery: Delivery,
    *,
    folder: Path,
    prefix: str,
    source: str,
    limits: Ingest,
    told: Callable[[int, int], None],
    earlier: Earlier | None = None,
) -> Intake:
    """The delivery, decoded and sorted out; its stage is written beside the quarantine files, for the caller to remove.

    Args:
        delivery: is walked to its end.
        folder: where `<prefix>quarantine.parquet`, `<prefix>duplicates.parquet` and the stage go.
        prefix: of the file names.
        source: the supplier.
        limits: of a single image.
        told: called with (files seen, files in all) now and then.
        earlier: what was delivered before; released files come in ahead of the delivery.
    """
    earlier = earlier or Earlier()
    if earlier.num_released:
        files = itertools.chain(earlier.released, delivery.files)
        delivery = replace(delivery, files=files, total=delivery.total + earlier.num_released)
    intake = Intake(folder / f"{prefix}stage.parquet")
    with Table(folder / f"{prefix}quarantine.parquet", _QUARANTINE) as quarantine:
        with pq.ParquetWriter(intake.stage, schema([]), compression="lz4") as stage:
            for batch in to_batches(_decodable(delivery, intake, quarantine, earlier, source=source, limits=limits, told=told)):
                stage.write_batch(batch.replace_schema_metadata(schema([]).metadata))
        with Table(folder / f"{prefix}duplicates.parquet", _DUPLICATES) as duplicates:
            intake.sort_out(quarantine, duplicates, earlier)
    return intake


def _decodable(
    delivery: Delivery,
    intake: Intake,
    quarantine: Table,
    earlier: Earlier,
    *,
    source: str,
    limits: Ingest,
    told: Callable[[int, int], None],
) -> Iterator[Row]:
    """A row for every file that is an image with a label; the others go to the quarantine."""
    numbers: dict[str, int] = {}
    for raw, row in decode_files(delivery.files, source=source, limits=limits):
        intake.delivered += 1
        if intake.delivered % 1000 == 0 or intake.delivered == delivery.total:
            told(intake.delivered, delivery.total)
        intake.num_released += raw.released_from is not None
        if raw.label_name is not None and raw.released_from is None:
            intake.seen_names.add(raw.label_name)
        if row is None or raw.label_name is None:
            intake.refuse(quarantine, raw)
            continue
        if row.sample_id in earlier.rejected_ids:
            intake.refuse(quarantine, raw._replace(refusal=_REJECTED))
            continue
        label = numbers.setdefault(raw.label_name, len(numbers))
        if label == len(intake.label_names):
            intake.label_names.append(raw.label_name)
        if raw.released_from is not None:
            intake.released[len(intake.labels)] = raw.released_from
        intake.labels.append(label)
        intake.digests.append(bytes.fromhex(row.pixel_digest))
        yield row._replace(label=label)
