"""The threat model names tests that exist: a line without one would be a claim."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "threat-model.md").read_text()))
    known = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)}
    assert len(named) > 50 and named - known == set()


def test_every_attack_in_the_threat_model_names_a_test() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.rstrip().endswith("| test |")]
    assert rows and [row for row in rows if not re.search(r"\| `test_[^|]*\|$", row)] == []
