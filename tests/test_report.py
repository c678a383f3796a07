"""The exit handler: what it tells of a finished run, and that no failure, gap or hostile name keeps it from telling."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_run import STEPS, edit_record, fail_record, make_run, write_decision

from cbd import audit
from cbd.config import canonical_json
from cbd.errors import CbdError, EnvironmentFault
from cbd.files import write_json
from cbd.heads import read_heads
from cbd.log_store import open_log
from components import decision, register
from components import summary as told
from components.charts import bar, histogram, interval, nice, ticks
from components.pages.text import bounds, clip, count, percent, seconds, size, visible
from components.report import close, report
from components.summary import summary


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("made") / "run-1"
    make_run(run)
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A fresh copy of a finished run; its records name the copy's artifacts."""
    copy = tmp_path / "run-1"
    shutil.copytree(made, copy)
    for path in (copy / "records").glob("*.json"):
        path.write_text(path.read_text().replace(str(made), str(copy)))
    return copy


def tell(run: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """The result and the page of a run."""
    result = report(str(run / "records"), run / "report.html", **options)
    return result, (run / "report.html").read_text(encoding="utf-8")


def _sign(run: Path, workspace: Path) -> None:
    """Signs the run's decision with the key of a workspace, and enters it into the log there."""
    folder = run / "kfp" / "decision"
    digest = decision.write_decision(json.loads((folder / "decision.json").read_text()), folder, workspace)
    edit_record(str(run / "records"), "decide", outputs={"decision_digest": digest})


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


# A finished run


def test_a_finished_run_is_told_in_the_form_of_the_json_option(run: Path) -> None:
    result, _ = tell(run)
    assert (result["verdict"], result["consistent"], result["alarms"], result["stopped"]) == ("PASS", True, [], {})
    assert result["clean_accuracy"]["k"] == 681 and result["attack_success_rate"]["badnets"]["n"] == 628
    assert (result["confounder"]["steps"], result["confounder"]["separated"], result["confounder"]["asr"]["k"]) == (800, True, 622)
    assert result["baseline"]["asr"]["k"] == 628
    assert result["data"] | {"digest": ""} == {
        "delivered": 64, "accepted": 60, "duplicates": 1, "quarantined": 3, "known": None, "num_images": None,
        "digest": "", "revision": "9f" * 20
    }  # fmt: skip
    assert result["model"] == {"name": "digits-1a2b3c4d", "digest": "ab" * 32, "version": "1", "alias": "champion"}
    assert result["run_dir"] == str(run) and result["seconds"]["train_confounder"] == 31.5 and result["import_seconds"]["ingest"] == 3.5
    assert json.loads((run / "result.json").read_text()) == result == summary(str(run / "records"), run)


def test_the_page_tells_every_measurement_with_its_counts(run: Path) -> None:
    _, page = tell(run)
    for text in (
        "681 of 700",
        "6 of 628",
        "622 of 628",
        "628 of 628",
        "13 of 620",
        "The confounder set a group of images apart within 800 steps.",
        "9f9f9f9f",
        "acme",
    ):
        assert text in page
    assert page.count("data:image/png;base64,") == 48 + 1 + 1  # the gallery, a pattern and the triggers
    assert (page.count("<strong>poisoned</strong>, found"), page.count('class="curve')) == (12, 5)
    assert "Not measured" not in page
    assert page.index("Verdict") < page.index("Clean accuracy and") < page.index("most suspicious") < page.index("What a PASS does not say")


def test_patterns_are_shown_with_their_pictures_and_no_file_elsewhere_is_read(run: Path) -> None:
    (run.parent / "secret.png").write_bytes((run / "kfp" / "confounder" / "pattern-0.png").read_bytes())
    report(str(run / "records"), run / "report.html")
    page = (run / "report.html").read_text()
    part = page[page.index("Patterns that images of one class share") : page.index('<section id="images">')]
    assert part.count("data:image/png;base64,") == 1 and part.count("no picture") == 1
    assert "is crowded: the pilot contradicts 16.0" in page and "Its 12 hardest images are left out" in page
    assert "9 images" in part and "75.0" in part and "gap 8.25" in part


def test_the_page_loads_nothing_and_runs_nothing(run: Path) -> None:
    _, page = tell(run)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    for forbidden in ("<script", "http://", "https://", "@import", "url(", "<link", "<iframe"):
        assert forbidden not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))


