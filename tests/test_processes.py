"""Trainings in several processes of this machine: what they give, what they leave behind, and how they fail."""

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import trainings
import yaml
from PIL import Image
from test_training import bars
from test_training import params as small
from trainings import params

from cbd.config import Params, Training
from cbd.dataset import make_row, to_batches, write_dataset
from cbd.errors import ConfigError, DataError, EnvironmentFault
from components.processes import _why
from components.records import told_as
from components.train_confounder import train_confounder
from components.train_deconfounded import train_deconfounded
from pipelines.compile import compile_pipeline, compiled_text

TORCHRUN_SAYS = """
------------------------------------------------------------
Failures:
[0]:
  time      : 2026-11-28_12:00:00
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
[1]:
  rank      : 3 (local_rank: 3)
  exitcode  : -15 (pid: 12) (SIGTERM)
[2]:
  rank      : 5 (local_rank: 5)
  exitcode  : -9 (pid: 13) (SIGKILL)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with something to read, for trainings that workers can import."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "given").write_text("made")
    return tmp_path


def run(training: Callable[..., dict[str, Any]], place: Path, given: Params, **more: Any) -> dict[str, Any]:
    (place / "checkpoints").mkdir(exist_ok=True)
    return training(place / "data", place / "out", params=given, checkpoints=place / "checkpoints", **more)


def test_of_processes_that_failed_the_one_that_was_killed_is_named_for_the_others_missed_it() -> None:
    assert _why(TORCHRUN_SAYS, 1) == "process 5 was ended by SIGKILL"
    assert _why(TORCHRUN_SAYS.replace("-9", "2"), 1) == "process 0 ended with code 1"
    assert _why("nothing", 7) == "torchrun ended with code 7"


def test_a_single_process_is_this_one(place: Path) -> None:
    told = run(trainings.counting, place, params(1), tracked=("w", "r"))
    assert told == {"tracked": ("w", "r"), "agreed": True}
    assert (place / "out" / "made").read_text() == "made by 1"


@pytest.mark.slow
def test_the_first_of_two_processes_writes_and_tells_and_nothing_is_left_beside_it(place: Path) -> None:
    heard = io.StringIO()
    with redirect_stdout(heard), told_as("canary"):
        told = run(trainings.counting, place, params(2), tracked=("w", "r"))
    assert told == {"tracked": ["w", "r"], "agreed": True, "training": {"processes": 2, "nodes": 1}}
    assert (place / "out" / "made").read_text() == "made by 2"
    assert {path.name for path in place.iterdir()} == {"data", "checkpoints", "out"}
    assert {path.name for path in (place / "checkpoints").iterdir()} == {"first-True", "first-False"}
    assert [line for line in heard.getvalue().splitlines() if line.startswith("[")] == ["[canary] 2/2 counting"]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_training_with_its_name_and_no_output(place: Path) -> None:
    with pytest.raises(EnvironmentFault, match="training in 2 processes: process 1 was ended by SIGKILL.*run it again"):
        run(trainings.dying, place, params(2))
    assert {path.name for path in place.iterdir()} == {"data", "checkpoints"}


@pytest.mark.slow
def test_what_a_process_refuses_is_refused_in_the_same_words(place: Path) -> None:
    with pytest.raises(DataError, match=r"data: nothing in it$"):
        run(trainings.refusing, place, params(2))
    assert not (place / "out").exists()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 small images of four classes."""
    images, labels = bars(96, 0)
    path = tmp_path_factory.mktemp("data") / "dataset"

    def rows() -> Any:
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            file = io.BytesIO()
            Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
            yield make_row(file.getvalue(), label=label, original_path=f"{number}.png", source="x", max_pixels=2**20)

    write_dataset(path, to_batches(rows()), class_names=("top", "left", "bottom", "right"), supplier="x")
    return path


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders with what both stages left in one and in two processes."""
    places = {number: tmp_path_factory.mktemp("trained") for number in (1, 2)}
    for number, place in places.items():
        given = small(mi_weight=0.1).model_copy(update={"training": Training(processes=number)})
        common = {"params": given, "checkpoints": place / "checkpoints"}
        train_confounder(dataset, place / "confounder", **common)
        train_deconfounded(dataset, place / "confounder", model=place / "model", evidence=place / "evidence", **common)
    return places


@pytest.mark.slow
def test_both_stages_in_two_processes_leave_the_evidence_of_one_in_its_order(trained: dict[int, Path]) -> None:
    one, two = (pq.read_table(trained[number] / "evidence" / "evidence.parquet").to_pydict() for number in (1, 2))
    assert len(one["sample_id"]) == 96
    for column in ("sample_id", "label", "suspect"):
        assert one[column] == two[column]
    for column in ("confounder_loss", "preference", "final_loss", "sample_weight"):
        assert np.allclose(one[column], two[column], atol=0.2), column  # bfloat16, where the machine has it
    curves = ((trained[number] / "model" / "history.jsonl").read_text().splitlines() for number in (1, 2))
    for before, after in zip(*curves, strict=True):
        assert json.loads(before) == pytest.approx(json.loads(after), abs=0.05)


@pytest.mark.slow
def test_from_a_checkpoint_of_two_processes_a_single_one_goes_on(dataset: Path, trained: dict[int, Path], tmp_path: Path) -> None:
    kept = sorted(path.name for path in (trained[2] / "checkpoints").rglob("*.safetensors"))
    assert [name.partition("-")[0] for name in kept] == ["confounder.safetensors", "deconfounded", "pilot.safetensors"]
    heard = io.StringIO()
    with redirect_stdout(heard):
        told = train_confounder(dataset, tmp_path / "out", params=small(mi_weight=0.1), checkpoints=trained[2] / "checkpoints")
    assert "epoch" not in heard.getvalue() and told["steps"] == 6


@pytest.mark.parametrize(("training", "gpus"), [(Training(), 1), (Training(processes=4), 4), (Training(processes=4, nodes=2), 0)])
def test_a_training_step_on_a_cluster_asks_for_a_gpu_for_each_of_its_processes_and_for_none_where_a_train_job_has_them(
    training: Training, gpus: int
) -> None:
    spec = next(yaml.safe_load_all(compiled_text("gke", gpus=training.gpus)))
    executors = spec["deploymentSpec"]["executors"]
    asked = {name: made["container"]["resources"].get("accelerator", {}).get("count") for name, made in executors.items()}
    for step in ("canary", "train-confounder", "train-deconfounded", "train-undefended"):
        assert asked.pop(f"exec-{step}-step") == (str(gpus) if gpus else None)
    assert {name for name, count in asked.items() if count} == {"exec-evaluate-step", "exec-scan-step"}


def test_gpus_without_a_kind_of_cluster_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--gpus 4: .* by --overlay"):
        compile_pipeline(tmp_path / "x.yaml", gpus=4)
