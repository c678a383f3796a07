"""Every delivered file is told, in a fixed order, and nothing outside the delivery is ever opened."""

import os
from pathlib import Path

import pytest
from delivery_files import png, write_classes, write_parquet

from cbd.config import Ingest
from cbd.errors import DataError
from components.delivery import read_delivery
from components.rawfiles import RawFile


def read(uri: Path | str, limit: int = 0, max_file_bytes: int = 10_000) -> list[RawFile]:
    with read_delivery(str(uri), name="delivery", limits=Ingest(max_file_bytes=max_file_bytes), limit=limit) as delivery:
        files = list(delivery.files)
        assert len(files) == delivery.total
    return files


def reasons(files: list[RawFile]) -> dict[str, str]:
    return {file.original_path: file.refusal.reason for file in files if file.refusal}


def test_class_folders_are_told_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write_classes(tmp_path, {"b": 2, "a": 1})
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "er" / "x.png").write_bytes(png(9))
    files = read(tmp_path)
    assert [(f.original_path, f.label_name) for f in files] == [
        ("a/000.png", "a"),
        ("a/deep/er/x.png", "a"),
        ("b/000.png", "b"),
        ("b/001.png", "b"),
    ]
    assert files[1].data == png(9) and files[1].num_bytes == len(png(9))


def test_links_are_never_followed(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "in", {"a": 1})
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(5))
    (root / "a" / "out.png").symlink_to(secret)
    (root / "a" / "rel.png").symlink_to("../../secret.png")
    (root / "a" / "same.png").symlink_to("000.png")
    (root / "a" / "loop").symlink_to(root)
    (root / "b").symlink_to(tmp_path)
    (root / "a" / "dangling").symlink_to("nowhere")
    files = read(root)
    assert reasons(files) == {
        "a/out.png": "link-outside",
        "a/rel.png": "link-outside",
        "a/same.png": "link",
        "a/loop": "link",
        "a/dangling": "link",
        "b": "link-outside",
    }
    assert [f.original_path for f in files if f.data] == ["a/000.png"]


def test_pipes_do_not_block_and_large_files_are_not_read(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    (tmp_path / "a" / "huge.png").write_bytes(bytes(10_001))
    files = read(tmp_path)
    assert reasons(files) == {"a/pipe.png": "not-a-file", "a/huge.png": "too-large"}
    assert all(f.data is None for f in files if f.refusal)


def test_a_file_in_no_class_folder_is_told_with_its_bytes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 1})
    (tmp_path / "lost.png").write_bytes(png(3))
    files = read(tmp_path)
    assert reasons(files) == {"lost.png": "no-class"} and files[1].data == png(3)


def test_hostile_names_become_valid_unicode(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 0})
    (tmp_path / "a" / os.fsdecode(b"\xff\n.png")).write_bytes(png(1))
    assert [f.original_path for f in read(tmp_path)] == ["a/\\udcff\n.png"]


def test_a_limit_takes_from_each_class_in_turn(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 5, "b": 5, "c": 1})
    assert [f.original_path for f in read(tmp_path, limit=5)] == ["a/000.png", "a/001.png", "b/000.png", "b/001.png", "c/000.png"]


def test_parquet_rows_are_told_with_their_class_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [(png(0), 1), (png(1), 0), (None, 0), (png(3), 7), (png(4), None)], names=["no", "yes"])
    with read_delivery(str(path), name="delivery", limits=Ingest(max_file_bytes=10_000)) as delivery:
        files = list(delivery.files)
        assert delivery.class_names == ("no", "yes") and delivery.total == 5
    assert [f.label_name for f in files] == ["yes", "no", "no", None, None]
    assert reasons(files) == {"002.png": "no-bytes", "003.png": "no-class", "004.png": "no-class"}
    assert len(read(path, limit=2)) == 2
    assert reasons(read(path, max_file_bytes=5))["000.png"] == "too-large"


def test_parquet_without_names_uses_the_labels_themselves(tmp_path: Path) -> None:
    assert [f.label_name for f in read(write_parquet(tmp_path / "x.parquet", [(png(0), 3), (png(1), 10)], names=None))] == ["3", "10"]
    assert [f.label_name for f in read(write_parquet(tmp_path / "y.parquet", [(png(0), "cat")], names=None))] == ["cat"]


def test_a_folder_of_shards_is_one_delivery(tmp_path: Path) -> None:
    for index in range(2):
        write_parquet(tmp_path / f"{index}.parquet", [(png(index), 0)], names=["a", "b"])
    (tmp_path / "README.md").write_text("hello")
    files = read(tmp_path)
    assert reasons(files) == {"README.md": "not-a-shard"}
    assert [f.data for f in files if not f.refusal] == [png(0), png(1)]


def test_shards_that_name_different_classes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", [(png(0), 0)], names=["a", "b"])
    write_parquet(tmp_path / "1.parquet", [(png(1), 0)], names=["b", "a"])
    with pytest.raises(DataError, match="name different classes"):
        read(tmp_path)


def test_broken_parquet_is_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [(png(i), 0) for i in range(50)], names=["a"])
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"x\.parquet': not readable as Parquet") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_parquet_out_of_convention_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"picture": [b"x"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="no column 'image'"):
        read(tmp_path)
    pq.write_table(pa.table({"image": ["x"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'image' is string"):
        read(tmp_path)
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "p"}], "label": [1.5]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="column 'label' is double"):
        read(tmp_path)


@pytest.mark.parametrize(("uri", "found"), [("nowhere", "no such file or folder"), ("ftp://x/y", "not read"), ("s3:///x", "no bucket")])
def test_a_missing_place_is_named_with_the_fix(uri: str, found: str) -> None:
    with pytest.raises(DataError, match=found) as caught:
        read(uri)
    assert repr(uri) in str(caught.value) and "s3://bucket/prefix" in str(caught.value)


def test_a_single_file_must_be_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="a single file must be Parquet"):
        read(tmp_path / "x.bin")
