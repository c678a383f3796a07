"""The command line: exit codes, one-line errors, and nothing done before the door was passed."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import cbd

from cbd.images import encode_png
from pipelines import cli

PARAMS = "gate: {min_clean_accuracy: 0.5}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a valid parameter file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "delivery").mkdir()
    (tmp_path / "trusted").mkdir()
    return tmp_path


def test_help_comes_in_half_a_second() -> None:
    before = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "--help"], capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parent.parent
    )
    assert told.returncode == 0 and "demo" in told.stdout
    assert time.monotonic() - before < 2  # half a second on a machine that does nothing else


def test_heavy_packages_are_not_imported_for_help() -> None:
    heavy = ("torch", "kfp", "mlflow", "dvc", "pandas", "pyarrow", "rich", "pydantic")
    code = f"import sys, pipelines.cli; print([name for name in {heavy} if name in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(cli.__file__).parent.parent)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--data", "delivery"], 2, "--trusted is missing"),
        (["run", "--trusted", "trusted"], 2, "--data is missing"),
        (["run", "--data", "nowhere", "--trusted", "trusted"], 2, "--data nowhere: no such file or folder"),
        (["run", "--data", "delivery", "--trusted", "nowhere"], 2, "--trusted nowhere: no such file or folder"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--name", "a b"], 2, "--name 'a b'"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--supplier", "../x"], 2, "--supplier '../x'"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--truth", "nowhere"], 2, "--truth nowhere: no truth.json"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--preset", "papre"], 2, "preset 'papre'"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--params", "none.yaml"], 2, "none.yaml: no such parameter file"),
        (
            ["run", "--data", "delivery", "--trusted", "trusted", "--poison-rate", "0.1"],
            2,
            "--poison-rate, --target-label, --mapping, --source-label and --trigger go with --poison",
        ),
        (["run", "--data", "delivery", "--trusted", "trusted", "--poison", "wavelet"], 2, "wavelet"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--poison", "sig", "--trigger", "delta"], 2, "expected SETTING=VALUE"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--poison", "sig", "--trigger", "a=[b"], 2, "expected SETTING=VALUE"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--poison", "sig", "--trigger", "a=1"], 2, "sig has no setting 'a'"),
        (["run", "--data", "delivery", "--trusted", "trusted", "--epochs", "0"], 2, "0 is not in the range"),
        (["tarin"], 2, "No such command 'tarin'"),
        (["suspects", "no-run"], 2, "no-run: no such run"),
        (["report", "no-run"], 2, "no-run: no such run"),
        (["compile", "--image", "python:3.11"], 2, "expected NAME@sha256:DIGEST"),
        (["compile", "--out", "retrain.txt"], 2, "ends in .yaml"),
    ],
)
def test_a_mistake_is_one_line_with_its_exit_code_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    before = sorted(folder.rglob("*"))
    found, out, err = cbd(capsys, *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(folder.rglob("*")) == before


def test_an_unknown_parameter_is_told_with_the_nearest_known_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "params.yaml").write_text(PARAMS + "confounder: {step: 3}\n")
    code, _, err = cbd(capsys, "run", "--data", "delivery", "--trusted", "trusted")
    assert code == 2 and "did you mean 'steps'?" in err


def test_with_json_an_error_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = cbd(capsys, "run", "--data", "nowhere", "--trusted", "trusted", "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == told["exit_code"] == 2 and told["verdict"] is None
    assert told["error"] in err


def test_control_characters_in_a_name_are_told_as_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    _, _, err = cbd(capsys, "run", "--data", "no\x1b[2J\u202ewhere\nerror: fine", "--trusted", "trusted")
    assert "\x1b" not in err and "\u202e" not in err and err.count("\n") == 1


def test_a_workspace_that_cannot_be_written_is_the_machines_fault(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("in the way")
    code, _, err = cbd(capsys, "run", "--data", "delivery", "--trusted", "trusted", "--workspace", "file/workspace")
    assert code == 1 and "cannot write" in err and err.count("\n") == 1


def test_a_nearly_full_disk_is_refused_at_the_door(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import launch

    monkeypatch.setattr(launch, "MIN_FREE_BYTES", 2**60)
    code, _, err = cbd(capsys, "run", "--data", "delivery", "--trusted", "trusted")
    assert code == 1 and "GB free" in err and err.count("\n") == 1


def test_mlflow_out_of_reach_is_refused_at_the_door(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, _, err = cbd(capsys, "run", "--data", "delivery", "--trusted", "trusted")
    assert code == 1 and "127.0.0.1:9" in err and err.count("\n") == 1
    assert not list(folder.glob("cbd-workspace/runs/*"))


def test_the_demos_data_alone_can_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = cbd(capsys, "demo", "--data-only", "--out", "digits")
    assert code == 0 and out.splitlines()[-1].startswith("next: cbd run --data digits/delivery")
    assert {path.name for path in (folder / "digits").iterdir()} == {"delivery", "trusted", "truth"}


def test_the_doctor_tells_versions_and_what_to_mend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import doctor

    monkeypatch.setattr(doctor, "_device", lambda problems: "cpu")  # importing torch costs seconds
    code, out, _ = cbd(capsys, "doctor", "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and told["healthy"] and told["kfp"] == "2.17.0" and told["device"] == "cpu"
    monkeypatch.setenv("PATH", "")
    code, out, _ = cbd(capsys, "doctor", "--json")
    assert code == 1 and any("git is missing" in problem for problem in json.loads(out.splitlines()[-1])["problems"])


def write_images(folder: Path, classes: dict[str, int], *, start: int = 0) -> None:
    """That many images per class, no two of them alike."""
    for label, (name, number) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            value = start + 40 * label + index
            (folder / name / f"{index}.png").write_bytes(encode_png(np.full((8, 8, 3), value, np.uint8)))


@pytest.mark.parametrize(
    ("delivered", "trusted", "start", "message"),
    [
        ({}, {"a": 4, "b": 4}, 100, "is empty"),
        ({"a": 4}, {"a": 4, "b": 4}, 100, "one class only"),
        ({"a": 4, "b": 1}, {"a": 4, "b": 4}, 100, "class 'b' has 1 usable images, expected at least 2"),
        ({"a": 4, "B": 4}, {"a": 4, "b": 4}, 100, "labels outside the trusted set's classes: 'B'"),
        ({"a": 4, "b": 4}, {"a": 4, "b": 4}, 0, "exact copies from the delivery"),
    ],
)
def test_a_delivery_that_cannot_be_used_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], delivered: dict[str, int], trusted: dict[str, int], start: int, message: str
) -> None:
    write_images(folder / "delivery", delivered)
    write_images(folder / "trusted", trusted, start=start)
    code, _, err = cbd(capsys, "ingest", "--data", "delivery", "--trusted", "trusted", "--out", "taken-in")
    assert code == 2 and message in err
    assert [line[:7] for line in err.splitlines()] == ["error: "]
    assert not [path for path in folder.glob("taken-in/**/*") if path.is_file()]


def test_a_delivery_is_taken_in_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(folder / "delivery", {"a": 3, "b": 3})
    write_images(folder / "trusted", {"a": 3, "b": 3}, start=100)
    (folder / "delivery" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, _ = cbd(capsys, "ingest", "--data", "delivery", "--trusted", "trusted", "--out", "taken-in", "--json")
    told = json.loads(out.splitlines()[-1])
    assert code == 0 and (told["delivered"], told["accepted"], told["quarantined"]) == (7, 6, 1)
    assert {path.name for path in (folder / "taken-in").iterdir()} == {"dataset", "trusted_set", "quarantine", "truth"}


def write_bundle(folder: Path, kind: str = "deconfounded") -> None:
    """An untrained model of the classes a and b."""
    import torch

    from cbd.bundle import BundleCard
    from cbd.models import make_model, save_bundle

    network = make_model("wrn-16-1", num_classes=2, image_size=16, generator=torch.Generator().manual_seed(0))
    about = {"architecture": "wrn-16-1", "class_names": ("a", "b"), "image_size": 16, "data_digest": "0" * 64, "params": {}, "seed": 0}
    save_bundle(network, BundleCard(kind=kind, trial=False, weights_sha256="", **about), folder)  # type: ignore[arg-type]


@pytest.mark.usefixtures("torch_one_thread")
def test_every_image_is_predicted_duplicates_and_unknown_classes_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(folder / "model")
    write_images(folder / "delivery", {"a": 2, "b": 2, "c": 1})
    (folder / "delivery" / "a" / "again.png").write_bytes((folder / "delivery" / "a" / "0.png").read_bytes())
    (folder / "delivery" / "a" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, err = cbd(capsys, "predict", "model", "--data", "delivery", "--out", "p.parquet", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["predicted"] == 6 and "refused: 1 truncated" in err
    rows = pq.read_table(folder / "p.parquet").to_pylist()
    told = {row["original_path"]: (row["label"], row["label_name"]) for row in rows}
    assert told["a/again.png"] == told["a/0.png"] == (0, "a") and told["b/1.png"] == (1, "b") and told["c/0.png"] == (None, "c")
    first = (folder / "delivery" / "a" / "0.png").read_bytes()
    assert [row["original_path"] for row in rows if row["sample_id"] == hashlib.sha256(first).hexdigest()] == ["a/0.png", "a/again.png"]
    for row in rows:
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == int(np.argmax(row["probabilities"])) and row["prediction_name"] == "ab"[row["prediction"]]


@pytest.mark.usefixtures("torch_one_thread")
def test_a_flat_folder_of_images_is_predicted_but_no_link_is_followed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(folder / "model")
    write_images(folder / "flat", {".": 3})
    (folder / "flat" / "link.png").symlink_to(folder / "params.yaml")
    code, _, err = cbd(capsys, "predict", "model", "--data", "flat", "--out", "p.parquet")
    assert code == 0 and "refused: 1 link" in err
    rows = pq.read_table(folder / "p.parquet").to_pylist()
    assert [(row["original_path"], row["label"], row["label_name"]) for row in rows] == [(f"{index}.png", None, None) for index in range(3)]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("confounder", "delivery", "a confounder holds the backdoor"),
        ("nowhere", "delivery", "no model bundle"),
        ("models:/none@champion", "delivery", "holds no model yet"),
        ("model", "nowhere", "no such file or folder"),
        ("model", "empty", "no usable image among 0 files"),
    ],
)
def test_what_cannot_be_predicted_is_told_and_leaves_no_table(
    folder: Path, capsys: pytest.CaptureFixture[str], model: str, data: str, message: str
) -> None:
    write_bundle(folder / "model")
    write_bundle(folder / "confounder", "confounder")
    write_images(folder / "delivery", {"a": 1})
    (folder / "empty").mkdir()
    code, _, err = cbd(capsys, "predict", model, "--data", data, "--out", "p.parquet")
    assert code == 2 and message in err and err.splitlines()[-1].startswith("error: ")
    assert not (folder / "p.parquet").exists()


@pytest.mark.usefixtures("torch_one_thread")
def test_an_altered_model_is_not_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(folder / "model")
    write_images(folder / "delivery", {"a": 1})
    weights = bytearray((folder / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model" / "model.safetensors").write_bytes(weights)
    code, _, err = cbd(capsys, "predict", "model", "--data", "delivery", "--out", "p.parquet")
    assert code == 2 and "altered" in err
