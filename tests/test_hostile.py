"""More than two hundred distinct malformed inputs: each gets its named reason, none is lost, and nothing leaves its folder."""

import io
import json
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delivery_files import LIMITS, encode, pixels, places, png, write_classes
from PIL import Image

from cbd.errors import DataError
from components.delivery import read_delivery
from components.ingest import IngestOptions, ingest

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
SHARES = np.linspace(0.02, 0.98, 13)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def header(width: int, height: int, *, depth: int = 8, colour: int = 2, rest: bytes = b"\0\0\0") -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBB", width, height, depth, colour) + rest)


BODY, END = chunk(b"IDAT", zlib.compress(bytes(4 * 13))), chunk(b"IEND", b"")
PNGS = {
    "no chunk": png_of(),
    "no header": png_of(BODY, END),
    "no data": png_of(header(4, 4), END),
    "no width": png_of(header(0, 4), BODY, END),
    "no height": png_of(header(4, 0), BODY, END),
    "a depth of 3": png_of(header(4, 4, depth=3), BODY, END),
    "a colour type of 9": png_of(header(4, 4, colour=9), BODY, END),
    "an interlace of 7": png_of(header(4, 4, rest=b"\0\0\7"), BODY, END),
    "data that is no zlib": png_of(header(4, 4), chunk(b"IDAT", b"garbage" * 9), END),
    "data that ends early": png_of(header(4, 4), chunk(b"IDAT", zlib.compress(bytes(5))), END),
    "a wrong checksum": png_of(header(4, 4)[:-1] + b"\0", BODY, END),
    "a chunk longer than the file": png_of(header(4, 4), struct.pack(">I", 2**31 - 1) + b"IDAT", END),
    "a bomb": png_of(header(60_000, 60_000), BODY, END),
    "a text that expands a thousand times": png_of(header(4, 4), chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))), BODY, END),
}
FOREIGN = {
    "pdf": b"%PDF-1.7\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>",
    "html": b"<!DOCTYPE html><script>alert(1)</script>",
    "xml": b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>",
    "ico": b"\0\0\1\0\1\0",
    "psd": b"8BPS\0\1",
    "jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "jxl": b"\xff\x0a\xfa\x1f",
    "avif": b"\0\0\0 ftypavif",
    "heic": b"\0\0\0 ftypheic",
    "mp4": b"\0\0\0 ftypisom",
    "elf": b"\x7fELF\2\1\1",
    "exe": b"MZ\x90\0",
    "class": b"\xca\xfe\xba\xbe\0\0\0\x34",
    "wasm": b"\0asm\1\0\0\0",
    "pickle": b"\x80\x04cos\nsystem\n(S'id'\ntR.",
    "npy": b"\x93NUMPY\1\0",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n",
    "sqlite": b"SQLite format 3\0",
    "gzip": b"\x1f\x8b\x08\0",
    "zip": b"PK\3\4",
    "php": b"<?php system($_GET[0]); ?>",
    "sh": b"#!/bin/sh\nrm -rf /\n",
    "json": b'{"image": 1}',
    "utf-16": "image".encode("utf-16"),
    "nulls": bytes(5000),
    "ones": b"\xff" * 5000,
    "jpeg of two bytes": b"\xff\xd8",
    "gif of a header": b"GIF89a",
    "gif without size": b"GIF89a\0\0\0\0\0\0\0",
    "bmp of a header": b"BM" + bytes(12),
    "tiff of a header": b"II*\0\x08\0\0\0",
    "tiff that points at itself": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0111, 4, 1, 8) + struct.pack("<I", 8),
    "webp of a header": b"RIFF\x04\0\0\0WEBP",
    "riff that is sound": b"RIFF\x24\0\0\0WAVEfmt ",
    "ppm without size": b"P6\n",
    "ppm of a negative size": b"P6\n-4 4\n255\n" + bytes(48),
    "ppm with a depth of 0": b"P6\n4 4\n0\n" + bytes(48),
    "ppm of text": b"P3\n4 4\n255\nabc",
}
NAMES = [
    "../up.png",
    "../../up.png",
    "a/../../up.png",
    "a/b/../../../up.png",
    "/etc/cron.d/x.png",
    "//server/share/x.png",
    "C:/x.png",
    "C:\\x.png",
    "..\\up.png",
    "a\\..\\..\\up.png",
    "\\\\server\\x.png",
    "a/\x1b[31mx.png",
    "a/x\ny.png",
    "a/x\ry.png",
    "a/\x07.png",
    "a/x\ty.png",
    "a/\x7f.png",
    "a/..",
    "..",
    "a/\x0bx.png",
    "a/\x1fx.png",
    "./../x.png",
    "a//../../x.png",
    "a/./../../x.png",
    "/x.png",
    "//x.png",
    "/../x.png",
]
MANIFESTS = {
    "no column for a path": "name,label\nx.png,a\n",
    "no column for a label": "path,kind\nx.png,a\n",
    "a column twice": "path,path,label\nx.png,x.png,a\n",
    "a field too many": "path,label\nx.png,a,b\n",
    "a field too few": "path,label\nx.png\n",
    "no row": "path,label\n",
    "nothing": "",
    "a null": "path,label\nx\0.png,a\n",
    "a quote that never ends": 'path,label\n"x.png,a\n',
    "no unicode": b"path,label\n\xff\xfe.png,a\n",
    "a field without end": "path,label\n" + "x" * 200_000 + ",a\n",
    "an upward path": "path,label\n../trusted/x.png,a\n",
    "an absolute path": "path,label\n/etc/passwd,a\n",
    "an address": "path,label\nhttp://127.0.0.1/x.png,a\n",
    "a path of a drive": "path,label\nC:\\x.png,a\n",
    "a folder": "path,label\n.,a\n",
    "the manifest itself": "path,label\nmanifest.csv,a\n",
    "an empty path": "path,label\n,a\n",
    "an empty label": "path,label\nx.png,\n",
}
LINES = {
    "no JSON": "{",
    "no object": "[1, 2]",
    "a number alone": "1",
    "NaN": '{"path": "x.png", "label": NaN}',
    "infinity": '{"path": "x.png", "label": Infinity}',
    "a key twice": '{"path": "x.png", "path": "y.png", "label": "a"}',
    "half a character": '{"path": "x\\ud800.png", "label": "a"}',
    "a path that is a number": '{"path": 1, "label": "a"}',
    "a path that is a list": '{"path": ["x.png"], "label": "a"}',
    "a label that is a list": '{"path": "x.png", "label": ["a"]}',
    "a label that is an object": '{"path": "x.png", "label": {"a": 1}}',
    "a label that is a fraction": '{"path": "x.png", "label": 1.5}',
    "a label that is true": '{"path": "x.png", "label": true}',
    "no label": '{"path": "x.png"}',
    "a null label": '{"path": "x.png", "label": null}',
    "a number without end": '{"path": "x.png", "label": ' + "9" * 5000 + "}",
    "lists in lists": '{"path": "x.png", "label": ' + "[" * 5000 + "}",
}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TABLES: dict[str, dict[str, Any]] = {
    "no image": {"label": [0, 1]},
    "no label": {"image": pa.array([{"bytes": b"x", "path": "x"}] * 2, IMAGE)},
    "an image that is text": {"image": ["x", "y"], "label": [0, 1]},
    "labels that are fractions": {"image": pa.array([{"bytes": b"x", "path": "x"}] * 2, IMAGE), "label": [0.5, 1.0]},
    "labels that are lists": {"image": pa.array([{"bytes": b"x", "path": "x"}] * 2, IMAGE), "label": [[0], [1]]},
    "labels that are null": {"image": pa.array([{"bytes": b"x", "path": "x"}] * 2, IMAGE), "label": pa.array([None, None], pa.int64())},
    "labels below 0": {"image": pa.array([{"bytes": b"x", "path": "x"}] * 2, IMAGE), "label": [-1, -2]},
    "images that are null": {"image": pa.array([None, None], IMAGE), "label": [0, 1]},
    "images without bytes": {"image": pa.array([{"bytes": None, "path": "/etc/passwd"}] * 2, IMAGE), "label": [0, 1]},
    "no row": {"image": pa.array([], IMAGE), "label": pa.array([], pa.int64())},
}


