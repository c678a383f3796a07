"""The workspace's quarantine: every file that was ever refused, its bytes, and what people decided about it.

Each run adds one Parquet file; nothing is taken out again. What people decide are signed entries of the audit log, and the latest counts.
"""

import datetime
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cbd.audit import LOG, append, ensure_key, load_public_key, verify_log
from cbd.config import Ingest
from cbd.dataset import read_batches, read_info
from cbd.errors import DataError
from cbd.files import replacing
from components.decoding import decode_files
from components.rawfiles import RawFile

STORE, EVENT = "quarantine", "quarantine"
REJECTED = "rejected"
"""Why an image of a data set is in the quarantine: a person sent it there."""
Action = Literal["release", "reject"]
STATUS = {"release": "released", "reject": "rejected"}
_TEXT = ("id", "supplier", "first_seen", "run_id", "original_path", "label_name", "reason", "detail")
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
    original_path: str
    label_name: str | None
    reason: str
    detail: str
    num_bytes: int
    status: str
    """`quarantined`, `released` (comes back in the next run) or `rejected` (never does)."""


class Ruling(NamedTuple):
    """What a person decided last about a file."""

    action: Action
    pixel_digest: str | None
    """None where it cannot be decoded."""
    label_name: str | None
    """The label that a released file shall have; None: its own."""


def keep(refused: Path, workspace: Path, *, run_id: str, supplier: str) -> int:
    """How many files of a run's `quarantine.parquet` were new to the workspace's quarantine, which now has them.

    Args:
        refused: as `ingest` wrote it.
        workspace: gets `quarantine/<run_id>.parquet` if there is anything new.
        run_id: of the run that refused them.
        supplier: who delivered them.
    """
    known = {held.id for held in listed(workspace) if held.run_id != run_id}

    def rows() -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(refused) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    name = row.pop("sha256") or _digest(row["original_path"], row["reason"], row["num_bytes"])
                    if name not in known:
                        known.add(name)
                        yield {"id": name, "supplier": supplier, "first_seen": _now(), "run_id": run_id, **row}

    return _write(workspace / STORE / f"{run_id}.parquet", rows())


def send(dataset: Path, sample_ids: Sequence[str], workspace: Path, *, run_id: str) -> dict[str, str]:
    """Puts images of a data set into the quarantine too, so that a rejection loses nothing; the pixel digest of each by sample id.

    Raises:
        DataError: an id is not in the data set.
    """
    names, wanted = read_info(dataset).class_names, pa.array(sorted(set(sample_ids)), pa.string())
    known, found = {held.id for held in listed(workspace)}, {}

    def rows() -> Iterator[dict[str, Any]]:
        for batch in read_batches(dataset):
            for row in batch.filter(pc.is_in(batch["sample_id"], wanted)).to_pylist():
                found[row["sample_id"]] = row["pixel_digest"]
                if row["sample_id"] not in known:
                    about = {"id": row["sample_id"], "supplier": row["source"], "first_seen": _now(), "run_id": run_id}
                    about |= {"original_path": row["original_path"], "label_name": names[row["label"]], "num_bytes": row["num_bytes"]}
                    yield about | {"reason": REJECTED, "detail": "was accepted once", "image": row["image"]["bytes"]}

    _write(workspace / STORE / f"{run_id}-{_digest(*wanted.to_pylist())[:12]}.parquet", rows())
    if strays := sorted(set(sample_ids) - set(found)):
        raise DataError(f"{strays[0]}: no image of {dataset} has this sample id; `cbd suspects RUN` lists them")
    return found


def listed(workspace: Path) -> list[Held]:
    """Every refused file, the first seen first, without its bytes.

    Raises:
        DataError: the audit log was altered.
    """
    ruled, seen = rulings(workspace), {}
    columns = [name for name in COLUMNS.names if name != "image"]
    for path in sorted((workspace / STORE).glob("*.parquet")):
        for row in pq.read_table(path, columns=columns).to_pylist():
            status = STATUS[ruled[row["id"]].action] if row["id"] in ruled else "quarantined"
            seen.setdefault(row["id"], Held(**row, status=status))
    return sorted(seen.values(), key=lambda held: (held.first_seen, held.run_id, held.original_path))


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


def read_bytes(workspace: Path, ids: Iterable[str]) -> dict[str, bytes]:
    """The original bytes by id; a file that was refused unread has none.

    Raises:
        DataError: the bytes are no longer those that were refused.
    """
    wanted, found = pa.array(sorted(set(ids)), pa.string()), {}
    for path in sorted((workspace / STORE).glob("*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=["id", "image"]):
                for row in batch.filter(pc.is_in(batch["id"], wanted)).to_pylist():
                    if row["image"] is None:
                        continue
                    if hashlib.sha256(row["image"]).hexdigest() != row["id"]:
                        raise DataError(f"{path}: altered: the bytes of {row['id'][:12]} are others; restore the quarantine")
                    found[row["id"]] = row["image"]
    return found


def rule(
    workspace: Path, action: Action, pixels: Mapping[str, str | None], *, by: str, reason: str, label_name: str | None = None
) -> dict[str, Any]:
    """The audit log's new entry: a person's decision about files.

    Args:
        action: `release` or `reject`.
        pixels: by id, the pixel digest; None where there is none.
        by: who decides.
        reason: why.
        label_name: the label that released files shall have; None: their own.
    """
    told = {"action": action, "by": by, "reason": reason, "label_name": label_name, "files": dict(sorted(pixels.items()))}
    return append(workspace / LOG, EVENT, told, key=ensure_key(workspace))


def rulings(workspace: Path) -> dict[str, Ruling]:
    """What was decided last about each file, by id.

    Raises:
        DataError: the audit log was altered.
    """
    if not (workspace / LOG).is_file():
        return {}
    found: dict[str, Ruling] = {}
    for entry in verify_log(workspace / LOG, key=load_public_key(workspace)):
        if entry["event"] == EVENT:
            told = entry["data"]
            found |= {name: Ruling(told["action"], digest, told["label_name"]) for name, digest in told["files"].items()}
    return found


def pixel_digests(workspace: Path, files: Sequence[Held], limits: Ingest) -> dict[str, str | None]:
    """By id, the digest of a file's pixels; None where there are no bytes or they cannot be decoded."""
    known = read_bytes(workspace, [held.id for held in files])
    raw = [RawFile(held.id, "", known.get(held.id), held.num_bytes) for held in files]
    return {file.original_path: row.pixel_digest if row else None for file, row in decode_files(raw, source="", limits=limits)}


def released(workspace: Path) -> list[RawFile]:
    """The files that people released, to be judged anew, with their bytes."""
    ruled = {name: ruling for name, ruling in rulings(workspace).items() if ruling.action == "release"}
    files = [held for held in listed(workspace) if held.id in ruled] if ruled else []
    known = read_bytes(workspace, ruled)
    return [
        RawFile(
            held.original_path, ruled[held.id].label_name or held.label_name, known[held.id], held.num_bytes, released_from=held.supplier
        )
        for held in files
        if held.id in known
    ]


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """How many rows there were; without any no file is written."""
    first = next(rows, None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    num = 1
    with replacing(path) as temporary, pq.ParquetWriter(temporary, COLUMNS, compression="zstd") as writer:
        pending = [first]
        for row in rows:
            pending.append(row)
            num += 1
            if len(pending) == 256:
                writer.write_table(pa.Table.from_pylist(pending, COLUMNS))
                pending = []
        writer.write_table(pa.Table.from_pylist(pending, COLUMNS))
    return num


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
