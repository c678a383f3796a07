"""Archives, manifests and WebDataset shards: the same files as in folders, and nothing hostile in them gets anywhere."""

import gzip
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from delivery_files import png, write_classes, write_parquet

from cbd.config import Ingest
from cbd.errors import DataError
from components.delivery import read_delivery
from components.rawfiles import RawFile

Member = tuple[str, bytes]


def read(uri: Path, *, limit: int = 0, **limits: Any) -> list[RawFile]:
    with read_delivery(str(uri), name="delivery", limits=Ingest(max_file_bytes=10_000, **limits), limit=limit) as delivery:
        files = list(delivery.files)
        assert len(files) == delivery.total
    return files


def told(files: list[RawFile]) -> dict[str, tuple[str | None, str | None]]:
    return {file.original_path: (file.label_name, file.refusal.reason if file.refusal else None) for file in files}


def tar(path: Path, members: list[Member], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, members: list[Member]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


FILES: list[Member] = [("a/0.png", png(0)), ("b/deep/1.png", png(1)), ("b/2.png", png(2))]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
@pytest.mark.parametrize("around", ["", "./", "delivery/"])
def test_class_folders_in_an_archive_are_what_they_are_in_a_folder(tmp_path: Path, mode: str, around: str) -> None:
    members = [(around + name, data) for name, data in FILES]
    path = zipped(tmp_path / "x.zip", members) if mode == "zip" else tar(tmp_path / "x.tar", members, mode)
    files = read(path)
    assert [(file.original_path, file.label_name, file.data) for file in files] == [
        (f"{path.name}/{name}", name[0], data) for name, data in sorted(FILES)
    ]


def test_a_folder_of_archives_is_one_delivery_and_other_files_in_it_are_told(tmp_path: Path) -> None:
    tar(tmp_path / "1.tar.gz", FILES[:1], "w:gz")
    zipped(tmp_path / "2.zip", FILES[1:])
    (tmp_path / "README").write_text("hello")
    assert told(read(tmp_path)) == {
        "1.tar.gz/a/0.png": ("a", None),
        "2.zip/b/2.png": ("b", None),
        "2.zip/b/deep/1.png": ("b", None),
        "README": (None, "not-an-archive"),
    }
    assert len(read(tmp_path, limit=2)) == 2


def test_parquet_and_manifests_in_an_archive_are_read_too(tmp_path: Path) -> None:
    shard = write_parquet(tmp_path / "s.parquet", [(png(0), 0), (png(1), 1)], names=["cat", "dog"])
    path = tar(tmp_path / "x.tar", [("data/s.parquet", shard.read_bytes())])
    assert [(file.label_name, file.data) for file in read(path)] == [("cat", png(0)), ("dog", png(1))]
    path = zipped(tmp_path / "y.zip", [("manifest.csv", b"path,label\nimg/0.png,cat\n"), ("img/0.png", png(0))])
    assert told(read(path)) == {"y.zip/img/0.png": ("cat", None)}


def test_members_with_hostile_names_are_told_and_never_read(tmp_path: Path) -> None:
    names = ["/etc/0.png", "../0.png", "a/../../0.png", "C:/0.png", "a\\0.png", "a/x\n.png", "a//0.png", "a/./0.png", "a/\x7f.png"]
    for path in (tar(tmp_path / "x.tar", [(name, png(0)) for name in [*names, "a/ok.png"]]),):
        files = read(path)
        assert {file.refusal.reason for file in files if file.refusal} == {"unsafe-name"}
        assert [file.original_path for file in files if file.data] == ["x.tar/a/ok.png"]
        assert len(files) == len(names) + 1


def test_links_devices_and_members_of_the_same_name_are_told_and_never_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, kind in (("a/s", tarfile.SYMTYPE), ("a/h", tarfile.LNKTYPE), ("a/f", tarfile.FIFOTYPE), ("a/c", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for seed in (0, 1):
            info = tarfile.TarInfo("a/0.png")
            info.size = len(png(seed))
            archive.addfile(info, io.BytesIO(png(seed)))
    files = read(tmp_path / "x.tar")
    assert sorted((file.original_path, file.refusal.reason) for file in files if file.refusal) == [
        ("x.tar/a/0.png", "duplicate-name"),
        ("x.tar/a/c", "not-a-file"),
        ("x.tar/a/f", "not-a-file"),
        ("x.tar/a/h", "link"),
        ("x.tar/a/s", "link"),
    ]
    assert [file.data for file in files if file.data] == [png(0)]
    link = zipfile.ZipInfo("a/link.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as zipping:
        zipping.writestr(link, "/etc/passwd")
        zipping.writestr("b/0.png", png(0))
    assert told(read(tmp_path / "y.zip")) == {"y.zip/a/link.png": ("a", "link"), "y.zip/b/0.png": ("b", None)}


def test_an_archive_in_an_archive_is_not_opened(tmp_path: Path) -> None:
    inner = tar(tmp_path / "inner.tar", FILES).read_bytes()
    path = zipped(tmp_path / "x.zip", [("inner.tar", inner), ("second.tar", inner)])
    assert set(told(read(path, max_archive_expansion=1000)).values()) == {(None, "too-large")}
    small = zipped(tmp_path / "s.zip", FILES[:1]).read_bytes()
    assert told(read(zipped(tmp_path / "y.zip", [("s.zip", small)])))["y.zip/s.zip"] == (None, "no-class")


def _bomb_gz(path: Path) -> Path:
    with gzip.open(path, "wb") as file:
        for _ in range(80):
            file.write(bytes(2**20))
    return path


def _bomb_zip(path: Path) -> Path:
    return zipped(path, [(f"a/{number}.png", bytes(2**23)) for number in range(9)])


@pytest.mark.parametrize(("name", "make"), [("x.tar.gz", _bomb_gz), ("x.zip", _bomb_zip)])
def test_an_archive_that_expands_too_far_is_refused_whole(tmp_path: Path, name: str, make: Callable[[Path], Path]) -> None:
    with pytest.raises(DataError, match="100 times its size: a decompression bomb"):
        read(make(tmp_path / name))


def test_a_member_that_is_larger_than_a_file_may_be_is_told(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", [("a/0.png", bytes(10_001)), ("a/1.png", png(1))])
    assert told(read(path)) == {"x.zip/a/0.png": ("a", "too-large"), "x.zip/a/1.png": ("a", None)}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
@pytest.mark.parametrize("keep", [0, 1, 7, 100, 300, 600])
def test_a_truncated_archive_is_refused_by_name_or_its_members_are_told(tmp_path: Path, mode: str, keep: int) -> None:
    path = zipped(tmp_path / "x.zip", FILES) if mode == "zip" else tar(tmp_path / "x.tar", FILES, mode)
    path.write_bytes(path.read_bytes()[:keep])
    try:
        files = read(path)
    except DataError as error:
        assert path.name in str(error) and "deliver it again" in str(error)
    else:
        assert all(file.refusal for file in files)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_header_in_the_middle_does_not_lose_what_follows_without_a_word(tmp_path: Path, mode: str) -> None:
    plain = bytearray(tar(tmp_path / "x.tar", FILES, "w").read_bytes())
    second = plain.index(FILES[1][0].encode())
    for name, damaged in (
        ("checksum", plain[: second + 5] + bytes([plain[second + 5] ^ 1]) + plain[second + 6 :]),
        ("zeros", plain[:second] + bytes(512) + plain[second + 512 :]),
        ("another archive behind", plain + plain),
        ("cut in a header", plain[: second + 100]),
        ("cut between members", plain[:second]),
    ):
        path = tmp_path / f"y{'.tar.gz' if mode == 'w:gz' else '.tar'}"
        path.write_bytes(gzip.compress(bytes(damaged)) if mode == "w:gz" else damaged)
        with pytest.raises(DataError, match=r"y\.tar.*not readable as an archive: (no member and no end|cut off) after \d+ members"):
            pytest.fail(f"{name}: {read(path)}")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_header_that_would_fill_the_memory_is_not_read(tmp_path: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, 2**21
    path = tmp_path / "x.tar"
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**21) + tar(tmp_path / "y.tar", FILES, "w").read_bytes())
    with pytest.raises(DataError, match="a header of 2097152 bytes, more than 1048576"):
        read(path)


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_damaged_bytes_anywhere_are_told_and_never_crash(tmp_path: Path, mode: str) -> None:
    whole = zipped(tmp_path / "x.zip", FILES) if mode == "zip" else tar(tmp_path / "x.tar", FILES, mode)
    data, outcomes = whole.read_bytes(), set()
    for place in range(0, len(data), max(1, len(data) // 60)):
        path = tmp_path / f"damaged{whole.suffix}"
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xA5]) + data[place + 1 :])
        try:
            files = read(path)
        except DataError as error:
            assert path.name in str(error)
            outcomes.add("refused")
        else:
            assert all(file.refusal or file.data for file in files)
            outcomes.add("told")
    assert outcomes


def test_a_member_under_a_password_is_told(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", [("a/0.png", png(0)), ("b/1.png", png(1))])
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert told(read(path)) == {"x.zip/a/0.png": ("a", "encrypted"), "x.zip/b/1.png": ("b", None)}


def images(root: Path) -> Path:
    for number in range(3):
        (root / "img").mkdir(parents=True, exist_ok=True)
        (root / "img" / f"{number}.png").write_bytes(png(number))
    return root


def test_a_manifest_labels_files_and_tells_those_that_it_leaves_out(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [("img/1.png", "dog"), ("img/0.png", "cat"), ("../secret.png", "cat"), ("/etc/passwd", "cat"), ("img/9.png", "cat")]
    (tmp_path / "manifest.csv").write_text("path,label,note\n" + "".join(f"{path},{label},x\n" for path, label in rows))
    files = read(tmp_path)
    assert [(file.original_path, file.label_name, file.refusal.reason if file.refusal else None) for file in files] == [
        ("img/1.png", "dog", None),
        ("img/0.png", "cat", None),
        ("../secret.png", None, "missing-file"),
        ("/etc/passwd", None, "missing-file"),
        ("img/9.png", None, "missing-file"),
        ("img/2.png", None, "not-in-manifest"),
    ]
    assert files[0].data == png(1) and files[5].data == png(2)


def test_the_hugging_face_convention_for_image_folders_is_read(tmp_path: Path) -> None:
    images(tmp_path)
    rows = [{"file_name": "img/0.png", "label": 3}, {"file_name": "img/1.png", "label": "x", "more": [1]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert told(read(tmp_path)) == {"img/0.png": ("3", None), "img/1.png": ("x", None), "img/2.png": (None, "not-in-manifest")}


@pytest.mark.parametrize("label", [None, 1.5, True, "", [], {}])
def test_a_label_that_is_no_text_and_no_integer_is_told(tmp_path: Path, label: object) -> None:
    images(tmp_path)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"path": "img/0.png", "label": label}))
    assert told(read(tmp_path))["img/0.png"] == (None, "no-class")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.csv", b"", "no row in it"),
        ("manifest.csv", b"path,label\n", "no row in it"),
        ("manifest.csv", b"file,label\nimg/0.png,a\n", "no column file_name or path or image; found file, label"),
        ("manifest.csv", b"path,kind\nimg/0.png,a\n", "no column label or class or class_name; found path, kind"),
        ("manifest.csv", b"path,label,label\nimg/0.png,a,b\n", "a column stands twice"),
        ("manifest.csv", b"path,label\nimg/0.png,a,b\n", "line 2 has other columns"),
        ("manifest.csv", b"path,label\nimg/0.png\n", "line 2 has other columns"),
        ("manifest.csv", b'path,label\n"img/0.png,a\n', "unexpected end of data"),
        ("manifest.csv", b"path,label\nimg/\xff.png,a\n", "not UTF-8 at byte 15"),
        ("manifest.csv", "path,label\nimg/0.png,a\n".encode("utf-16"), "not UTF-8 at byte 0"),
        ("manifest.csv", b"path,label\n" + b"x" * 200_000 + b",a\n", "field larger than field limit"),
        ("manifest.jsonl", b"[]\n", "line 1 is no JSON object"),
        ("manifest.jsonl", b'{"path": "img/0.png", "label": NaN}', "NaN is no number of JSON"),
        ("manifest.jsonl", b'{"path": "a", "path": "b", "label": 1}', "a key stands twice"),
        ("manifest.jsonl", b'{"path": "a", "label": 1', "line 1: Expecting"),
        ("manifest.jsonl", b'{"path": "a", "label": 1}\n{', "line 2: Expecting"),
        ("manifest.jsonl", b"[" * 100_000, "line 1: "),
        ("manifest.jsonl", b'{"path": "a", "label": ' + b"1" * 5000 + b"}", "line 1: "),
    ],
)
def test_a_malformed_manifest_is_refused_by_name_and_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (images(tmp_path) / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_all(tmp_path)
    assert name in str(refused.value) and message in str(refused.value) and "\n" not in str(refused.value)


def read_all(uri: Path) -> list[RawFile]:
    with read_delivery(str(uri), name="delivery", limits=Ingest()) as delivery:
        return list(delivery.files)


def test_a_manifest_that_is_too_large_is_refused_by_name(tmp_path: Path) -> None:
    (images(tmp_path) / "manifest.csv").write_bytes(b"path,label\n" + b"img/0.png,a\n" * 1000)
    with pytest.raises(DataError, match=r"manifest.csv: 10001 bytes, more than 10000"):
        read(tmp_path)


def test_webdataset_shards_are_labelled_by_their_cls_members(tmp_path: Path) -> None:
    for shard in range(2):
        members = []
        for number in range(2):
            key = f"{shard}{number:03d}"
            members += [(f"{key}.png", png(10 * shard + number)), (f"{key}.cls", b"%d\n" % number)]
        tar(tmp_path / f"train-{shard:06d}.tar", members)
    tar(tmp_path / "train-000002.tar", [("2000.png", png(7)), ("2001.png", png(8)), ("2001.cls", b"\xff")])
    assert told(read(tmp_path)) == {
        "train-000000.tar/0000.png": ("0", None),
        "train-000000.tar/0001.png": ("1", None),
        "train-000001.tar/1000.png": ("0", None),
        "train-000001.tar/1001.png": ("1", None),
        "train-000002.tar/2000.png": (None, "no-class"),
        "train-000002.tar/2001.png": (None, "no-class"),
    }


def test_a_file_that_is_no_archive_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    write_classes(tmp_path / "d", {"a": 1})
    for name in ("x.tar", "x.zip", "x.tar.gz"):
        (tmp_path / name).write_bytes(b"this is no archive" * 100)
        with pytest.raises(DataError, match=f"{name}.*not readable as an archive"):
            read(tmp_path / name)
