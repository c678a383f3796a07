"""The control map: the page is made from the file, and every file that it names is in an export."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from exported_run import run_case

from components.export import export_run

ROOT = Path(__file__).parents[1]
VALUES = yaml.safe_load((ROOT / "docs" / "control-map.yaml").read_text())
CONTROLS = [control for framework in VALUES["frameworks"] for control in framework["controls"]]
Make = Callable[..., dict[str, Any]]


def test_the_page_is_made_from_the_file() -> None:
    spec = importlib.util.spec_from_file_location("control_map", ROOT / "benchmarks" / "control_map.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "control-map.md").read_text() == module.render(VALUES), "run benchmarks/control_map.py"


def test_every_file_that_it_names_is_in_an_export(tmp_path: Path, make_evaluation: Make, make_canary: Make) -> None:
    case = run_case(tmp_path / "workspace", make_evaluation, canary=make_canary())
    export_run(case.workspace / "runs" / case.run_id, case.workspace, tmp_path / "export")
    named = {name for control in CONTROLS for name in control["files"]}
    assert named and {name for name in named if not (tmp_path / "export" / name).is_file()} == set()


def test_it_says_what_it_is_and_what_was_not_read() -> None:
    page = (ROOT / "docs" / "control-map.md").read_text()
    assert "not legal advice" in page and "None of the texts below was read again" in page


def test_it_has_the_controls_that_were_asked_for_each_with_a_question_and_a_gap() -> None:
    asked = ("AML.T0020", "AML.T0018.000", "AML.T0043.004", "AML.T0010.002", "AML.M0007", "AML.M0014", "AML.M0023", "AML.M0025")
    asked += ("Article 10", "Article 12", "Article 15")
    ids = [control["id"] for control in CONTROLS]
    assert set(asked) <= set(ids) and len(ids) == len(set(ids))
    assert all(set(control) == {"id", "title", "question", "files", "gap"} and all(control.values()) for control in CONTROLS)