def test_there_are_more_than_two_hundred() -> None:
    num = len(FORMATS) * len(SHARES) + len(PNGS) + len(FOREIGN) + 2 * len(NAMES) + len(MANIFESTS) + len(LINES) + len(TABLES)
    assert num > 200


def test_every_broken_image_gets_its_reason_and_costs_itself(tmp_path: Path) -> None:
    """All of them in one delivery, with eight sound images."""
    trusted = write_classes(tmp_path / "trusted", {"ant": 4, "bee": 4}, seed=50_000)
    root = write_classes(tmp_path / "in", {"ant": 4, "bee": 4})
    cut = {f"{kind} {share:.2f}": encode(pixels(3, size=(32, 32)), kind) for kind in FORMATS for share in SHARES}
    broken = {name: data[: max(1, int(float(name.split()[1]) * len(data)))] for name, data in cut.items()} | PNGS | FOREIGN
    for name, data in broken.items():
        (root / "ant" / f"{name}.png").write_bytes(data)
    result = ingest(str(root), str(trusted), outputs=places(tmp_path / "out"), params=LIMITS, options=IngestOptions("acme"))
    rows = {row["original_path"]: row for row in pq.read_table(tmp_path / "out" / "quarantine" / "quarantine.parquet").to_pylist()}
    assert set(rows) == {f"ant/{name}.png" for name in broken}
    assert (result["delivered"], result["accepted"], result["quarantined"]) == (len(broken) + 8, 8, len(broken))
    assert {row["reason"] for row in rows.values()} <= {"truncated", "corrupt", "not-an-image", "unsupported", "decompression-bomb"}
    assert all(row["detail"] and "\n" not in row["detail"] for row in rows.values())
    assert all(rows[f"ant/{name}.png"]["image"] == data for name, data in broken.items()), "the original bytes are kept"
    assert rows["ant/a bomb.png"]["reason"] == "decompression-bomb"


