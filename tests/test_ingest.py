"""Nothing delivered is lost or trusted unseen: accepted + duplicates + quarantined = delivered, or one line and nothing written."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from delivery_files import LIMITS, OPTIONS, animation, bomb, encode, pixels, places, png, write_classes, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cbd.config import Ingest, Poison
from cbd.dataset import read_batches, read_manifest, read_rows, verify_dataset, write_dataset
from cbd.errors import DataError, EnvironmentFault
from cbd.truth import Truth, read_truth, write_truth
from components.ingest import IngestOptions, ingest, ingest_step

COUNTS = {"ant": 4, "bee": 4}


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "trusted", COUNTS, seed=50_000)


def take(delivery: Path, trusted: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    return ingest(str(delivery), str(trusted), outputs=places(out), params=LIMITS, options=IngestOptions("acme", **options))


def quarantine(out: Path) -> dict[str, str]:
    return {row["original_path"]: row["reason"] for row in pq.read_table(out / "quarantine" / "quarantine.parquet").to_pylist()}


def test_a_clean_delivery_is_taken_in_whole(tmp_path: Path, trusted: Path) -> None:
    result = take(write_classes(tmp_path / "in", COUNTS), trusted, tmp_path / "out")
    counts = (result["delivered"], result["accepted"], result["duplicates"], result["quarantined"])
    assert counts == (8, 8, 0, 0) and result["class_names"] == ["ant", "bee"] and not result["trial"]
    info = verify_dataset(tmp_path / "out" / "dataset")
    assert info.digest == result["digest"] and info.supplier == "acme" and info.class_counts == (4, 4)
    assert verify_dataset(tmp_path / "out" / "trusted_set").digest == result["trusted_digest"]
    assert next(row.data for row in read_rows(tmp_path / "out" / "dataset")) == png(0)
    assert read_truth(tmp_path / "out" / "truth") is None
    assert json.loads(json.dumps(result)) == result


def test_every_damaged_file_is_quarantined_with_its_reason(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    damaged = {
        "zero.png": (b"", "empty-file"),
        "text.png": (b"not a picture", "not-an-image"),
        "cut.png": (png(1)[:300], "truncated"),
        "cut.jpg": (encode(pixels(1), "JPEG")[:-60], "truncated"),
        "bomb.png": (bomb(), "decompression-bomb"),
        "moving.gif": (animation(), "animated"),
        "huge.png": (bytes(1_000_001), "too-large"),
        "float.tif": (encode(Image.new("F", (4, 4)), "TIFF"), "unsupported"),
    }
    for name, (data, _) in damaged.items():
        (root / "ant" / name).write_bytes(data)
    (root / "ant" / "out.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "lost.png").write_bytes(png(77))
    result = take(root, trusted, tmp_path / "out")
    expected = {f"ant/{name}": reason for name, (_, reason) in damaged.items()} | {"ant/out.png": "link-outside", "lost.png": "no-class"}
    assert quarantine(tmp_path / "out") == expected
    assert (result["delivered"], result["accepted"], result["quarantined"]) == (18, 8, 10)
    rows = {row["original_path"]: row for row in pq.read_table(tmp_path / "out" / "quarantine" / "quarantine.parquet").to_pylist()}
    assert rows["ant/cut.png"]["image"] == png(1)[:300] and rows["ant/cut.png"]["label_name"] == "ant"
    assert rows["ant/huge.png"]["image"] is None and rows["ant/huge.png"]["num_bytes"] == 1_000_001
    summary = json.loads((tmp_path / "out" / "quarantine" / "summary.json").read_text())
    assert summary["reasons"] == result["reasons"] and sum(summary["reasons"].values()) == summary["quarantined"] == 10
    assert sorted(os.listdir(tmp_path / "out" / "quarantine")) == [
        "duplicates.parquet",
        "quarantine.parquet",
        "summary.json",
        "trusted-duplicates.parquet",
        "trusted-quarantine.parquet",
    ]


def test_a_wrong_extension_is_accepted_by_content(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    (root / "ant" / "png.jpg").write_bytes(png(70))
    assert take(root, trusted, tmp_path / "out")["accepted"] == 9
    rows = {row["original_path"]: row["format"] for row in read_manifest(tmp_path / "out" / "dataset").to_pylist()}
    assert rows["ant/png.jpg"] == "PNG"


def test_equal_pixels_under_one_label_are_kept_once(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    (root / "ant" / "again.bmp").write_bytes(encode(pixels(2), "BMP"))
    (root / "ant" / "copy.png").write_bytes(png(2))
    result = take(root, trusted, tmp_path / "out")
    assert (result["delivered"], result["accepted"], result["duplicates"]) == (10, 8, 2)
    listed = pq.read_table(tmp_path / "out" / "quarantine" / "duplicates.parquet").to_pylist()
    assert [(row["original_path"], row["duplicate_of"]) for row in listed] == [
        ("ant/again.bmp", "ant/002.png"),
        ("ant/copy.png", "ant/002.png"),
    ]


def test_equal_pixels_under_two_labels_are_all_quarantined(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    (root / "ant" / "copy.png").write_bytes(png(0))
    (root / "bee" / "copy.bmp").write_bytes(encode(pixels(0), "BMP"))
    result = take(root, trusted, tmp_path / "out")
    assert quarantine(tmp_path / "out") == dict.fromkeys(["ant/000.png", "ant/copy.png", "bee/copy.bmp"], "conflicting-labels")
    assert (result["delivered"], result["accepted"], result["duplicates"], result["quarantined"]) == (10, 7, 0, 3)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["ant", "bee"]), st.sampled_from(["whole", "cut", "empty"])), max_size=20))
def test_no_file_is_ever_lost(tmp_path: Path, trusted: Path, items: list[tuple[int, str, str]]) -> None:
    shutil.rmtree(tmp_path / "in", ignore_errors=True)
    root = write_classes(tmp_path / "in", COUNTS, seed=100)
    for index, (seed, label, state) in enumerate(items):
        data = {"whole": png(seed), "cut": png(seed)[:200], "empty": b""}[state]
        (root / label / f"x{index}.png").write_bytes(data)
    result = take(root, trusted, tmp_path / "out")
    by_seed: dict[int, list[str]] = {}
    for seed, label, state in items:
        if state == "whole":
            by_seed.setdefault(seed, []).append(label)
    kept = sum(len(set(labels)) == 1 for labels in by_seed.values())
    assert result["delivered"] == 8 + len(items) == result["accepted"] + result["duplicates"] + result["quarantined"]
    assert result["accepted"] == 8 + kept


def test_same_delivery_same_bytes(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    first, second = (take(root, trusted, tmp_path / name) for name in ("one", "two"))
    assert first["digest"] == second["digest"] and first["trusted_digest"] == second["trusted_digest"]
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


def test_the_trusted_sets_names_define_the_order_of_classes(tmp_path: Path) -> None:
    rows = [(png(900 + i), i % 2) for i in range(4)]
    trusted = write_parquet(tmp_path / "t.parquet", rows, names=["bee", "ant"])
    result = take(write_classes(tmp_path / "in", COUNTS), trusted, tmp_path / "out")
    assert result["class_names"] == ["bee", "ant"]
    labels = {row["original_path"]: row["label"] for row in read_manifest(tmp_path / "out" / "dataset").to_pylist()}
    assert labels["ant/000.png"] == 1 and labels["bee/000.png"] == 0


def test_parquet_without_names_is_ordered_by_number(tmp_path: Path) -> None:
    trusted = write_parquet(tmp_path / "t.parquet", [(png(900 + i), label) for i, label in enumerate([10, 2, 10, 2])], names=None)
    data = write_parquet(tmp_path / "d.parquet", [(png(i), label) for i, label in enumerate([10, 10, 2, 2])], names=None)
    result = take(data, trusted, tmp_path / "out")
    assert result["class_names"] == ["2", "10"]
    assert read_manifest(tmp_path / "out" / "dataset")["label"].to_pylist() == [1, 1, 0, 0]


def test_a_limit_is_on_delivered_files_and_not_on_the_trusted_set(tmp_path: Path, trusted: Path) -> None:
    result = take(write_classes(tmp_path / "in", COUNTS), trusted, tmp_path / "out", limit=6)
    assert (result["delivered"], result["trusted_images"]) == (6, 8)


def test_few_trusted_copies_are_removed_and_counted(tmp_path: Path) -> None:
    trusted = write_classes(tmp_path / "trusted", {"ant": 50, "bee": 50}, seed=50_000)
    root = write_classes(tmp_path / "in", COUNTS)
    (root / "bee" / "stolen.bmp").write_bytes(encode(pixels(50_007), "BMP"))
    result = take(root, trusted, tmp_path / "out")
    assert (result["trusted_removed"], result["trusted_images"], result["accepted"]) == (1, 99, 9)
    (root / "bee" / "stolen2.png").write_bytes(png(50_008))
    with pytest.raises(DataError, match="2 of its 100 images are exact copies from the delivery, expected at most 1.0%"):
        take(root, trusted, tmp_path / "again")


def refused(tmp_path: Path, delivery: Path | str, trusted: Path | str, found: str, **options: Any) -> None:
    """Checks that the intake is refused in one line with exit code 2, and that nothing is left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=found) as caught:
        ingest(str(delivery), str(trusted), outputs=places(tmp_path / "out"), params=LIMITS, options=IngestOptions("acme", **options))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "out"] == []


