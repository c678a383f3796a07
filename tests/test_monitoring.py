"""The metrics exporter: a real process, asked over HTTP, over run folders as runs leave them."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cbd.errors import ConfigError
from cbd.rates import rate
from components.monitoring import LASTING, ended_runs
from components.report import report

Samples = dict[tuple[str, str], float]


@contextmanager
def serving(workspace: Path) -> Iterator[str]:
    """The address of an exporter over the workspace, in a process of its own; it ends well when it is told to."""
    command = [sys.executable, "-m", "components.monitoring", "--workspace", str(workspace), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        try:
            yield f"http://127.0.0.1:{line.rsplit(' ', 1)[1].strip()}/metrics"
        finally:
            process.terminate()
        assert process.wait(10) == 0


def scrape(address: str) -> Samples:
    """Samples by name and their only label's value."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.read().decode())
    return {(sample.name, "".join(sample.labels.values())): sample.value for family in families for sample in family.samples}


def leave_run(workspace: Path, name: str, *, ended: float, **result: Any) -> Path:
    """A run's folder with a record that ended then, and a result."""
    folder = workspace / "runs" / name
    (folder / "records").mkdir(parents=True)
    record = {"step": "report", "status": "succeeded", "started": ended - 2, "seconds": 2.0, "outputs": {}}
    (folder / "records" / "report.json").write_text(json.dumps(record))
    whole = {"verdict": None, "nothing_new": None, "alarms": [], "stopped": {}, "clean_accuracy": None, "attack_success_rate": None}
    (folder / "result.json").write_text(json.dumps(whole | result))
    return folder


def test_the_newest_runs_verdict_accuracy_attacks_and_age_are_served_and_follow_the_workspace(tmp_path: Path) -> None:
    now = time.time()
    measured = {"clean_accuracy": rate(193, 200), "attack_success_rate": {"badnets": rate(1, 180), "warp": rate(9, 180)}}
    leave_run(tmp_path, "b", ended=now - 86400, verdict="PASS", **measured)
    leave_run(tmp_path, "c", ended=now - 2 * 86400, verdict="REVIEW")
    with serving(tmp_path) as address:
        before = scrape(address)
        leave_run(tmp_path, "a", ended=now, verdict="BLOCK")
        after = scrape(address)
    assert before["cbd_last_run_outcome", "PASS"] == 1 and before["cbd_last_run_outcome", "BLOCK"] == 0
    assert before["cbd_last_run_clean_accuracy", ""] == 0.965
    assert before["cbd_last_run_attack_success_rate", "warp"] == 0.05
    assert now - before["cbd_run_ended_timestamp_seconds", "PASS"] == pytest.approx(86400, abs=1)
    assert after["cbd_last_run_outcome", "BLOCK"] == 1 and after["cbd_last_run_outcome", "PASS"] == 0
    assert after["cbd_run_ended_timestamp_seconds", "PASS"] == before["cbd_run_ended_timestamp_seconds", "PASS"]
    assert ("cbd_last_run_clean_accuracy", "") not in after, "the new run measured nothing: no sample, never an older run's"
    assert {label for name, label in after if name == "cbd_last_run_outcome"} == set(LASTING)


def test_a_run_that_finds_nothing_new_ends_no_block_and_is_seen_by_its_age(tmp_path: Path) -> None:
    now = time.time()
    leave_run(tmp_path, "a", ended=now - 86400, verdict="BLOCK", clean_accuracy=rate(193, 200))
    leave_run(tmp_path, "b", ended=now, nothing_new={"run_id": "a", "verdict": "BLOCK"})
    with serving(tmp_path) as address:
        samples = scrape(address)
    assert samples["cbd_last_run_outcome", "BLOCK"] == 1 and samples["cbd_last_run_clean_accuracy", ""] == 0.965
    assert samples["cbd_run_ended_timestamp_seconds", "NOTHING_NEW"] == pytest.approx(now, abs=1)


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        ({"verdict": "INVALID"}, "INVALID"),
        ({"nothing_new": {"run_id": "r", "verdict": "PASS"}}, "NOTHING_NEW"),
        ({}, "FAILED"),
        ({"stopped": {"evaluate": "killed"}}, "FAILED"),
        ({"verdict": "PASS", "alarms": ["the wrong branch ran"]}, "FAILED"),
        ({"verdict": "SUPER"}, "FAILED"),
    ],
)
def test_a_run_that_stopped_or_contradicts_its_verdict_failed(tmp_path: Path, result: dict[str, Any], outcome: str) -> None:
    leave_run(tmp_path, "r", ended=time.time(), **result)
    assert [run.outcome for run in ended_runs(tmp_path)] == [outcome]


def test_the_result_that_the_report_step_writes_of_a_killed_run_is_read(tmp_path: Path) -> None:
    records = tmp_path / "runs" / "r" / "records"
    records.mkdir(parents=True)
    started = {"started": 1000.0, "seconds": 5.0}
    (records / "ingest.json").write_text(json.dumps({"step": "ingest", "status": "succeeded", "outputs": {}, **started}))
    (records / "validate.json").write_text(json.dumps({"step": "validate", "status": "running", "started": 1006.0}))
    report(str(records), records.parent / "report.html")
    assert [(run.outcome, run.time, run.clean_accuracy) for run in ended_runs(tmp_path)] == [("FAILED", 1005.0, None)]


def test_a_workspace_without_runs_has_no_samples_and_a_broken_result_stops_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        assert scrape(address) == {}
        (leave_run(tmp_path, "r", ended=time.time(), verdict="PASS") / "result.json").write_text("{")
        assert scrape(address)["cbd_last_run_outcome", "FAILED"] == 1


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        ended_runs(tmp_path / "absent")
