"""The checked-in suite: what blocks, what is told, and that each check can fail."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from delivery_files import encode, pixels, png

from cbd.dataset import Row, make_row, to_batches, write_dataset
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

    def validate(self) -> dict[str, list[str]]:
        data, out = self.folder / "data", self.folder / "validation"
        write_dataset(data, to_batches(self.rows), class_names=self.class_names, supplier="acme")
        return validate(data, out, trusted_set=self.folder / "trusted")


@pytest.fixture
def sets(tmp_path: Path) -> Sets:
    trusted = [row(9000 + i, i % 2) for i in range(4)]
    write_dataset(tmp_path / "trusted", to_batches(trusted), class_names=NAMES, supplier="trusted")
    return Sets(tmp_path, [row(i, i % 2) for i in range(50)], list(NAMES))


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
    result = validate(sets.folder / "data", sets.folder / "validation", trusted_set=sets.folder / "trusted")
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
    said = validate_step.python_func(records=str(elsewhere / "records"), dataset=artifacts[0], trusted_set=artifacts[1], validation=out)
    assert said is True and json.loads((elsewhere / "step" / "validation.json").read_text())["passed"]


def test_a_wrong_extension_is_seen_from_the_content(sets: Sets) -> None:
    sets.rows[0] = make_row(encode(pixels(0), "BMP"), label=0, original_path="ant/x.png", source="acme")
    assert sets.validate()["warnings"] == ["1 of 50 images: the file name's extension does not fit the content"]
