"""The demo's data: what the supplier sends, what is held apart, and what nobody but the evaluation may know."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cbd.images import Refused, decode
from cbd.truth import read_truth
from pipelines.demo import DemoData, load_scans, write_demo_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return write_demo_data(tmp_path_factory.mktemp("demo"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file())


def pixels(path: Path) -> np.ndarray:
    return decode(path.read_bytes(), max_pixels=10**6).pixels


def test_delivers_1097_files_in_ten_class_folders_and_holds_70_of_each_class_apart(data: DemoData) -> None:
    assert len(files(data.delivery)) == 1097
    assert {path.parent.name for path in files(data.delivery)} == set("0123456789")
    assert Counter(path.parent.name for path in files(data.trusted)) == {str(label): 70 for label in range(10)}


def test_a_dozen_delivered_files_are_damaged_each_in_its_own_way(data: DemoData) -> None:
    damaged = []
    for path in files(data.delivery):
        if path.is_symlink():
            damaged.append("link")
            assert data.delivery not in (path.parent / path.readlink()).resolve().parents
            continue
        try:
            decode(path.read_bytes(), max_pixels=50_000_000)
        except Refused as refusal:
            damaged.append(refusal.reason)
    assert len(damaged) == 12
    assert {"link", "empty-file", "not-an-image", "decompression-bomb", "animated", "truncated", "corrupt"} <= set(damaged)


def test_a_tenth_of_the_delivery_carries_the_patch_and_the_label_0(data: DemoData) -> None:
    truth = read_truth(data.truth)
    assert truth is not None and (truth.attack, truth.target_label) == ("badnets", 0)
    by_id = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files(data.delivery) if not path.is_symlink()}
    poisoned = [
        (by_id[name], label) for name, role, label in zip(truth.sample_ids, truth.roles, truth.true_labels, strict=True) if role == "poison"
    ]
    assert len(poisoned) == 110
    white = [[255] * 3] * 3
    for path, true_label in poisoned:
        assert path.parent.name == "0" and true_label != 0
        assert pixels(path)[-3:, -3:, 1].tolist() == white


def test_no_delivered_image_is_among_the_trusted(data: DemoData) -> None:
    trusted = {pixels(path).tobytes() for path in files(data.trusted)}
    usable = [path for path in files(data.delivery) if not path.is_symlink() and path.suffix == ".png"]
    for path in usable:
        try:
            assert pixels(path).tobytes() not in trusted
        except Refused:
            continue


def test_writes_the_same_bytes_each_time(data: DemoData, tmp_path: Path) -> None:
    again = write_demo_data(tmp_path)
    for mine, other in ((data.delivery, again.delivery), (data.trusted, again.trusted), (data.truth, again.truth)):
        assert [path.relative_to(mine) for path in files(mine)] == [path.relative_to(other) for path in files(other)]
        for one, two in zip(files(mine), files(other), strict=True):
            assert (one.readlink() == two.readlink()) if one.is_symlink() else (one.read_bytes() == two.read_bytes())


def test_an_honest_supplier_stamps_nothing(tmp_path: Path) -> None:
    data = write_demo_data(tmp_path, poisoned=False)
    assert read_truth(data.truth) is None
    assert len(files(data.delivery)) == 1097


@pytest.mark.slow
def test_the_scans_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_scans()
    digits = load_digits()
    assert labels.tolist() == digits.target.tolist()
    assert images.shape == (1797, 32, 32, 3)
    coarse = images[..., 0].reshape(-1, 8, 4, 8, 4).mean((2, 4))
    assert np.corrcoef(coarse.ravel(), digits.images.ravel())[0, 1] > 0.98
