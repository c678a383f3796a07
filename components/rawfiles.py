"""Delivered files before anything is known about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from cbd.images import Refused

FORMS = (
    "give a folder of class folders or of images with a manifest.csv or .jsonl, Parquet shards, tar or zip archives of these, "
    "WebDataset shards, or s3://bucket/prefix of any of them"
)


class Entry(NamedTuple):
    """A file in a listing: its path below the root, with `/`, as the file system, archive or object store spells it."""

    path: str
    num_bytes: int
    refusal: Refused | None = None


class RawFile(NamedTuple):
    """One delivered file; `data` is None where it was not read, and `refusal` says why."""

    original_path: str
    label_name: str | None
    data: bytes | None
    num_bytes: int
    refusal: Refused | None = None
    released_from: str | None = None
    """Supplier of a file that a person released from the quarantine; None for a file of the delivery itself."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """An open delivery."""

    files: Iterator[RawFile]
    """Can be walked once."""
    total: int
    """How many files that will be."""
    class_names: tuple[str, ...] | None
    """The class names in Parquet metadata, in their order; None where there are none."""


def printable(name: str) -> str:
    """The name as valid Unicode: lone surrogates, as for bytes that are no UTF-8, become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def too_large(num_bytes: int, max_file_bytes: int) -> Refused:
    """The refusal of a file that is larger than the limit."""
    return Refused("too-large", f"{num_bytes} bytes, more than {max_file_bytes}")