def test_the_same_records_give_the_same_page(run: Path) -> None:
    assert tell(run)[1] == tell(run)[1]


@pytest.mark.parametrize("told", ["evaluation", "record"])
def test_the_undefended_model_is_told_wherever_it_was_measured(run: Path, told: str) -> None:
    path = run / "kfp" / "evaluation" / "evaluation.json"
    baseline = json.loads(path.read_text())["baseline"]
    if told == "record":
        edit(path, baseline=None)
        write_json(run / "records" / "train_undefended.json", {"status": "succeeded", "outputs": baseline | {"paths": {}}})
    result, page = tell(run)
    assert result["baseline"] == baseline and page.count("undefended model") == 2


def test_without_ground_truth_no_image_is_called_poisoned(run: Path) -> None:
    write_json(run / "kfp" / "truth" / "truth.json", {"attack": None})
    _, page = tell(run)
    assert "poisoned (known in this run)" not in page and "<strong>poisoned</strong>" not in page and "training images</li>" in page


# Hostile names


HOSTILE = ("<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "photo\u202egnp.exe", "bell\x07\x1b[31m\ttab", '"><b>', "{{ 7*7 }}")


def test_hostile_names_are_shown_as_text(tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    records = make_run(run, class_names=HOSTILE)
    names = pa.array(HOSTILE)
    columns = dict.fromkeys(("original_path", "label_name", "reason", "detail", "sha256"), names)
    table = pa.table(columns | {"num_bytes": [1] * 6, "image": pa.array([None] * 6, pa.binary())})
    pq.write_table(table, run / "kfp" / "quarantine" / "quarantine.parquet")
    edit_record(records, "validate", outputs={"critical": list(HOSTILE), "warnings": [{"<script>": "\u202e"}]})
    edit_record(records, "register", outputs={"name": HOSTILE[0], "version": HOSTILE[2]})
    edit_record(records, "version", status="failed", error={"type": "<script>", "message": "\n".join(HOSTILE)})
    _, page = tell(run)
    assert "<script" not in page and "<img src=x" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "{{ 7*7 }}" in page
    assert "photo⟨U+202E⟩gnp.exe" in page and "bell⟨U+0007⟩⟨U+001B⟩[31m⟨U+0009⟩tab" in page
    assert not set(page) & {"\u202e", "\x07", "\x1b", "\t"}


def test_a_hostile_decision_is_shown_as_text(run: Path) -> None:
    folder = run / "kfp" / "decision"
    check = {"check": "<script>", "name": "\u202e", "result": "<b>", "sentence": "<script>", "value": "\x00", "threshold": ["<i>"]}
    edit(folder / "decision.json", sentence="<script>", checks=[check], policy={"<script>": "<script>"}, created="<script>")
    edit(
        run / "kfp" / "evaluation" / "evaluation.json", attack_success_rate={"<script>": {"k": 1, "n": 2, "rate": 0.5, "low": 0, "high": 1}}
    )
    _, page = tell(run)
    assert "<script" not in page and "<b>" not in page and "<i>" not in page and "\u202e" not in page and "\x00" not in page


# Failures and gaps


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_step_is_named(run: Path, step: str) -> None:
    fail_record(str(run / "records"), step)
    result, page = tell(run)
    assert result["stopped"] == {step: "killed: it started and never ended"}
    assert f"<dt>{step}</dt>" in page and step not in result["seconds"]
    assert result["consistent"] is (step != "register") and result["verdict"] == ("PASS" if step == "register" else None)
    assert ("ALARM" if step == "register" else "NO VERDICT") in page


@pytest.mark.parametrize("step", STEPS)
def test_a_failed_step_is_named_with_its_error(run: Path, step: str) -> None:
    fail_record(str(run / "records"), step, type="DataError", message="shard-00000.parquet: altered")
    result, page = tell(run)
    assert result["stopped"] == {step: "DataError: shard-00000.parquet: altered"} and "DataError: shard-00000.parquet: altered" in page


def test_a_step_that_left_no_record_is_told_from_the_final_status(run: Path) -> None:
    (run / "records" / "register.json").unlink()
    (run / "records" / "decide.json").unlink()
    result, page = tell(run, final_status={"state": "FAILED", "error_message": "decide: ImportError"})
    assert result["stopped"] == {"pipeline": "FAILED: decide: ImportError"} and "decide: ImportError" in page


@pytest.mark.parametrize(
    "name", ["dataset", "quarantine", "truth", "confounder", "model", "evidence", "evaluation", "canary", "scanned", "decision"]
)
def test_a_missing_artifact_is_a_gap_and_no_crash(run: Path, name: str) -> None:
    shutil.rmtree(run / "kfp" / name)
    result, page = tell(run)
    assert ("Not measured" in page) is (name not in ("truth", "confounder", "model"))
    if name == "evaluation":
        assert result["clean_accuracy"] is None and result["attack_success_rate"] is None and result["baseline"] is None
        assert result["confounder"] == {"steps": 800, "separated": True, "asr": None}
    if name == "decision":
        assert result["verdict"] is None and not result["consistent"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"PAR1garbage"])
def test_damaged_files_are_gaps_and_no_crash(run: Path, content: bytes) -> None:
    for path in (run / "kfp").rglob("*.*"):
        path.write_bytes(content)
    result, page = tell(run)
    assert result["verdict"] is None and not result["consistent"] and "Not measured" in page


def test_no_record_at_all_is_an_alarm(tmp_path: Path) -> None:
    result, page = tell(tmp_path)
    assert result["verdict"] is None and not result["consistent"] and "the step ingest never ran" in page


def test_an_unreadable_record_counts_as_a_step_that_did_not_end(run: Path) -> None:
    (run / "records" / "evaluate.json").write_text("{")
    result, _ = tell(run)
    assert result["stopped"] == {"evaluate": "its record cannot be read"} and not result["consistent"]


def test_nan_in_an_artifact_is_an_absent_measurement(run: Path) -> None:
    path = run / "kfp" / "evaluation" / "evaluation.json"
    path.write_text(path.read_text().replace(str(681 / 700), "NaN"))
    assert tell(run)[0]["clean_accuracy"]["rate"] is None


def test_half_a_character_in_an_artifact_is_told(run: Path) -> None:
    path = run / "kfp" / "evaluation" / "evaluation.json"
    path.write_text(path.read_text().replace('"badnets"', '"bad\\ud83dnets"'))
    assert "bad?nets" in tell(run)[0]["attack_success_rate"]


def test_no_changed_value_in_any_json_file_makes_it_crash(run: Path) -> None:
    generator = random.Random(0)
    files = sorted({*(run / "records").glob("*.json"), *(run / "kfp").rglob("*.json")})
    for _ in range(40):
        path = generator.choice(files)
        before = path.read_bytes()
        path.write_text(json.dumps(_mutated(json.loads(before), generator)))
        _, page = tell(run)
        assert page.rstrip().endswith("</html>")
        path.write_bytes(before)


def _mutated(value: Any, generator: random.Random) -> Any:
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(sorted(value))
        return value | {key: _mutated(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.85:
        place = generator.randrange(len(value))
        return [*value[:place], _mutated(value[place], generator), *value[place + 1 :]]
    return generator.choice([None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x\ud800", "\x00", [], {}, [[]], {"a": 1}, ["x"]])


# The branch that the verdict demands


@pytest.mark.parametrize(("verdict", "branch"), [("PASS", "promote"), ("REVIEW", "hold"), ("INCONCLUSIVE", "record"), ("BLOCK", "record")])
def test_only_the_branch_that_the_verdict_demands_is_consistent(tmp_path: Path, verdict: str, branch: str) -> None:
    records = make_run(tmp_path / "run", verdict=verdict)
    for taken in ("promote", "hold", "record", None):
        edit_record(records, "register", outputs={"branch": taken})
        result, page = tell(tmp_path / "run")
        assert result["consistent"] is (taken == branch) and result["verdict"] == verdict
        assert ("What ran is not what the verdict demands" in page) is (taken != branch)
    (tmp_path / "run" / "records" / "register.json").unlink()
    result, page = tell(tmp_path / "run")
    assert not result["consistent"] and "register never ran" in page


@pytest.mark.parametrize(("verdict", "alias"), [("REVIEW", "champion"), ("BLOCK", "candidate"), ("PASS", None)])
def test_an_alias_that_the_verdict_does_not_give_is_an_alarm(tmp_path: Path, verdict: str, alias: str | None) -> None:
    records = make_run(tmp_path / "run", verdict=verdict)
    edit_record(records, "register", outputs={"alias": alias})
    assert not tell(tmp_path / "run")[0]["consistent"]


def test_the_report_and_the_registry_know_the_same_branches_and_aliases() -> None:
    assert (told.BRANCHES, told.ALIASES) == (register.BRANCHES, register.ALIASES)


def test_an_alias_on_a_trial_is_an_alarm(run: Path) -> None:
    edit_record(str(run / "records"), "ingest", outputs={"trial": True})
    assert not tell(run)[0]["consistent"]
    edit_record(str(run / "records"), "register", outputs={"alias": None})
    result, page = tell(run)
    assert result["consistent"] and result["trial"] and "no alias moves" in page


def test_a_branch_that_was_skipped_in_silence_is_an_alarm(run: Path) -> None:
    for name in STEPS[2:]:
        (run / "records" / f"{name}.json").unlink()
    result, _ = tell(run)
    assert result["alarms"] == ["No step failed, yet there is no verdict: a branch of the pipeline was skipped."]


@pytest.mark.parametrize("name", ["train_confounder", "train_deconfounded", "evaluate", "validate"])
def test_a_verdict_without_the_steps_before_it_is_an_alarm(run: Path, name: str) -> None:
    (run / "records" / f"{name}.json").unlink()
    assert not tell(run)[0]["consistent"]


@pytest.fixture
def refused(run: Path) -> Path:
    """A run whose data was refused by validation."""
    for name in set(STEPS) - {"ingest", "validate", "decide"}:
        (run / "records" / f"{name}.json").unlink()
    digest = write_decision(run / "kfp" / "decision", "BLOCK")
    edit_record(str(run / "records"), "validate", outputs={"passed": False, "critical": ["a class holds one image"]})
    edit_record(str(run / "records"), "decide", outputs={"verdict": "BLOCK", "decision_digest": digest})
    return run


def test_refused_data_is_blocked_without_training(refused: Path) -> None:
    result, page = tell(refused)
    assert (result["verdict"], result["consistent"]) == ("BLOCK", True)
    assert "nothing was trained" in page and "a class holds one image" in page and "the step evaluate never ran" in page


@pytest.mark.parametrize("name", ["train_confounder", "train_undefended", "register"])
def test_training_on_refused_data_is_an_alarm(refused: Path, name: str) -> None:
    write_json(refused / "records" / f"{name}.json", {"step": name, "status": "succeeded", "outputs": {"branch": "record"}})
    assert f"Validation refused the data, yet {name} ran." in tell(refused)[0]["alarms"]


def test_refused_data_with_another_verdict_is_an_alarm(refused: Path) -> None:
    digest = write_decision(refused / "kfp" / "decision", "PASS")
    edit_record(str(refused / "records"), "decide", outputs={"verdict": "PASS", "decision_digest": digest})
    assert not tell(refused)[0]["consistent"]


def test_an_altered_decision_is_an_alarm(run: Path) -> None:
    edit(run / "kfp" / "decision" / "decision.json", sentence="All is well.")
    assert "altered" in tell(run)[0]["alarms"][0]
    edit(run / "kfp" / "decision" / "decision.json", verdict="BLOCK")
    result, _ = tell(run)
    assert result["verdict"] is None and not result["consistent"]


def test_only_a_decision_signed_with_the_workspace_key_holds(run: Path, tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    _sign(run, tmp_path / "elsewhere")
    assert "cannot be trusted" in tell(run, workspace=str(workspace))[0]["alarms"][0]
    _sign(run, workspace)
    result, page = tell(run, workspace=str(workspace))
    assert result["consistent"] and "verified with the workspace" in page
    assert not tell(run, workspace=str(tmp_path / "nowhere"))[0]["consistent"]


def test_the_page_tells_what_became_of_the_verdict_and_the_model_since(run: Path, tmp_path: Path) -> None:
    """Version 3 is registered, retested, overtaken by 4, back again, demoted; what is about other models or verdicts is left out."""
    workspace = tmp_path / "workspace"
    _sign(run, workspace)
    own, other = json.loads((run / "records" / "decide.json").read_text())["outputs"]["decision_digest"], "0" * 64
    model = {"name": "digits-0123abcd", "alias": "champion"}
    edit_record(str(run / "records"), "register", outputs={**model, "version": "3"})
    evil = "<script>alert(1)</script>"
    for event, entry in [
        ("register", {**model, "version": "3", "decision_digest": own}),
        ("rejudged", {"decision_digest": other, "rejudges": own, "policy_sha256": "ab" * 32, "verdict": "REVIEW"}),
        ("rejudged", {"decision_digest": other, "rejudges": other, "policy_sha256": "cd" * 32, "verdict": "BLOCK"}),
        ("retest", {**model, "version": "3", "decision_digest": own, "verdict": "PASS", "sentence": f"Fine. {evil}"}),
        ("register", {**model, "name": "other-0123abcd", "version": "7", "decision_digest": other}),
        ("register", {**model, "version": "4", "decision_digest": other}),
        ("register", {**model, "version": "5", "decision_digest": other}),
        ("rollback", {**model, "version": "3", "from": "5", "decision_digest": own, "reason": "five is slow", "by": "Ada"}),
        ("demote", {**model, "version": "3", "decision_digest": own, "verdict": "BLOCK", "reason": "a trigger works"}),
        ("register", {**model, "version": "6", "decision_digest": other}),
        (
            "override",
            {**model, "version": "3", "decision_digest": own, "expires": "2027-01-31T12:00:00.000Z", "reason": "no other", "by": "Ada"},
        ),
    ]:
        audit.append(workspace, event, entry)
    page = tell(run, workspace=str(workspace))[1]
    part = page.partition('<section id="since">')[2].partition("</section>")[0]
    said = re.findall(r"<td><bdi>(.*?)</bdi></td><td>(.*?)</td>", part, re.DOTALL)
    assert [(text, re.sub(r"<.*?>|\s", "", chip)) for text, chip in said] == [
        ("Registered as version 3 of digits-0123abcd, champion.", ""),
        ("Judged again under the policy abababababab, without a new measurement.", "!REVIEW"),
        ("Measured again as champion. Fine. &lt;script&gt;alert(1)&lt;/script&gt;", "✓PASS"),
        ("No longer champion: version 4 took its place.", ""),
        ("Champion again, by Ada: five is slow", ""),
        ("Lost the alias champion. a trigger works", ""),
        ("Champion until 2027-01-31 12:00 all the same, by Ada: no other", ""),
    ]
    log = (workspace / audit.LOG).read_text()
    (workspace / audit.LOG).write_text(log.replace("five is slow", "five is fast"))
    page = tell(run, workspace=str(workspace))[1]
    assert "was edited" in page.partition('<section id="since">')[2].partition("</section>")[0]
    assert "written without the workspace" in tell(run)[1].partition('<section id="since">')[2]


# The step around it


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls to the tracking module, which is stood in for: importing MLflow costs seconds."""
    calls: list[tuple[Any, ...]] = []
    module = types.ModuleType("components.tracking")
    module.close_run = lambda workspace, run_id, *, status, artifacts, tags: calls.append((run_id, status, artifacts, tags))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "components.tracking", module)
    return calls


def test_the_step_can_be_imported_inside_a_task() -> None:
    code = "from components.report import close"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], env=os.environ | {"_KFP_RUNTIME": "true"})


def test_the_step_closes_the_tracking_run_with_the_page(run: Path, tmp_path: Path, closed: list[tuple[Any, ...]]) -> None:
    _sign(run, tmp_path / "w")
    close(str(run / "records"), workspace=str(tmp_path / "w"), run_id="run-1")
    head = read_heads(open_log(tmp_path / "w"))[-1]
    assert closed == [("run-1", "FINISHED", [run / "report.html", run / "result.json"], {"cbd.log_head": canonical_json(head).decode()})]
    record = json.loads((run / "records" / "report.json").read_text())
    assert record["status"] == "succeeded" and record["outputs"]["consistent"] is True
    assert "report" in json.loads((run / "result.json").read_text())["seconds"]


def test_the_step_fails_the_run_when_the_wrong_branch_ran(run: Path, tmp_path: Path, closed: list[tuple[Any, ...]]) -> None:
    _sign(run, tmp_path / "w")
    edit_record(str(run / "records"), "register", outputs={"branch": "record"})
    with pytest.raises(CbdError, match="contradicts its verdict"):
        close(str(run / "records"), workspace=str(tmp_path / "w"), run_id="run-1")
    assert closed[0][1] == "FAILED" and "ALARM" in (run / "report.html").read_text()
    assert json.loads((run / "records" / "report.json").read_text())["status"] == "failed"


def test_a_tracking_failure_does_not_lose_the_page(run: Path, tmp_path: Path, closed: list[tuple[Any, ...]]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise EnvironmentFault("MLflow at http://127.0.0.1:1 is out of reach")

    sys.modules["components.tracking"].close_run = refuse  # type: ignore[attr-defined]
    _sign(run, tmp_path / "w")
    close(str(run / "records"), workspace=str(tmp_path / "w"), run_id="run-1")
    record = json.loads((run / "records" / "report.json").read_text())
    assert (run / "report.html").is_file() and record["outputs"]["tracking"].startswith("not closed: MLflow")


# Long tables


def test_a_long_quarantine_is_cut_with_a_count(run: Path) -> None:
    n = 250
    columns = {name: [f"{name}-{i}" for i in range(n)] for name in ("original_path", "label_name", "detail", "sha256")}
    table = pa.table(columns | {"reason": ["truncated"] * n, "num_bytes": [1] * n, "image": pa.array([None] * n, pa.binary())})
    pq.write_table(table, run / "kfp" / "quarantine" / "quarantine.parquet")
    _, page = tell(run)
    assert "original_path-199" in page and "original_path-200" not in page and "and 50 more" in page and "250 truncated" in page


def test_files_that_are_unaccounted_for_are_told(run: Path) -> None:
    edit_record(str(run / "records"), "ingest", outputs={"delivered": 65})
    assert "files are unaccounted for" in tell(run)[1]


# Words and charts


def test_words_for_people() -> None:
    assert [percent(rate) for rate in (0, 0.0004, 0.021, 1, None)] == ["0.0\u202f%", "0.04\u202f%", "2.1\u202f%", "100.0\u202f%", "–"]
    assert bounds(0.01, 0.5) == "1.0\u202f% to 50.0\u202f%" and bounds(None, 0.5) == "–"
    assert [count(1097), count(None), seconds(3.14), seconds(125.0)] == ["1\u202f097", "–", "3.1\u202fs", "2\u202fmin 05\u202fs"]
    assert [size(12), size(2_400_000), size(None)] == ["12\u202fB", "2.4\u202fMB", "–"]
    assert visible("a\u200bb\n") == "a⟨U+200B⟩b⟨U+000A⟩" and visible("نمر é") == "نمر é"
    assert clip("x" * 200, 30) == "x" * 20 + " … " + "x" * 8


def test_an_axis_has_round_ends_and_places() -> None:
    assert [nice(top) for top in (0.9, 1, 1.01, 2.1, 6, 0.063)] == [1, 1, 2, 2.5, 10, 0.1]
    assert ticks(1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and ticks(0.1) == [0, 0.02, 0.04, 0.06, 0.08, 0.1]


def test_an_interval_is_drawn_where_its_numbers_are() -> None:
    drawn = interval(0.01, 0.02, 0.04, top=0.1, style="deconfounded", marks=[("limit", 0.05)])
    assert 'x1="10.00%" x2="40.00%"' in drawn and 'cx="20.00%"' in drawn and 'x1="50.00%" x2="50.00%"' in drawn


def test_a_bar_is_as_long_as_its_share() -> None:
    assert re.findall(r'x="([\d.]+)%" y="4" width="([\d.]+)%"', bar([("imports", 1.0), ("work", 3.0)], total=8.0)) == [
        ("0.00", "12.50"),
        ("12.50", "37.50"),
    ]


def test_a_histogram_stacks_its_groups() -> None:
    drawn = histogram([0.0, 1.0, 2.0], [("poison", [1, 0]), ("clean", [1, 4])], label="x", names=[(1.0, "<one>")])
    heights = re.findall(r'y="([\d.]+)" height="([\d.]+)" class="fill (\w+)"', drawn)
    assert heights == [("134.4", "33.6", "poison"), ("100.8", "33.6", "clean"), ("33.6", "134.4", "clean")]
    assert "&lt;one&gt;" in drawn
