"""Steps that share the workspace and nothing else, as pods do: what is kept beside the records suffices, and few secrets do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_delivery import write_small

from cbd.config import load_params
from cbd.errors import DataError
from cbd.files import sha256_file, write_json
from components.export import export_run
from components.records import read_records, step
from components.summary import read_run, summarise
from components.verification import verify_run
from pipelines import local, outcome, steps
from pipelines.launch import Order, pipeline_arguments


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_an_artifact_outside_the_run_is_kept_in_it_without_shards(tmp_path: Path) -> None:
    run_dir, pod = tmp_path / "run", write(tmp_path / "pod", dataset_json="{}")
    (pod / "shard-00000.parquet").write_text("images")
    with step(str(run_dir / "records"), "ingest") as outputs:
        outputs["paths"] = {"dataset": str(pod), "page": str(pod / "dataset.json")}
    record = read_records(str(run_dir / "records"))["ingest"]
    kept = run_dir / "artifacts" / "ingest"
    assert record["outputs"]["paths"] == {"dataset": str(kept / "dataset"), "page": str(kept / "page.json")}
    files = [kept / "dataset" / "dataset.json", kept / "page.json"]
    assert record["kept"] == {str(path): sha256_file(path) for path in files}
    assert sorted(path for path in kept.rglob("*") if path.is_file()) == files


def test_an_artifact_in_the_runs_folder_stays_where_it_is(tmp_path: Path) -> None:
    place = write(tmp_path / "kfp" / "evaluation", evaluation_json="{}")
    with step(str(tmp_path / "records"), "evaluate") as outputs:
        outputs["paths"] = {"evaluation": str(place)}
    record = read_records(str(tmp_path / "records"))["evaluate"]
    assert record["outputs"]["paths"] == {"evaluation": str(place)}
    assert "kept" not in record
    assert not (tmp_path / "artifacts").exists()


def test_a_step_that_runs_again_keeps_what_it_wrote_last(tmp_path: Path) -> None:
    pod = write(tmp_path / "pod", old_json="1")
    for name in ("old.json", "new.json"):
        (pod / "old.json").rename(pod / name)
        with step(str(tmp_path / "run" / "records"), "evaluate") as outputs:
            outputs["paths"] = {"evaluation": str(pod)}
    assert [path.name for path in (tmp_path / "run" / "artifacts" / "evaluate" / "evaluation").iterdir()] == ["new.json"]


@pytest.mark.parametrize("change", [lambda path: path.write_text("{}"), lambda path: path.unlink()], ids=["altered", "gone"])
def test_a_kept_file_that_was_altered_is_an_alarm(tmp_path: Path, change: Any) -> None:
    pod, records = write(tmp_path / "pod", evaluation_json='{"clean_accuracy": {"rate": 0.9}}'), str(tmp_path / "run" / "records")
    with step(records, "evaluate") as outputs:
        outputs["paths"] = {"evaluation": str(pod)}
    assert not any("altered" in alarm for alarm in summarise(read_run(records), tmp_path)["alarms"])
    change(tmp_path / "run" / "artifacts" / "evaluate" / "evaluation" / "evaluation.json")
    assert (
        "evaluate kept evaluation.json beside its record, and it is gone or was altered since."
        in (summarise(read_run(records), tmp_path)["alarms"])
    )


@pytest.mark.slow
def test_the_report_needs_no_other_steps_pod(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run whose artifacts are gone before its report: the page, its audit, its export and its suspects all stand."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("CBD_TEST_PODS", str(tmp_path / "pods"))
    write_small(tmp_path)
    workspace = tmp_path / "workspace"
    run_dir = workspace / "runs" / "apart-1"
    run_dir.mkdir(parents=True)
    shutil.copy(mlflow_template, workspace / "mlflow.db")
    order = Order(str(tmp_path / "delivery"), str(tmp_path / "trusted"), workspace, baseline=True)
    arguments = pipeline_arguments(order, load_params(tmp_path / "params.yaml"), run_dir)
    assert local.run(arguments, run_dir, pipeline="apart_pipeline:retrain"), (run_dir / "pipeline.log").read_text()[-3000:]
    assert {path.parent.name for path in (tmp_path / "pods").rglob("*") if path.is_file()} == {"report-step"}
    assert not (run_dir / "kfp").exists()

    made = json.loads((run_dir / "result.json").read_text())
    assert made["verdict"]
    assert made["alarms"] == []
    assert made["stopped"] == {}
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 48
    assert outcome.finish(run_dir, True)["verdict"] == made["verdict"]

    held = list(verify_run(run_dir, workspace))
    assert any("data: is what the decision is about" in line and "its shards lie in the data registry" in line for line in held)
    assert any(line.startswith("evaluation: is what the decision is about") for line in held)
    assert steps.suspects("apart-1", workspace, top=3)["suspects"][0]["original_path"]
    export_run(run_dir, workspace, tmp_path / "export")

    scan = run_dir / "artifacts" / "scan" / "scanned" / "scan.json"
    write_json(scan, json.loads(scan.read_text()) | {"seed": 1})
    with pytest.raises(DataError, match=r"scan\.json: altered"):
        list(verify_run(run_dir, workspace))
