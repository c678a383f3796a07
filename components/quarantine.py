"""The workspace's quarantine: every file that was ever refused, its bytes, and what people decided about it.

Each run adds one Parquet file; nothing is taken out again. What people decide are signed entries of the audit log, and the last word
counts, about a file as about its pixels.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cbd.audit import append, now
from cbd.config import Ingest
from cbd.dataset import read_info, read_samples
from cbd.errors import DataError
from cbd.files import replacing
from cbd.heads import read_log
from components.decoding import decode_files
from components.rawfiles import RawFile
from components.tables import Table

STORE, EVENT = "quarantine", "quarantine"
REJECTED = "rejected"
"""Why an image of a data set is in the quarantine: a person sent it there."""
Action = Literal["release", "reject"]
STATUS = {"release": "released", "reject": "rejected"}
_TEXT = ("id", "supplier", "first_seen", "run_id", "model", "original_path", "label_name", "reason", "detail")
COLUMNS = pa.schema([*((name, pa.string()) for name in _TEXT), ("num_bytes", pa.int64()), ("image", pa.binary())])
MIN_ID = 8


class Held(NamedTuple):
    """A refused file."""

    id: str
    """SHA-256 of its bytes; of path, reason and size where it was not read."""
    supplier: str
    first_seen: str
    """When, in UTC."""
    run_id: str
    model: str
    """Full name of the registered model whose run refused it; it comes back for that one only."""
    original_path: str
    label_name: str | None
    """Of several, the first that it came under."""
    reason: str
    detail: str
    num_bytes: int
    status: str
    """`quarantined`, `released` (comes back in the next run) or `rejected` (never does)."""
    num_labels: int
    """Under how many labels the same bytes came."""


class Ruling(NamedTuple):
    """What a person decided about a file."""

    action: Action
    pixel_digest: str | None
    """None where it cannot be decoded."""
    label_name: str | None
    """The label that a released file shall have."""


@dataclass
class Rulings:
    """The last word on each file and on all pixels."""

    of_file: dict[str, Ruling] = field(default_factory=dict)
    of_pixels: dict[str, Ruling] = field(default_factory=dict)

    def rejects_file(self, name: str) -> bool:
        """Whether a file with this SHA-256 shall never come again."""
        return name in self.of_file and self.of_file[name].action == "reject"

    def rejected_pixels(self) -> frozenset[str]:
        """Digests of pixels that shall never come again."""
        return frozenset(digest for digest, ruling in self.of_pixels.items() if ruling.action == "reject")

    def released(self) -> dict[str, Ruling]:
        """The files that shall come back, by id: neither they nor their pixels were rejected since."""
        found = {name: ruling for name, ruling in self.of_file.items() if ruling.action == "release"}
        return {
            name: ruling
            for name, ruling in found.items()
            if not ruling.pixel_digest or self.of_pixels[ruling.pixel_digest].action == "release"
        }


def keep(refused: Path, workspace: Path, *, run_id: str, supplier: str, model: str) -> int:
    """How many files of a run's `quarantine.parquet` were new to the workspace's quarantine, which now has them.

    Args:
        refused: as `ingest` wrote it.
        workspace: gets `quarantine/<run_id>.parquet` if there is anything new.
        run_id: of the run that refused them.
        supplier: who delivered them.
        model: full name of the model that the run is about.
    """
    known = {(row["id"], row["label_name"]) for row in _rows(workspace, ["id", "label_name", "run_id"]) if row["run_id"] != run_id}
    about = {"supplier": supplier, "first_seen": now("seconds"), "run_id": run_id, "model": model}

    def rows() -> Iterator[dict[str, Any]]:
        for row in _read(refused, None):
            name = row.pop("sha256") or _digest(row["original_path"], row["reason"], row["num_bytes"])
            if (name, row["label_name"]) not in known:
                known.add((name, row["label_name"]))
                yield {"id": name, **about, **row}

    return _write(workspace / STORE / f"{run_id}.parquet", rows())


def send(dataset: Path, sample_ids: Sequence[str], workspace: Path, *, run_id: str, model: str) -> dict[str, str]:
    """Puts images of a data set into the quarantine too, so that a rejection loses nothing; the pixel digest of each by sample id.

    Raises:
        DataError: an id is not in the data set.
    """
    names, wanted = read_info(dataset).class_names, sorted(set(sample_ids))
    known, found = {row["id"] for row in _rows(workspace, ["id"])}, {}

    def rows() -> Iterator[dict[str, Any]]:
        for row in read_samples(dataset, wanted):
            found[row["sample_id"]] = row["pixel_digest"]
            if row["sample_id"] not in known:
                about = {"id": row["sample_id"], "supplier": row["source"], "first_seen": now("seconds"), "run_id": run_id, "model": model}
                about |= {"original_path": row["original_path"], "label_name": names[row["label"]], "num_bytes": row["num_bytes"]}
                yield about | {"reason": REJECTED, "detail": "was accepted once", "image": row["image"]["bytes"]}

    _write(workspace / STORE / f"{run_id}-{_digest(*wanted)[:12]}.parquet", rows())
    if strays := sorted(set(wanted) - set(found)):
        raise DataError(f"{strays[0]}: no image of {dataset} has this sample id; `cbd suspects RUN` lists them")
    return found


def listed(workspace: Path, known: Rulings | None = None) -> list[Held]:
    """Every refused file, the first seen first, without its bytes.

    Args:
        workspace: with the quarantine and the audit log.
        known: what people decided; None: it is read from the log.

    Raises:
        DataError: the audit log was altered.
    """
    ruled = (known or rulings(workspace)).of_file
    first: dict[str, dict[str, Any]] = {}
    labels: dict[str, set[str | None]] = {}
    for row in _rows(workspace, [name for name in COLUMNS.names if name != "image"]):
        first.setdefault(row["id"], row)
        labels.setdefault(row["id"], set()).add(row["label_name"])
    statuses = {name: STATUS[ruled[name].action] if name in ruled else "quarantined" for name in first}
    held = [Held(**row, status=statuses[name], num_labels=len(labels[name])) for name, row in first.items()]
    return sorted(held, key=lambda one: (one.first_seen, one.run_id, one.original_path))


def find(workspace: Path, ids: Iterable[str]) -> list[Held]:
    """The refused files whose ids begin so.

    Raises:
        DataError: an id is too short, of no file, or of several.
    """
    known, found = listed(workspace), []
    for name in ids:
        hits = [held for held in known if held.id.startswith(name)] if len(name) >= MIN_ID else []
        if len(hits) != 1:
            told = f"{len(hits)} files have an id that begins so" if len(name) >= MIN_ID else f"give at least {MIN_ID} digits of the id"
            raise DataError(f"{name!r}: {told}; `cbd quarantine list` shows them all")
        found += hits
    return found


def read_bytes(workspace: Path, ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Id and original bytes of each file that has any, once each, one at a time.

    Raises:
        DataError: the bytes are no longer those that were refused.
    """
    left = set(ids)
    for path in sorted((workspace / STORE).glob("*.parquet")):
        for row in _read(path, left) if left else ():
            if row["image"] is None or row["id"] not in left:
                continue
            if hashlib.sha256(row["image"]).hexdigest() != row["id"]:
                raise DataError(f"{path}: altered: the bytes of {row['id'][:12]} are others; restore the quarantine")
            left.discard(row["id"])
            yield row["id"], row["image"]