def test_a_missing_path_is_refused(tmp_path: Path, trusted: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", trusted, "delivery '.*nowhere': no such file or folder; give")
    refused(tmp_path, write_classes(tmp_path / "in", COUNTS), tmp_path / "nowhere", "trusted set '.*nowhere': no such")


def test_an_empty_delivery_is_refused(tmp_path: Path, trusted: Path) -> None:
    (tmp_path / "in" / "ant").mkdir(parents=True)
    refused(tmp_path, tmp_path / "in", trusted, "delivery '.*in' is empty")
    refused(tmp_path, write_parquet(tmp_path / "x.parquet", [], names=["ant"]), trusted, "is empty|not readable|column 'label'")


def test_a_delivery_of_damaged_files_alone_is_refused(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", {"ant": 0})
    (root / "ant" / "x.png").write_bytes(b"")
    refused(tmp_path, root, trusted, r"none of 1 files is usable \(1 empty-file\)")


def test_one_class_only_is_refused(tmp_path: Path, trusted: Path) -> None:
    refused(tmp_path, write_classes(tmp_path / "in", {"ant": 5}), trusted, r"one class only \('ant'\)")
    refused(tmp_path, write_classes(tmp_path / "two", COUNTS), write_classes(tmp_path / "t1", {"ant": 5}), "trusted set .*one class only")


def test_too_few_images_of_a_class_are_refused(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", {"ant": 4, "bee": 1})
    (root / "bee" / "cut.png").write_bytes(png(3)[:100])
    refused(tmp_path, root, trusted, "class 'bee' has 1 usable images, expected at least 2")


def test_labels_outside_the_trusted_classes_are_refused(tmp_path: Path, trusted: Path) -> None:
    refused(
        tmp_path,
        write_classes(tmp_path / "in", {**COUNTS, "beee": 2}),
        trusted,
        r"outside the trusted set's classes: 'beee'; did you mean 'bee'\?",
    )


def test_a_folder_without_images_is_no_class(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "._x.png").write_bytes(b"\0\5\26\7")
    assert take(root, trusted, tmp_path / "out")["reasons"] == {"not-an-image": 1}


def test_no_trusted_set_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, write_classes(tmp_path / "in", COUNTS), "", "no trusted set.*--trusted")


def test_too_many_trusted_copies_are_refused(tmp_path: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    refused(tmp_path, root, root, "8 of its 8 images are exact copies from the delivery")


def test_a_refused_intake_leaves_the_last_one_untouched(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    digest = take(root, trusted, tmp_path / "out")["digest"]
    with pytest.raises(DataError):
        take(root, root, tmp_path / "out")
    assert verify_dataset(tmp_path / "out" / "dataset").digest == digest


def test_a_full_disk_is_one_line_and_nothing_is_left(tmp_path: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = write_classes(tmp_path / "in", COUNTS)
    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(EnvironmentFault, match="No space left on device; free some space") as caught:
        take(root, trusted, tmp_path / "out")
    assert caught.value.exit_code == 1 and list((tmp_path / "out").iterdir()) == []


def test_given_truth_is_copied_and_malformed_truth_refused(tmp_path: Path, trusted: Path) -> None:
    root = write_classes(tmp_path / "in", COUNTS)
    truth = Truth("badnets", 0, 0.1, {"size": 3}, ["a" * 64], ["poison"], [1])
    write_truth(tmp_path / "truth", truth)
    take(root, trusted, tmp_path / "out", truth_source=str(tmp_path / "truth"))
    assert read_truth(tmp_path / "out" / "truth") == truth
    refused(tmp_path, root, trusted, "no truth", truth_source=str(tmp_path / "in"))


def test_a_trial_is_poisoned_after_it_was_taken_in(tmp_path: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(dataset: Path, out: Path, *, truth: Path, params: Poison, seed: int) -> None:
        info = verify_dataset(dataset)
        write_dataset(out, read_batches(dataset), class_names=info.class_names, supplier=info.supplier, trial=True)
        write_truth(truth, Truth(str(params.attack), params.target_label, params.poison_rate, {"seed": seed}, [], [], []))

    monkeypatch.setitem(sys.modules, "components.poison", SimpleNamespace(poison=poison))
    root, attack = write_classes(tmp_path / "in", COUNTS), Poison(attack="blend", target_label=1)
    result = take(root, trusted, tmp_path / "out", poison=attack, seed=7)
    info = verify_dataset(tmp_path / "out" / "dataset")
    assert result["trial"] and info.trial and result["digest"] == info.digest
    assert read_truth(tmp_path / "out" / "truth") == Truth("blend", 1, 0.1, {"seed": 7}, [], [], [])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dataset", "quarantine", "trusted_set", "truth"]
    refused(tmp_path, root, trusted, "--poison and --truth exclude each other", poison=attack, truth_source=str(tmp_path / "out" / "truth"))


def test_hostile_names_are_kept_as_data(tmp_path: Path) -> None:
    names = {"a'; DROP TABLE x; --": 3, "<script>\n\x1b[31m": 3, os.fsdecode(b"\xfe"): 3}
    trusted = write_classes(tmp_path / "t", names, seed=50_000)
    result = ingest(
        str(write_classes(tmp_path / "in", names)), str(trusted), outputs=places(tmp_path / "out"), params=Ingest(), options=OPTIONS
    )
    assert result["class_names"] == ["<script>\n\x1b[31m", "\\udcfe", "a'; DROP TABLE x; --"] and result["accepted"] == 9


def test_the_step_runs_under_the_local_runner(tmp_path: Path, trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kfp import dsl, local

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    arguments = {"data": str(write_classes(tmp_path / "in", COUNTS)), "trusted": str(trusted), "records": str(tmp_path / "records")}
    settings = {"supplier": "acme", "limit": 0, "truth_source": "", "seed": 0, "params": {"shard_images": 5}, "poison": {}}
    settings |= {"workspace": str(tmp_path / "workspace"), "run_id": "run-1", "name": "model", "again": False}
    task = ingest_step(**arguments, **settings)
    record = json.loads((tmp_path / "records" / "ingest.json").read_text())
    assert record["status"] == "succeeded" and record["outputs"]["accepted"] == 8
    assert task.outputs["Output"] is True
    assert task.outputs["digest"] == record["outputs"]["digest"] == verify_dataset(Path(task.outputs["dataset"].path)).digest
    assert isinstance(task.outputs["dataset"], dsl.Dataset)
