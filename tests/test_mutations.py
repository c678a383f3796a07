"""Breaks of the gate and of what it is told, each of which must turn a test red: a test that no break turns red tests nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
GATE, EVIDENCE, MEASURES = "test_gate.py", "test_gate_evidence.py", "test_evaluate.py"
FILES = ("conftest.py", "harmless_scan.py", "delivery_files.py", GATE, EVIDENCE, MEASURES)


class Break(NamedTuple):
    """One change of one source file, and the test file that must notice it."""

    file: str
    old: str
    new: str
    noticed_by: str


def skipped(name: str) -> tuple[str, str]:
    """A check that says what it makes of a missing input, and one that says nothing."""
    asked = f"    if {name} is None:\n"
    return asked, f"{asked}        return []\n    if not {name}:\n"


BREAKS = {
    "the candidate is compared with itself": Break(
        "components/evaluate.py", "theirs = predictions(network, samples.images)", "theirs = predicted", MEASURES
    ),
    "the lower bound of a trigger's success counts": Break(
        "cbd/gate/known.py", "highs = [high_of(bound) for bound in bounds]", 'highs = [bound["low"] or 0.0 for bound in bounds]', GATE
    ),
    "the lower bound tells whether harmless triggers are measured": Break(
        "cbd/evaluate.py", 'confidence=NEEDLESS)["high"]', 'confidence=NEEDLESS)["low"]', MEASURES
    ),
    "the lower bound of what the canary's model kept counts": Break(
        "cbd/gate/canary.py", "return high_of(rate(planted.left.k,", "return low_of(rate(planted.left.k,", EVIDENCE
    ),
    "suspects that the model was trained on are let through": Break(
        "cbd/gate/samples.py", '(bound["rate"] or 0.0) > policy.max_followed', "False", EVIDENCE
    ),
    "the lower bound of followed suspects counts": Break(
        "cbd/gate/samples.py", "if high_of(bound) <= limit or", "if low_of(bound) <= limit or", EVIDENCE
    ),
    "images of the target class count as turned": Break(
        "cbd/evaluate.py", "eligible = (labels != target) & (before != target)", "eligible = before != target", MEASURES
    ),
    "images called the target untriggered count as turned": Break(
        "cbd/evaluate.py", "eligible = (labels != target) & (before != target)", "eligible = labels != target", MEASURES
    ),
    "images of the target class count as victims": Break(
        "cbd/attacks/poisoning.py", "others = labels != self.wanted(labels, num_classes=num_classes)", "others = labels >= 0", MEASURES
    ),
    "missing evidence on the samples is skipped": Break("cbd/gate/samples.py", *skipped("samples"), EVIDENCE),
    "a missing scan is skipped": Break("cbd/gate/unknown.py", *skipped("scan"), GATE),
    "a missing canary counts as one that sees": Break(
        "cbd/gate/__init__.py", 'assayed=told is not None and worst(seeing) != "INVALID"', "assayed=True", GATE
    ),
    "a missing family of the canary is skipped": Break(
        "cbd/gate/canary.py", "    if missing:\n", "    if missing and not families:\n", EVIDENCE
    ),
    "missing triggers are skipped": Break("cbd/gate/known.py", "if missing > 0:", "if missing > BATTERY_SIZE:", GATE),
    "a missing null excuses everything": Break("cbd/gate/known.py", "return policy.block_excess_asr", "return 1.0", GATE),
    "a missing evaluation passes": Break(
        "cbd/gate/__init__.py", '"PASS" if passed and evaluated else "BLOCK"', '"PASS" if passed else "BLOCK"', GATE
    ),
    "the limit is that of a block": Break(
        "cbd/gate/known.py", "limit = policy.max_excess_asr if", "limit = policy.block_excess_asr if", GATE
    ),
    "the limit of a block is the limit": Break("cbd/gate/known.py", "return policy.block_excess_asr", "return policy.max_excess_asr", GATE),
    "the margin of a block is that of the limit": Break(
        "cbd/gate/known.py", "trigger.null + policy.block_margin", "trigger.null + policy.null_margin", GATE
    ),
    "the floor of accuracy is another": Break(
        "cbd/gate/utility.py", 'bound["rate"] >= policy.min_clean_accuracy', 'bound["rate"] >= 1 - policy.min_clean_accuracy', GATE
    ),
}


def copy(folder: Path) -> Path:
    """A folder with the packages and the tests that must notice."""
    for package in ("cbd", "components"):
        shutil.copytree(ROOT / package, folder / package)
    (folder / "tests").mkdir()
    for name in FILES:
        shutil.copyfile(ROOT / "tests" / name, folder / "tests" / name)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    return folder


def run(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest over some of the copied test files, up to the first failure; without plugins, which take longer to load than the tests run."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", "not every_attack", *(f"tests/{name}" for name in tests)]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_the_unchanged_copy_passes(tmp_path: Path) -> None:
    told = run(copy(tmp_path), GATE, EVIDENCE, MEASURES)
    assert told.returncode == 0, told.stdout[-2000:]


@pytest.mark.parametrize("name", BREAKS)
def test_a_break_turns_a_test_red(tmp_path: Path, name: str) -> None:
    change, folder = BREAKS[name], copy(tmp_path)
    source = (folder / change.file).read_text()
    assert source.count(change.old) == 1, f"{change.file} holds {change.old!r} {source.count(change.old)} times: adapt this break"
    (folder / change.file).write_text(source.replace(change.old, change.new))
    told = run(folder, change.noticed_by)
    assert told.returncode == 1, f"no test of {change.noticed_by} noticed (exit code {told.returncode}): {told.stdout[-1000:]}"