def rule(
    workspace: Path, action: Action, pixels: Mapping[str, str | None], labels: Mapping[str, str | None], *, by: str, reason: str
) -> dict[str, Any]:
    """The audit log's new entry: a person's decision about files.

    Args:
        action: `release` or `reject`.
        pixels: by id, the pixel digest; None where there is none.
        labels: by id, the label that it shall have if it is released.
        by: who decides.
        reason: why.
    """
    files = {name: {"pixel_digest": pixels[name], "label_name": labels.get(name)} for name in sorted(pixels)}
    told = {"action": action, "by": by, "reason": reason, "files": files}
    return append(workspace, EVENT, told)


def rulings(workspace: Path) -> Rulings:
    """What was decided last about each file and about all pixels.

    Raises:
        DataError: the audit log was altered.
    """
    found = Rulings()
    for entry in read_log(workspace):
        if entry["event"] != EVENT:
            continue
        for name, about in entry["data"]["files"].items():
            ruling = Ruling(entry["data"]["action"], about["pixel_digest"], about["label_name"])
            found.of_file[name] = ruling
            if ruling.pixel_digest:
                found.of_pixels[ruling.pixel_digest] = ruling
    return found


def pixel_digests(workspace: Path, files: Sequence[Held], limits: Ingest) -> dict[str, str | None]:
    """By id, the digest of a file's pixels; None where there are no bytes or they cannot be decoded."""
    raw = (RawFile(name, "", data, len(data)) for name, data in read_bytes(workspace, [held.id for held in files]))
    digests: dict[str, str | None] = {held.id: None for held in files}
    return digests | {file.original_path: row.pixel_digest if row else None for file, row in decode_files(raw, source="", limits=limits)}


def _rows(workspace: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    for path in sorted((workspace / STORE).glob("*.parquet")):
        yield from pq.read_table(path, columns=columns).to_pylist()


def _read(path: Path, ids: set[str] | None) -> Iterator[dict[str, Any]]:
    """The rows with these ids (None: all), with their bytes; one row group, which is of bounded size, is held at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            if ids is not None and not ids.intersection(file.read_row_group(group, columns=["id"])["id"].to_pylist()):
                continue
            for batch in file.iter_batches(batch_size=8, row_groups=[group]):
                yield from (row for row in batch.to_pylist() if ids is None or row["id"] in ids)


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """How many rows there were; without any no file is written."""
    first = next(rows, None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    num = 1
    with replacing(path) as temporary, Table(temporary, COLUMNS) as table:
        table.add(first, len(first["image"] or b""))
        for row in rows:
            table.add(row, len(row["image"] or b""))
            num += 1
    return num


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()
