"""The checked-in suite: what blocks, what is told, and that each check can fail."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from delivery_files import encode, pixels, png
from PIL import Image

from cbd.attest import digests_in, unseal
from cbd.config import Validation
from cbd.dataset import Row, make_row, read_info, to_batches, write_dataset
from cbd.files import sha256_file
from cbd.keys import ensure_key
from components.columns import drift, supplier_ratios
from components.lookalikes import lookalikes
from components.patches import repeated_patches
from components.validate import SUITE, validate, validate_step

NAMES = ["ant", "bee"]


def row(seed: int, label: int = 0, **changes: object) -> Row:
    return make_row(png(seed), label=label, original_path=f"{NAMES[label % 2]}/{seed}.png", source="acme")._replace(**changes)


@dataclass
class Sets:
    """A clean data set of 50 rows that a test may change before it is written, and a trusted set."""

    folder: Path
    rows: list[Row]
    class_names: list[str]
    limits: Validation = field(default_factory=Validation)

    def validate(self) -> dict[str, list[str]]:
        data, out = self.folder / "data", self.folder / "validation"
        write_dataset(data, to_batches(self.rows), class_names=self.class_names, supplier="acme")
        return validate(data, out, trusted_set=self.folder / "trusted", limits=self.limits)


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    trusted = [row(9000 + i, i % 2) for i in range(4)]
    write_dataset(tmp_path / "trusted", to_batches(trusted), class_names=NAMES, supplier="trusted")
    return Sets(tmp_path, [row(i, i % 2) for i in range(50)], list(NAMES))


def checks_of(sets: Sets) -> list[dict[str, Any]]:
    """What the last validation wrote of each check."""
    checks: list[dict[str, Any]] = json.loads((sets.folder / "validation" / "validation.json").read_text())["checks"]
    return checks


def test_a_clean_data_set_passes_without_a_word(sets: Sets) -> None:
    result = sets.validate()
    assert (result["passed"], result["critical"], result["warnings"]) == (True, [], [])
    written = json.loads((sets.folder / "validation" / "validation.json").read_text())
    assert written["passed"] and len(written["checks"]) == result["num_checks"] == len(json.loads(SUITE.read_text())["expectations"])
    assert all(check["success"] for check in written["checks"]) and written["data_digest"]


CRITICAL = {
    "sample_id is no SHA-256": {"sample_id": "x" * 64},
    "sample_id is not unique": {"sample_id": row(1).sample_id},
    "pixel_digest is no SHA-256": {"pixel_digest": "AB"},
    "pixel_digest is not unique": {"pixel_digest": row(1).pixel_digest},
    "the image is in the trusted set as well": {"pixel_digest": row(9000).pixel_digest},
    "the width is outside 4 to 65,535 pixels": {"width": 3},
    "the height is outside 4 to 65,535 pixels": {"height": 70_000},
    "the format is not one that is taken in": {"format": "SVG"},
    "the supplier is missing": {"source": None},
    "the original path is missing": {"original_path": None},
    "sample_id is missing": {"sample_id": None},
    "pixel_digest is missing": {"pixel_digest": None},
    "the file is empty": {"data": b""},
}


@pytest.mark.parametrize("sentence", CRITICAL)
def test_each_critical_failure_blocks(sets: Sets, sentence: str) -> None:
    sets.rows[0] = sets.rows[0]._replace(**CRITICAL[sentence])
    result = sets.validate()
    assert not result["passed"] and any(found.endswith(f"of 50 images: {sentence}") for found in result["critical"]), result


WARNINGS = {
    "the file name's extension does not fit the content": {"original_path": "ant/x.jpg"},
    "the path holds control characters": {"original_path": "ant/\x1b[31mx.png"},
    "the pixels were neither RGB nor 8-bit grey and were converted": {"mode": "CMYK"},
    "one side is more than 4 times the other": {"width": 81, "height": 20},
    "the image is smaller than 16 pixels on a side": {"width": 15},
}


@pytest.mark.parametrize("sentence", WARNINGS)
def test_each_warning_is_told_and_does_not_block(sets: Sets, sentence: str) -> None:
    sets.rows[0] = sets.rows[0]._replace(**WARNINGS[sentence])
    result = sets.validate()
    assert result["passed"] and result["warnings"] == [f"1 of 50 images: {sentence}"]


def test_unbalanced_and_empty_classes_are_told(sets: Sets) -> None:
    sets.rows = [row(i, 0 if i < 48 else 1) for i in range(50)]
    assert sets.validate()["warnings"] == [
        "2 of 50 images: the class holds fewer than 20 images",
        "48 of 50 images: the class holds more than 90 % of all images",
    ]


def test_one_class_too_few_images_and_other_classes_block(sets: Sets) -> None:
    sets.rows = [row(i) for i in range(3)]
    sets.class_names = ["bee", "ant"]
    critical = " ".join(sets.validate()["critical"])
    assert "fewer than 2 classes hold images" in critical and "the classes are not the trusted set's" in critical
    assert "the data set holds fewer than 4 images" in critical
    sets.rows = [row(i) for i in range(20)] + [row(20, 1)]
    assert "1 of 21 images: the class holds fewer than 2 images" in sets.validate()["critical"]


def test_an_altered_shard_blocks_and_nothing_else_is_looked_at(sets: Sets) -> None:
    sets.validate()
    shard = sets.folder / "data" / "shard-00000.parquet"
    table = pq.read_table(shard)
    pq.write_table(table.slice(0, 49), shard)
    result = validate(sets.folder / "data", sets.folder / "validation", trusted_set=sets.folder / "trusted", limits=Validation())
    assert not result["passed"] and len(result["critical"]) == 1 and "shard-00000.parquet: altered" in result["critical"][0]


def test_the_suite_holds_no_ids_and_every_sentence_once() -> None:
    expectations = json.loads(SUITE.read_text())["expectations"]
    sentences = [item["meta"]["sentence"] for item in expectations]
    assert len(set(sentences)) == len(sentences)
    assert all(set(item) == {"type", "kwargs", "severity", "meta"} and item["severity"] in ("critical", "warning") for item in expectations)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield tmp_path


def test_the_step_says_one_bool_from_any_folder(sets: Sets, elsewhere: Path) -> None:
    from kfp import dsl

    sets.validate()
    artifacts = [dsl.Dataset(uri=str(sets.folder / name)) for name in ("data", "trusted")]
    out = dsl.Artifact(uri=str(elsewhere / "step"))
    said = validate_step.python_func(
        records=str(elsewhere / "run-1" / "records"),
        workspace=str(elsewhere / "workspace"),
        params={},
        dataset=artifacts[0],
        trusted_set=artifacts[1],
        validation=out,
    )
    assert said is True and json.loads((elsewhere / "step" / "validation.json").read_text())["passed"]
    key = ensure_key(elsewhere / "workspace").public_key()
    told = unseal((elsewhere / "run-1" / "attestations" / "validate.json").read_bytes(), [key], told="x")
    subjects = {"dataset": read_info(sets.folder / "data").digest, "validation.json": sha256_file(elsewhere / "step" / "validation.json")}
    assert digests_in(told["subject"]) == subjects and told["predicate"]["result"] == "PASSED"
    assert digests_in(told["predicate"]["configuration"])["suite"] == sha256_file(SUITE)
    assert len(told["predicate"]["passedTests"]) == len(json.loads(SUITE.read_text())["expectations"])


def test_a_wrong_extension_is_seen_from_the_content(sets: Sets) -> None:
    sets.rows[0] = make_row(encode(pixels(0), "BMP"), label=0, original_path="ant/x.png", source="acme")
    assert sets.validate()["warnings"] == ["1 of 50 images: the file name's extension does not fit the content"]


def scene(seed: int, *, shift: int = 0) -> np.ndarray:
    """uint8 [32, 32, 3]: a smooth picture, another for every seed; `shift` makes it a little brighter."""
    small = Image.fromarray(pixels(seed, size=(4, 4)) // 2 + 40)
    return np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC)) + np.uint8(shift)


def picture(image: np.ndarray, label: int, path: str, **changes: object) -> Row:
    return make_row(encode(image), label=label, original_path=f"{NAMES[label]}/{path}.png", source="acme")._replace(**changes)


def test_lookalikes_are_found_in_the_class_in_another_one_and_in_the_trusted_set(tmp_path: Path) -> None:
    write_dataset(
        tmp_path / "trusted", to_batches([picture(scene(900 + i), i % 2, "t") for i in range(4)]), class_names=NAMES, supplier="t"
    )
    rows = [picture(scene(i), i % 2, str(i)) for i in range(60)]
    rows += [picture(scene(0, shift=1), 0, "again"), picture(scene(1, shift=1), 0, "flipped"), picture(scene(900, shift=1), 0, "leaked")]
    rows += [picture(np.full((32, 32, 3), level, np.uint8), level % 2, f"flat{level}") for level in range(20)]
    limits = Validation(max_lookalikes=0.02, max_contradicting_lookalikes=0.02, max_trusted_lookalikes=0.01, max_outliers=1.0)
    found = Sets(tmp_path, rows, list(NAMES), limits).validate()
    assert found["passed"] and found["warnings"] == [
        "many images look like another one of their class (0.0241, validation.max_lookalikes is 0.02)",
        "images look like one of another class (0.0241, validation.max_contradicting_lookalikes is 0.02)",
        "images look like one of the trusted set (0.012, validation.max_trusted_lookalikes is 0.01)",
    ], "2, 2 and 1 of 83 images"


def test_near_hashes_are_counted_by_class_and_a_fourth_bit_is_too_far() -> None:
    hashes = np.array([0, 0b111, 0b1111, 1 << 63, 1 << 63 | 1 << 40 | 1 << 20], np.uint64)
    labels = np.array([0, 1, 1, 2, 0])
    own, everyone = lookalikes(hashes, labels, hashes, labels) or ([], [])
    assert list(own) == [2, 2, 2, 1, 2] and list(everyone) == [4, 3, 2, 3, 3]
    own, everyone = lookalikes(hashes, labels, np.array([1 << 62], np.uint64), np.array([5])) or ([], [])
    assert list(own) == [0] and list(everyone) == [2]
    own, everyone = lookalikes(hashes[:0], labels[:0], hashes, labels) or ([], [])
    assert list(own) == list(everyone) == [0] * 5


def test_hashes_that_a_supplier_has_made_to_share_a_part_stop_nothing(monkeypatch: pytest.MonkeyPatch, sets: Sets) -> None:
    monkeypatch.setattr("components.lookalikes.MAX_PAIRS", 100)
    hashes = np.arange(40, dtype=np.uint64) << np.uint64(16)
    assert lookalikes(hashes, np.zeros(40, np.int64), hashes, np.zeros(40, np.int64)) is None
    sets.rows = [picture(scene(i), i % 2, str(i)) for i in range(60)]
    found = sets.validate()
    assert found["passed"] and [told for told in found["warnings"] if "(not measured)" in told] == [
        "many images look like another one of their class (not measured)",
        "images look like one of another class (not measured)",
    ]


def test_a_patch_that_one_class_alone_carries_is_named_with_its_place(sets: Sets) -> None:
    rows = [picture(scene(i), i % 2, str(i)) for i in range(100)]
    for i in range(0, 40, 2):
        image = scene(i).copy()
        image[-5:-2, 2:5] = 255
        rows[i] = picture(image, 0, str(i))
    sets.rows = rows
    assert sets.validate()["warnings"] == [
        "images of one class carry the same patch in the same place, and other classes do not (0.4, validation.max_repeated_patch is 0.02)"
    ]
    (patch,) = json.loads((sets.folder / "validation" / "validation.json").read_text())["patches"]
    assert (patch["class_name"], patch["share"], patch["elsewhere"], patch["num_images"]) == ("ant", 0.4, 0.0, 50)
    assert patch["place"] == "bottom left, 2 and 2 pixels from the edges"
    (check,) = [check for check in checks_of(sets) if check["column"] == "repeated_patch"]
    assert check["examples"] == [row.sample_id for row in rows if row.label == 0][:12]


def test_a_patch_that_all_classes_carry_is_none() -> None:
    marked = [(scene(i).copy(), i % 2) for i in range(100)]
    for image, _ in marked:
        image[-5:-2, 2:5] = 255
    assert repeated_patches(marked, num_classes=2) == []


def test_drift_is_worked_out_by_hand(sets: Sets) -> None:
    """Before 30 and 10, now 10 and 30: shares of 30.5/41 and 10.5/41, so that the index is 2 * 20/41 * ln(30.5/10.5) = 1.04."""
    labels, new = np.repeat([0, 1, 0, 1], [30, 10, 10, 30]), np.arange(80) >= 40
    assert drift(labels, new) == pytest.approx(2 * 20 / 41 * math.log(30.5 / 10.5))
    assert drift(labels, np.ones(80, bool)) == 0 and drift(np.repeat([0, 1, 0, 1], 20), new) == 0
    sets.rows = [row(i, int(label), batch="new" if here else "old") for i, (label, here) in enumerate(zip(labels, new, strict=True))]
    assert sets.validate()["warnings"] == [
        "the classes are spread otherwise than in what was accepted before (1.04, validation.max_drift is 0.2)"
    ]


def test_a_supplier_who_sends_far_more_of_a_class_is_told(sets: Sets) -> None:
    """Of 40 images of one supplier 30 are ants, of 40 of the others 5: (30 / 40) / (5.5 / 40) = 5.45."""
    labels, suppliers = np.repeat([0, 1, 0, 1], [30, 10, 5, 35]), np.repeat(["a", "b"], 40)
    assert supplier_ratios(labels, suppliers)[[0, 35, 41, 79]] == pytest.approx([30 / 5.5, 1, 1, 35 / 10.5])
    assert (supplier_ratios(labels, np.repeat(["a"], 80)) == 1).all()
    sets.rows = [row(i, int(label), source=source) for i, (label, source) in enumerate(zip(labels, suppliers, strict=True))]
    assert sets.validate()["warnings"] == [
        "one supplier sends far more of a class than all others (5.45, validation.max_supplier_ratio is 3)"
    ]


def test_images_far_darker_than_the_others_are_told(sets: Sets) -> None:
    rows = [picture(scene(i), i % 2, str(i)) for i in range(98)]
    sets.rows = [*rows, *(picture(np.full((32, 32, 3), level, np.uint8), level, f"flat{level}") for level in range(2))]
    assert sets.validate()["warnings"] == [
        "images are far darker, brighter, flatter or noisier than the others (0.02, validation.max_outliers is 0.01)"
    ]


def test_the_page_shows_the_images_that_a_finding_is_about_and_loads_nothing(sets: Sets) -> None:
    sets.rows[0] = sets.rows[0]._replace(mode="CMYK", original_path="ant/<script>alert(1)</script>.png")
    sets.validate()
    examples = {check["sentence"]: check["examples"] for check in checks_of(sets) if check["examples"]}
    assert examples["1 of 50 images: the pixels were neither RGB nor 8-bit grey and were converted"] == [sets.rows[0].sample_id]
    page = (sets.folder / "validation" / "validation.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == sum(map(len, examples.values())) and "ant/&lt;script&gt;" in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "") and "Passed" in page


def test_a_drift_shows_images_of_the_delivery_that_drifted(sets: Sets) -> None:
    sets.rows = [row(i, i % 2)._replace(batch="old") for i in range(60)] + [row(100 + i, 1)._replace(batch="new") for i in range(60)]
    sets.validate()
    (check,) = [check for check in checks_of(sets) if check["column"] == "class_drift"]
    assert check["examples"] == [row.sample_id for row in sets.rows[60:72]]


def test_the_page_of_an_altered_data_set_says_so_and_shows_no_image(sets: Sets) -> None:
    sets.validate()
    shard = next((sets.folder / "data").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes() + b"x")
    told = validate(sets.folder / "data", sets.folder / "again", trusted_set=sets.folder / "trusted", limits=sets.limits)
    page = (sets.folder / "again" / "validation.html").read_text()
    assert not told["passed"] and "Refused" in page and shard.name in page and "<img" not in page