def archive(kind: str, name: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as zipped:
            for path, data in ((name, png(0)), ("ant/fine.png", png(1))):
                zipped.writestr(zipfile.ZipInfo(path), data)
    else:
        with tarfile.open(fileobj=file, mode="w") as tarred:
            for path, data in ((name, png(0)), ("ant/fine.png", png(1))):
                info = tarfile.TarInfo(path)
                info.size = len(data)
                tarred.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_no_name_in_an_archive_leaves_it(kind: str, tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        place = tmp_path / str(number)
        place.mkdir()
        (place / f"delivery.{kind}").write_bytes(archive(kind, name))
        with read_delivery(str(place / f"delivery.{kind}"), name="delivery", limits=LIMITS) as delivery:
            files = list(delivery.files)
        told = {file.refusal.reason for file in files if file.refusal}
        assert told <= {"unsafe-name", "no-class"} and told, (name, files)
        assert [file.original_path for file in files if not file.refusal] == [f"delivery.{kind}/ant/fine.png"], name
        assert [path.name for path in place.iterdir()] == [f"delivery.{kind}"]


@pytest.mark.parametrize("name", [*MANIFESTS, *LINES])
def test_a_malformed_manifest_is_one_line_or_a_reason_for_each_row(name: str, tmp_path: Path) -> None:
    text, ending = (MANIFESTS[name], "csv") if name in MANIFESTS else (LINES[name] + "\n", "jsonl")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(png(0))
    (tmp_path / "in" / f"manifest.{ending}").write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        with read_delivery(str(tmp_path / "in"), name="delivery", limits=LIMITS) as delivery:
            files = list(delivery.files)
    except DataError as error:
        assert f"manifest.{ending}" in str(error) and "\n" not in str(error)
        return
    assert files and all(file.refusal for file in files), files
    assert {file.refusal.reason for file in files if file.refusal} <= {"missing-file", "not-in-manifest", "no-class"}


@pytest.mark.parametrize("name", TABLES)
def test_a_malformed_table_is_one_line_or_a_reason_for_each_row(name: str, tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}})}
    pq.write_table(pa.table(TABLES[name]).replace_schema_metadata(metadata), tmp_path / "x.parquet")
    try:
        with read_delivery(str(tmp_path / "x.parquet"), name="delivery", limits=LIMITS) as delivery:
            files = list(delivery.files)
    except DataError as error:
        assert "x.parquet" in str(error) and "\n" not in str(error)
        return
    assert len(files) == pq.read_metadata(tmp_path / "x.parquet").num_rows
    assert all(file.refusal and file.refusal.reason in ("no-class", "no-bytes") for file in files), files


def test_broken_metadata_costs_no_image(tmp_path: Path) -> None:
    """EXIF and colour profiles are never read: what is wrong in them does not matter."""
    trusted = write_classes(tmp_path / "trusted", {"ant": 4, "bee": 4}, seed=50_000)
    root = write_classes(tmp_path / "in", {"ant": 4, "bee": 4})
    for number, exif in enumerate((b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*" + b"\xff" * 60, b"x" * 60_000)):
        image = Image.fromarray(pixels(700 + number))
        (root / "ant" / f"exif{number}.jpg").write_bytes(encode(image, "JPEG", exif=exif, quality=95))
        (root / "bee" / f"icc{number}.png").write_bytes(encode(pixels(800 + number), "PNG", icc_profile=b"\xff" * (10 + 5000 * number)))
    result = ingest(str(root), str(trusted), outputs=places(tmp_path / "out"), params=LIMITS, options=IngestOptions("acme"))
    assert (result["accepted"], result["quarantined"]) == (16, 0)
