"""The page's sections on the canary and on unknown triggers: every figure, and that nothing hostile in their files gets through."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_run import edit_record, make_run, write_scan

from cbd.anomaly import anomaly_indices
from cbd.files import write_json
from cbd.rates import rate
from components.charts import scatter
from components.pages import unknown
from components.report import report
from pipelines import console
from pipelines.outcome import write_result

NAMES = ("zero", "one", "two", "three", "four", "five")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of six classes."""
    make_run(tmp_path / "run-1", class_names=NAMES)
    return tmp_path / "run-1"


def section(run: Path, name: str) -> str:
    """The section of that id of the run's page."""
    report(str(run / "records"), run / "report.html")
    page = (run / "report.html").read_text(encoding="utf-8")
    return page.partition(f'<section id="{name}">')[2].partition("</section>")[0]


def edit(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def rows(part: str) -> list[str]:
    """The text of each row of the table's body."""
    body = part.partition("<tbody>")[2].partition("</tbody>")[0]
    return [re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", row)) for row in body.split("<tr>")[1:]]


def test_the_canary_is_told_family_by_family(run: Path) -> None:
    """49 of 50 is at least 89.4 % at 97.5 %, 28 of 627 at most 6.4 %; warp is found on 0 of 50 and so is not covered."""
    part = section(run, "canary")
    patch, blend, warp, sinusoid = rows(part)
    assert "50 of 50" in patch and "507 of 628" in patch and "1 of 627" in patch and "✓ PASS" in patch and "to zero" in patch
    assert "at least 89.4" in blend and "626 of 628" in blend
    assert "0 of 50" in warp and "not covered" in warp and "not covered" not in blend
    assert "28 of 627" in sinusoid and "6.4" in sinusoid and "10.0" in sinusoid
    assert "Not covered: warp, sinusoid." in part and "Trained in this run" in part and "other data" not in part


def test_a_reused_canary_says_from_which_run_and_data(run: Path) -> None:
    edit_record(str(run / "records"), "canary", outputs={"reused": True})
    edit(run / "kfp" / "canary" / "canary.json", run_id="run-0", data_digest="0" * 64)
    part = section(run, "canary")
    assert "Reused: it was trained in run <bdi>run-0</bdi>" in part and "other data than this run" in part


def test_a_missing_canary_is_said_plainly(run: Path) -> None:
    edit_record(str(run / "records"), "canary", outputs={"canary_sha256": None})
    assert "No canary was trained" in section(run, "canary")
    edit_record(str(run / "records"), "canary", status="failed")
    assert "Not measured" in section(run, "canary")


def test_a_family_that_was_held_back_says_so(run: Path) -> None:
    path = run / "kfp" / "decision" / "decision.json"
    checks = json.loads(path.read_text())["checks"]
    edit(path, checks=[check | ({"result": "INVALID"} if check["name"] == "canary: patch" else {}) for check in checks])
    assert "INVALID" in rows(section(run, "canary"))[0]


def test_without_a_decision_the_canary_still_is_shown_and_not_judged(run: Path) -> None:
    (run / "kfp" / "decision" / "decision.json").unlink()
    assert "not judged" in rows(section(run, "canary"))[0] and "201 of 315" in section(run, "unknown")


def test_bounds_are_those_of_the_attempt(run: Path) -> None:
    """50 of 50 is at least 92.9 % at 97.5 %, 91.6 % at 98.75 %."""
    assert "at least 92.9" in rows(section(run, "canary"))[0] and "97.5\u202f%" in section(run, "checks")
    edit(run / "kfp" / "decision" / "decision.json", attempt={"number": 2, "config_sha256": None})
    assert "at least 91.6" in rows(section(run, "canary"))[0] and "98.75\u202f%" in section(run, "checks")


@pytest.mark.parametrize("attempt", [None, {}, {"number": 10**30}, {"number": 0}, {"number": "<script>"}])
def test_a_decision_with_a_broken_attempt_is_a_gap_and_no_crash(run: Path, attempt: Any) -> None:
    edit(run / "kfp" / "decision" / "decision.json", attempt=attempt)
    assert "Not measured" in section(run, "canary") and "the confidence of the policy" in section(run, "checks")
    assert "<script" not in (run / "report.html").read_text()


def test_unknown_triggers_are_told_with_norms_picture_and_transfer(run: Path) -> None:
    part = section(run, "unknown")
    assert part.count("data:image/png;base64,") == 1 and part.count("<circle") == 6 + 6 + 1
    assert "smallest is of class <bdi>zero</bdi>, 7.39 pixels" in part and "p = 0.37 (Monte-Carlo)" in part and "does not stand out" in part
    assert "on 349 trusted images" in part and "on 351 other trusted images" in part
    (own,) = rows(part)
    assert "201 of 315" in own and "58.0" in own and "98.0" in own and "✓ PASS" in own


def test_a_class_that_stands_out_is_told(run: Path) -> None:
    log_norms = [1.0, 4.0, 4.1, 4.2, 4.3, 4.4]
    found = {"log_norms": log_norms, "success": [0.9] * 6, "unreached": [5], "statistic": float(anomaly_indices(np.array(log_norms)).max())}
    write_scan(run / "kfp" / "scanned", 6, candidate=found | {"p_value": 0.001, "method": "monte-carlo", "flagged": 0})
    part = section(run, "unknown")
    assert "it stands out" in part and "For 1 classes no trigger was found" in part


def test_without_a_confounder_or_enough_classes_that_is_said(run: Path) -> None:
    write_scan(run / "kfp" / "scanned", 4, confounder=None, confounder_digest=None)
    part = section(run, "unknown")
    assert "The confounder was not scanned" in part and "its size is not judged" in part


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<svg onload=alert(1)>", b"GIF89a" + bytes(50)])
def test_what_is_no_picture_is_not_shown(run: Path, content: bytes) -> None:
    (run / "kfp" / "scanned" / "triggers.png").write_bytes(content)
    assert "No picture that can be shown" in section(run, "unknown")


def test_a_picture_of_another_format_too_large_or_elsewhere_is_not_shown(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "kfp" / "scanned" / "triggers.png"
    whole = path.read_bytes()
    Image.new("RGB", (8, 8)).save(path, "JPEG")
    assert "No picture" in section(run, "unknown")
    (run.parent / "secret.png").write_bytes(whole)
    path.unlink()
    path.symlink_to(run.parent / "secret.png")
    assert "No picture" in section(run, "unknown")
    path.unlink()
    path.write_bytes(whole)
    assert "No picture" not in section(run, "unknown")
    for limit in ("MAX_BYTES", "MAX_PIXELS"):
        with monkeypatch.context() as patched:
            patched.setattr(unknown, limit, 20)
            assert "No picture" in section(run, "unknown")


def test_text_inside_a_picture_does_not_reach_the_page(run: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Comment", "SECRET" * 10)
    path = run / "kfp" / "scanned" / "triggers.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    assert b"SECRET" in path.read_bytes() and "U0VDUkVU" not in section(run, "unknown")


def test_hostile_canaries_and_scans_are_shown_as_text(run: Path) -> None:
    folder = run / "kfp"
    families = json.loads((folder / "canary" / "canary.json").read_text())["families"]
    families[0] |= {"attack": "<script>\u202e", "trigger": {"<img src=x>": "\x1b" * 500}}
    edit(folder / "canary" / "canary.json", families=families, run_id="<b>" + "x" * 500)
    edit_record(str(run / "records"), "canary", outputs={"reused": True})
    part = section(run, "canary")
    assert "&lt;script&gt;⟨U+202E⟩" in part and "<img" not in part and "<b>" not in part and "\x1b" not in part and "x" * 200 not in part
    edit(folder / "canary" / "canary.json", **{"<script>" + "y" * 900: 1})
    edit(folder / "scanned" / "scan.json", **{"<script>": 1})
    for name in ("canary", "unknown"):
        part = section(run, name)
        assert "Not measured" in part and "<script" not in part and "y" * 300 not in part


def test_norms_beyond_all_sense_are_drawn_at_the_edge(run: Path) -> None:
    log_norms = [-1e300, 1e300, 1.0, 2.0, 3.0, 4.0]
    model = {"log_norms": log_norms, "success": [0.9] * 6, "unreached": [], "statistic": None, "p_value": None}
    write_scan(run / "kfp" / "scanned", 6, candidate=model | {"method": "not-applicable", "flagged": None})
    assert section(run, "unknown").count("<circle") == 13


def test_the_canary_is_told_on_the_terminal_and_in_the_result_once(run: Path) -> None:
    result = write_result(run)
    said = "The canary covers patch, blend. Not covered: warp, sinusoid."
    assert result["canary"] == said and f"canary: {said}" in console._lines(result)
    assert not [line for line in console._lines(result | {"sentence": f"PASS: {said}"}) if line.startswith("canary:")]
    assert not [line for line in console._lines(result | {"canary": None}) if line.startswith("canary:")]
    for checks in (None, "x", [None, []], [{"check": "A", "name": "canary", "sentence": ["x"]}]):
        edit(run / "kfp" / "decision" / "decision.json", checks=checks)
        assert write_result(run)["canary"] is None


def test_dots_stand_side_by_side_and_the_lowest_is_larger() -> None:
    drawn = scatter([("confounder", [0.5, 0.25])], levels=[(0.0, "<1>")], label="x")
    assert re.findall(r'cx="([\d.]+)%" cy="([\d.]+)" r="([\d.]+)"', drawn) == [("25.00", "84.0", "3.5"), ("75.00", "126.0", "6")]
    assert "&lt;1&gt;" in drawn


def test_a_family_that_was_seen_and_kept_is_told_as_not_covered(run: Path) -> None:
    """Found whole, and followed on 200 of 627: a PASS of that family, which the policy does not require, covers it no more."""
    file = run / "kfp" / "canary" / "canary.json"
    content = json.loads(file.read_text())
    (warp,) = (each for each in content["families"] if each["family"] == "warp")
    warp |= {"found": rate(50, 50), "left": rate(200, 627)}
    edit(file, families=content["families"])
    assert "not covered" in rows(section(run, "canary"))[2]
