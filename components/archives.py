"""Tar (plain, gzip, bzip2, xz) and zip archives, member by member; nothing is ever unpacked under a name of the sender's."""

import bz2
import contextlib
import gzip
import lzma
import os
import shutil
import tarfile
import unicodedata
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast

from cbd.errors import DataError
from cbd.images import Refused
from components.rawfiles import Entry, printable, too_large

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip")
_COMPRESSED = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_SPARE_BYTES = 64 * 2**20
"""An archive may always grow to this."""
_CHUNK = 2**20
_FAULTS = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_MAX_EXTENSION = 2**20
_LINKED = 0o120000
_PIECES = {"", ".", ".."}


class Archive(NamedTuple):
    """An open archive as a listing; a member whose name is unsafe, or that is no regular file, is listed with why it is not read."""

    entries: list[Entry]
    members: "dict[str, _Member]"

    def read(self, path: str, max_bytes: int) -> bytes:
        """The bytes of a listed member.

        Raises:
            Refused: it is damaged, encrypted or larger than `max_bytes`, whatever its header says.
        """
        try:
            with self.members[path].open() as file:
                data = file.read(max_bytes + 1)
        except _FAULTS as error:
            raise Refused("unreadable", f"damaged in its archive: {_one_line(error)}") from None
        if len(data) > max_bytes:
            raise too_large(len(data), max_bytes)
        return data

    def place(self, path: str, folder: Path) -> Path:
        """Where in `folder` a copy of a listed member now lies, under a name of ours."""
        target = folder / uuid.uuid4().hex
        try:
            with self.members[path].open() as file, target.open("wb") as out:
                shutil.copyfileobj(file, out, _CHUNK)
        except _FAULTS as error:
            raise DataError(f"{printable(path)!r}: damaged in its archive: {_one_line(error)}; deliver it again") from None
        return target


class _Member(Protocol):
    def open(self) -> IO[bytes]: ...


class _TarMember(NamedTuple):
    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def open(self) -> IO[bytes]:
        return cast(IO[bytes], self.archive.extractfile(self.info))


class _ZipMember(NamedTuple):
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def open(self) -> IO[bytes]:
        return self.archive.open(self.info)


@contextlib.contextmanager
def open_archive(path: Path, *, told: str, folder: Path, max_expansion: float) -> Iterator[Archive]:
    """An open archive.

    Args:
        path: the archive; what it is says its content, not its name.
        told: what to call it in errors.
        folder: for our own temporary files; a compressed tar is decompressed there once.
        max_expansion: largest size of what is in it, as a multiple of its own.

    Raises:
        DataError: it is damaged, or holds more than `max_expansion` allows.
    """
    limit = max(_SPARE_BYTES, int(max_expansion * path.stat().st_size))
    with contextlib.ExitStack() as stack:
        try:
            if _head(path).startswith(b"PK"):
                opened = _list_zip(stack.enter_context(zipfile.ZipFile(path)), limit)
            else:
                plain = _decompressed(path, folder, limit)
                opened = _list_tar(stack.enter_context(tarfile.open(plain, "r:", tarinfo=_TarHeader)), limit)
        except _Bomb:
            raise DataError(f"{told}: holds more than {limit} bytes, {max_expansion:g} times its size: a decompression bomb") from None
        except _FAULTS as error:
            raise DataError(f"{told}: not readable as an archive: {_one_line(error)}; deliver it again") from None
        yield opened


class _Bomb(Exception):
    pass


def _decompressed(path: Path, folder: Path, limit: int) -> Path:
    opener = next((opener for magic, opener in _COMPRESSED if _head(path).startswith(magic)), None)
    if opener is None:
        return path
    target, written = folder / uuid.uuid4().hex, 0
    with opener(path, "rb") as packed, target.open("wb") as out:
        while part := packed.read(_CHUNK):
            written += len(part)
            if written > limit:
                raise _Bomb
            out.write(part)
    return target


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(6)


class _TarHeader(tarfile.TarInfo):
    """A header whose extensions (long names, pax records), which are read into memory whole, have a limit."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENSIONS and self.size > _MAX_EXTENSION:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {_MAX_EXTENSION}")
        return cast(tarfile.TarInfo, super()._proc_member(archive))


def _list_tar(archive: tarfile.TarFile, limit: int) -> Archive:
    """The members up to the mark of the end; where a header is damaged or the rest is cut off, tarfile ends without a word.

    Raises:
        tarfile.ReadError: it did.
    """
    listed = []
    for info in archive:
        refusal = None
        if info.issym() or info.islnk():
            refusal = Refused("link", "links are not followed; deliver the file itself")
        elif info.isdir():
            continue
        elif not info.isreg() or info.issparse():
            refusal = Refused("not-a-file", "a device, pipe or sparse file")
        listed.append((info.name, info.size if info.isreg() else 0, refusal, _TarMember(archive, info)))
    file, end_bytes = cast(IO[bytes], archive.fileobj), 0
    file.seek(archive.offset)
    while part := file.read(_CHUNK):
        end_bytes += len(part)
        if part.strip(b"\0"):
            raise tarfile.ReadError(f"no member and no end after {len(listed)} members, at byte {archive.offset}")
    if end_bytes < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut off after {len(listed)} members")
    return _listing(listed, limit)


def _list_zip(archive: zipfile.ZipFile, limit: int) -> Archive:
    listed = []
    for info in archive.infolist():
        refusal = None
        if info.filename.endswith("/"):
            continue
        if info.flag_bits & 1:
            refusal = Refused("encrypted", "a member under a password; deliver it without")
        elif (info.external_attr >> 16) & 0o170000 == _LINKED:
            refusal = Refused("link", "links are not followed; deliver the file itself")
        listed.append((info.filename, info.file_size, refusal, _ZipMember(archive, info)))
    return _listing(listed, limit)


def _listing(listed: "list[tuple[str, int, Refused | None, _Member]]", limit: int) -> Archive:
    """The members as entries; of those that share a name only the first is read."""
    if sum(num_bytes for _, num_bytes, _, _ in listed) > limit:
        raise _Bomb
    entries, members = [], {}
    for name, num_bytes, refusal, member in listed:
        path = name.removeprefix("./")
        if refusal is None and is_unsafe(path):
            refusal = Refused("unsafe-name", "an absolute name, one that leaves the archive, or control characters")
        if path in members:
            refusal = Refused("duplicate-name", "another member of the archive has this name")
        members.setdefault(path, member)
        entries.append(Entry(path, num_bytes, refusal))
    return Archive(entries, members)


def is_unsafe(path: str) -> bool:
    """Whether a name from outside is absolute, leaves its folder, or holds what no file name should (control characters, backslashes)."""
    control = any(unicodedata.category(character) == "Cc" for character in path)
    return control or path.startswith("/") or "\\" in path or path[1:2] == ":" or bool(_PIECES.intersection(path.split("/")))


def _one_line(error: BaseException) -> str:
    return printable(" ".join(str(error).split())[:120] or type(error).__name__)


def has_suffix(path: str) -> bool:
    """Whether a file is called like an archive."""
    return os.path.basename(path).lower().endswith(SUFFIXES)
