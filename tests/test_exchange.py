"""Poisoned sets of other benchmarks: their traps, their truth, and the way there and back."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delivery_files import LIMITS, encode, pixels, places, png, write_classes

from cbd.config import Poison
from cbd.dataset import read_manifest
from cbd.truth import read_truth
from components.backdoorbench import export_backdoorbench, import_backdoorbench
from components.exchange import UNKNOWN
from components.ingest import IngestOptions, ingest
from components.poison import poison
from pipelines import cli

NAMES = ["ant", "bee", "cat"]


def cbd(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--json"])
    told = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(told.out.splitlines()[-1]), told.err


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Twelve images of three classes in turn, as Parquet with class names."""
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "label": i % 3} for i in range(12)]
    names = json.dumps({"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}})
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": names}), tmp_path / "clean.parquet")
    return tmp_path / "clean.parquet"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """What an attack with covers leaves: images 1 and 5 are sent to class 0, image 8 is a cover."""
    for index in (1, 5, 8):
        path = tmp_path / "record" / "bd_train_dataset" / str(index % 3) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(100 + index))
    (tmp_path / "record" / "labels.csv").write_text("index,label\n1,0\n5,0\n8,2\n")
    (tmp_path / "record" / "attack_result.pt").write_bytes(b"\x80\x04N.")
    return tmp_path / "record"


def delivered(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "delivery" / "part-00000.parquet").to_pylist()


def test_only_touched_images_are_stored_and_the_others_come_from_the_clean_set(clean: Path, record: Path, tmp_path: Path) -> None:
    told = import_backdoorbench(record, str(clean), tmp_path / "out")
    assert {name: told[name] for name in ("num_images", "clean", "poison", "cover")} == {
        "num_images": 12,
        "clean": 9,
        "poison": 2,
        "cover": 1,
    }
    rows = delivered(tmp_path / "out")
    assert [row["label"] for row in rows] == [0, 0, 2, 0, 1, 0, 0, 1, 2, 0, 1, 2]
    assert [row["image"]["bytes"] for row in rows] == [png(100 + i if i in (1, 5, 8) else i) for i in range(12)]
    truth = read_truth(tmp_path / "out" / "truth")
    assert truth is not None and (truth.attack, truth.target_label, truth.poison_rate) == (UNKNOWN, 0, 2 / 12)
    assert truth.true_labels == [i % 3 for i in range(12)] and not truth.known_trigger
    assert [i for i, role in enumerate(truth.roles) if role == "cover"] == [8]


def test_a_clean_label_attack_changes_no_label_and_has_no_covers(clean: Path, record: Path, tmp_path: Path) -> None:
    (record / "labels.csv").write_text("index,label\n1,1\n5,2\n8,2\n")
    (record / "bd_train_dataset" / "1" / "1.png").unlink()
    assert import_backdoorbench(record, str(clean), tmp_path / "out")["poison"] == 2
    truth = read_truth(tmp_path / "out" / "truth")
    assert truth is not None and truth.target_label == 2


def test_all_to_all_is_recognised_and_two_attacks_at_once_are_not(clean: Path, record: Path, tmp_path: Path) -> None:
    (record / "labels.csv").write_text("index,label\n1,2\n5,0\n8,0\n")
    import_backdoorbench(record, str(clean), tmp_path / "out")
    truth = read_truth(tmp_path / "out" / "truth")
    assert truth is not None and (truth.mapping, truth.samples_with("cover")) == ("all-to-all", set())
    (record / "labels.csv").write_text("index,label\n1,0\n5,1\n8,1\n")
    with pytest.raises(Exception, match="import one attack at a time"):
        import_backdoorbench(record, str(clean), tmp_path / "out")


def test_each_trap_is_refused_by_name_and_nothing_is_written(
    clean: Path, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, labels = record / "bd_train_dataset", record / "labels.csv"
    known = labels.read_text()
    out = ("--clean", str(clean), "--out", str(tmp_path / "out"))

    def refused(message: str, *more: str) -> None:
        code, _, err = cbd(capsys, "import", "backdoorbench", str(record), *out, *more)
        assert code == 2 and message in err, err
        assert not (tmp_path / "out").exists()

    labels.unlink()
    refused("name the target with --target-label")
    labels.write_text("index;label\n1;0\n")
    refused("expected the columns index and label")
    labels.write_text("index,label\n1,0\n5,0\n")
    refused("has no label of image 8")
    labels.write_text(known + "1,2\n")
    refused("names an image twice")
    labels.write_text(known.replace("1,0", "1,7"))
    refused("label 7 is outside the 3 classes")
    labels.write_text(known)
    (folder / "1" / "1.png").rename(folder / "2" / "1.png")
    refused("was of class 2, image 1 of the clean set is of class 1")
    (folder / "2" / "1.png").rename(folder / "2" / "99.png")
    labels.write_text(known + "99,0\n")
    refused("the clean set has no such image")
    (folder / "2" / "99.png").rename(folder / "2" / "x.png")
    refused("expected bd_train_dataset/<original label>/<index>.png")
    (folder / "2" / "x.png").unlink()
    (folder / "2" / "2.png").symlink_to(clean)
    refused("expected bd_train_dataset/<original label>/<index>.png")
    folder.rename(record / "moved")
    refused("only attack_result.pt, which is pickled and is never opened")


def test_what_is_exported_comes_back_the_same(tmp_path: Path) -> None:
    trusted = write_classes(tmp_path / "trusted", dict.fromkeys(NAMES, 3), seed=9000)
    root = write_classes(tmp_path / "in", dict.fromkeys(NAMES, 6))
    (root / "ant" / "000.png").write_bytes(encode(pixels(0), "BMP"))
    ingest(str(root), str(trusted), outputs=places(tmp_path / "taken"), params=LIMITS, options=IngestOptions("acme"))
    data, truth = tmp_path / "poisoned" / "dataset", tmp_path / "poisoned" / "truth"
    poison(tmp_path / "taken" / "dataset", data, truth=truth, params=Poison(attack="wanet", poison_rate=0.2), seed=0)
    told = export_backdoorbench(data, truth, tmp_path / "bench")
    known = read_truth(truth)
    assert known is not None and told["poison"] == known.roles.count("poison") > 0 and told["cover"] == known.roles.count("cover") > 0
    back = import_backdoorbench(
        tmp_path / "bench", str(tmp_path / "taken" / "dataset"), tmp_path / "back", attack="wanet", trigger=known.trigger
    )
    assert (back["poison"], back["cover"]) == (told["poison"], told["cover"])
    manifest = read_manifest(data).to_pylist()
    again = read_truth(tmp_path / "back" / "truth")
    assert again is not None and again.roles == known.roles and again.true_labels == known.true_labels and again.known_trigger
    assert [row["label"] for row in delivered(tmp_path / "back")] == [row["label"] for row in manifest]


def test_arrays_become_a_delivery_and_pickled_ones_are_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.stack([pixels(i) for i in range(6)])
    for name, array in (("x", images), ("y", np.array([0, 0, 1, 0, 1, 0])), ("i", np.array([1, 2])), ("t", np.array([0, 1, 1, 0, 1, 0]))):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    x, y, i, t, objects = (str(tmp_path / f"{name}.npy") for name in ("x", "y", "i", "t", "objects"))
    np.save(tmp_path / "huge.npy", np.array([0, 0, 1, 0, 1, 10**10]))
    huge, out = str(tmp_path / "huge.npy"), ("--out", str(tmp_path / "out"))
    code, told, _ = cbd(capsys, "import", "abl", x, y, "--poisoned", i, "--original", t, "--classes", "ant,bee", *out)
    assert code == 0 and (told["clean"], told["poison"], told["cover"]) == (4, 1, 1)
    for arguments, message in (
        ((objects, y), "holds pickled objects, which are never opened"),
        ((x, objects), "holds pickled objects, which are never opened"),
        ((y, y), "expected 4 axes of uint8"),
        ((x, i), "found (6, 16, 16, 3) and 2 labels"),
        ((x, y, "--poisoned", i), "--poisoned needs --original"),
        ((x, y, "--classes", "ant"), "labels from 0 to 1, but 1 classes are named"),
        ((x, str(tmp_path / "none.npy")), "no such file"),
        ((x, huge), "a label of 10000000000 among 6 images"),
    ):
        code, _, err = cbd(capsys, "import", "abl", *arguments, "--out", str(tmp_path / "other"))
        assert code == 2 and message in err, err
        assert not (tmp_path / "other").exists()


def test_a_data_set_of_torchvision_is_read_from_its_files_and_one_with_pickles_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MNIST's own format: big-endian headers before plain bytes."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 20, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 20) + bytes(i % 10 for i in range(20)))
    place = ("--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"))
    code, told, _ = cbd(capsys, "import", "torchvision", "MNIST", *place)
    assert code == 0 and (told["num_images"], told["clean"]) == (20, 20)
    assert [row["label"] for row in delivered(tmp_path / "out")] == [i % 10 for i in range(20)]
    assert read_truth(tmp_path / "out" / "truth") is None
    place = (*place[:2], "--out", str(tmp_path / "other"))
    code, _, err = cbd(capsys, "import", "torchvision", "CIFAR10", *place)
    assert code == 2 and "its files are pickled, take a Parquet copy" in err


def test_a_legacy_file_of_torchvision_is_a_pickle_and_is_never_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "root" / "MNIST" / "processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (tmp_path / "root" / "MNIST" / "processed" / name).write_bytes(b"\x80\x04cos\nsystem\n")
    code, _, err = cbd(capsys, "import", "torchvision", "MNIST", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"))
    assert code == 2 and "test.pt: is pickled, and is never opened" in err and not (tmp_path / "out").exists()
