"""Data sets come back as they were written, have one digest, and no altered shard goes unseen."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from delivery_files import pixels, png

from cbd.dataset import (
    Row,
    load_samples,
    make_row,
    read_batches,
    read_images,
    read_info,
    read_manifest,
    read_rows,
    to_batches,
    verify_dataset,
    write_dataset,
)
from cbd.errors import DataError
from cbd.truth import Truth, read_truth, write_truth

NAMES = ["ant", "bee", 'c"\n☃']


def rows(count: int = 25) -> list[Row]:
    return [make_row(png(i), label=i % 3, original_path=f"{NAMES[i % 3]}/{i}.png", source="acme") for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", to_batches(rows()), class_names=NAMES, supplier="acme", shard_images=10)
    return tmp_path / "data"


def test_rows_and_description_come_back(folder: Path) -> None:
    info = verify_dataset(folder)
    assert list(read_rows(folder)) == rows()
    assert (info.class_names, info.class_counts, info.num_images) == (tuple(NAMES), (9, 8, 8), 25)
    assert info.image_sizes == {"16x16": 25} and list(info.shards) == [f"shard-0000{i}.parquet" for i in range(3)]
    assert not info.trial


def test_the_shards_are_in_the_hugging_face_convention(folder: Path) -> None:
    table = pq.read_table(folder / "shard-00000.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"] == {"_type": "ClassLabel", "names": NAMES} and features["image"] == {"_type": "Image"}
    assert table.num_rows == 10 and set(table["image"][0].as_py()) == {"bytes", "path"}


def test_same_rows_same_bytes_however_they_arrive(folder: Path, tmp_path: Path) -> None:
    batches = read_batches(folder, batch_rows=7)
    again = write_dataset(tmp_path / "again", batches, class_names=NAMES, supplier="acme", shard_images=10)
    assert again == read_info(folder)


def test_the_digest_covers_order_and_everything_described(folder: Path, tmp_path: Path) -> None:
    digests = {read_info(folder).digest}
    for change in ({"supplier": "other"}, {"trial": True}, {"class_names": [*NAMES, "d"]}, {"shard_images": 9}):
        kwargs = {"class_names": NAMES, "supplier": "acme", "shard_images": 10} | change
        digests.add(write_dataset(tmp_path / "x", to_batches(rows()), **kwargs).digest)
    digests.add(write_dataset(tmp_path / "x", to_batches(reversed(rows())), class_names=NAMES, supplier="acme", shard_images=10).digest)
    assert len(digests) == 6


def test_an_altered_shard_is_named(folder: Path) -> None:
    shard = folder / "shard-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00001\.parquet: altered"):
        load_samples(folder, image_size=16)


def test_missing_extra_and_linked_shards_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "shard-00009.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-00009\.parquet: not part"):
        verify_dataset(folder)
    (folder / "shard-00009.parquet").unlink()
    (folder / "shard-00002.parquet").rename(tmp_path / "moved")
    (folder / "shard-00002.parquet").symlink_to(tmp_path / "moved")
    with pytest.raises(DataError, match=r"shard-00002\.parquet: this shard"):
        verify_dataset(folder)


def test_an_altered_or_absent_description_is_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace('"acme"', '"acmx"'))
    with pytest.raises(DataError, match="altered"):
        read_info(folder)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="malformed"):
        read_info(folder)
    with pytest.raises(DataError, match="no data set"):
        read_info(tmp_path)


def test_samples_are_loaded_in_order_and_resized(folder: Path) -> None:
    samples = load_samples(folder, image_size=16)
    assert samples.images.shape == (25, 3, 16, 16) and samples.images.dtype == np.uint8
    assert np.array_equal(samples.images[7], pixels(7).transpose(2, 0, 1))
    assert samples.labels.tolist() == [i % 3 for i in range(25)] and samples.sample_ids == [row.sample_id for row in rows()]
    assert load_samples(folder, image_size=8).images.shape == (25, 3, 8, 8)


def test_the_manifest_holds_no_images_and_images_are_found_by_id(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert "image" not in manifest.column_names and manifest.num_rows == 25
    ids = manifest["sample_id"].to_pylist()
    assert read_images(folder, [ids[3], ids[20], "f" * 64]) == {ids[3]: png(3), ids[20]: png(20)}


def test_a_label_outside_the_classes_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="label 2 is outside the 2 classes"):
        write_dataset(tmp_path / "data", to_batches(rows()), class_names=NAMES[:2], supplier="acme")
    assert list(tmp_path.iterdir()) == []


def test_a_large_image_ends_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cbd.dataset", "cbd.shards"):
        monkeypatch.setattr(f"{module}.GROUP_BYTES", 2000)
    write_dataset(tmp_path / "data", to_batches(rows()), class_names=NAMES, supplier="acme")
    with pq.ParquetFile(tmp_path / "data" / "shard-00000.parquet") as shard:
        assert shard.num_row_groups == 9
    assert list(read_rows(tmp_path / "data")) == rows()


def test_truth_comes_back_and_absent_knowledge_is_none(tmp_path: Path) -> None:
    truth = Truth("badnets", 0, 0.1, {"size": 3}, ["a", "b"], ["clean", "poison"], [0, 1])
    write_truth(tmp_path / "truth", truth)
    assert read_truth(tmp_path / "truth") == truth
    write_truth(tmp_path / "truth", None)
    assert read_truth(tmp_path / "truth") is None
    assert json.loads((tmp_path / "truth" / "truth.json").read_text()) == {"attack": None}


def test_malformed_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no truth"):
        read_truth(tmp_path)
    (tmp_path / "truth.json").write_text('{"attack": "badnets"}')
    with pytest.raises(DataError, match="malformed truth"):
        read_truth(tmp_path)
