"""The bill of materials: valid by CycloneDX's own schema, and it names what the model was made of."""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from decided_case import POLICY, make_case

from cbd.attest import digests_in, unseal
from cbd.bundle import read_card
from cbd.chain import BOM
from cbd.dataset import read_info
from cbd.files import sha256_file
from cbd.keys import ensure_key
from components.attestation import made_with
from components.bom import bill
from components.decide import decide_step

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def written(tmp_path: Path, make_evaluation: Make) -> Path:
    """The folder of a run whose decide step wrote one."""
    case = make_case(tmp_path, make_evaluation)
    parts = ("dataset", "trusted_set", "validation", "evaluation", "model")
    named = {name: SimpleNamespace(path=str(getattr(case.subject, name))) for name in parts}
    named |= {"canary": SimpleNamespace(path=str(tmp_path / "none")), "scanned": SimpleNamespace(path=str(case.subject.scan))}
    about = {"records": str(tmp_path / case.run_id / "records"), "workspace": str(tmp_path), "run_id": case.run_id}
    decide_step.python_func(**named, **about, policy=POLICY.model_dump(), decision=SimpleNamespace(path=str(case.decision)))
    return tmp_path / case.run_id


def faults(text: str) -> Any:
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)


def test_it_is_valid_by_the_schema_and_a_broken_one_is_not(written: Path) -> None:
    text = (written / "decision" / BOM).read_text()
    assert faults(text) is None
    found = json.loads(text)
    found["metadata"]["component"]["modelCard"]["modelParameters"]["approach"]["type"] = "guessing"
    assert faults(json.dumps(found)) is not None


def test_that_of_an_image_is_valid_and_names_what_is_installed() -> None:
    done = subprocess.run([sys.executable, "-m", "components.bom"], check=True, capture_output=True, text=True)
    assert faults(done.stdout) is None
    found = {each["name"].lower(): each for each in json.loads(done.stdout)["components"]}
    assert found["torch"]["version"] == importlib.metadata.version("torch") and found["torch"]["scope"] == "required"


def test_it_names_data_code_packages_metrics_and_licences(written: Path) -> None:
    found = json.loads((written / "decision" / BOM).read_text())
    parts = {part["bom-ref"]: part for part in found["components"]}
    model, card = found["metadata"]["component"], read_card(written / "model")
    assert model["hashes"] == [{"alg": "SHA-256", "content": card.weights_sha256}]
    assert parts["dataset"]["hashes"][0]["content"] == read_info(written / "dataset").digest == card.data_digest
    assert (parts["dataset"]["data"][0]["classification"], parts["trusted set"]["data"][0]["classification"]) == ("untrusted", "trusted")
    assert parts["cbd"]["hashes"][0]["content"] == made_with()["code"] and parts["cbd"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert parts["requirements.lock"]["hashes"][0]["content"] == made_with()["requirements.lock"]
    torch = parts["pkg:pypi/torch@2.13.0"]
    assert torch["scope"] == "required" and torch["licenses"]
    pinned = [line for line in Path("requirements.lock").read_text().splitlines() if "==" in line and not line.startswith(" ")]
    assert len([ref for ref in parts if ref.startswith("pkg:pypi/")]) == len(pinned) > 200
    metrics = {(row["type"], row["slice"]): row for row in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    evaluation = json.loads((written / "evaluation" / "evaluation.json").read_text())
    assert {of for kind, of in metrics if kind == "attack success rate"} == set(evaluation["attack_success_rate"])
    assert metrics["clean accuracy", "trusted set"]["value"] == f"{evaluation['clean_accuracy']['rate']:.6f}"
    assert set(found["dependencies"][0]["dependsOn"]) == {"cbd", "dataset", "trusted set"}


def test_the_verdicts_attestation_names_it(written: Path) -> None:
    data = (written / "attestations" / "decide.json").read_bytes()
    statement = unseal(data, [ensure_key(written.parent).public_key()], told="x")
    assert digests_in(statement["subject"])[BOM] == sha256_file(written / "decision" / BOM)


def test_the_same_inputs_give_the_same_bill_and_an_unmeasured_rate_is_left_out(written: Path) -> None:
    decision = json.loads((written / "decision" / "decision.json").read_text())
    evaluation = json.loads((written / "evaluation" / "evaluation.json").read_text())
    sets = {"dataset": read_info(written / "dataset"), "trusted set": read_info(written / "trusted_set")}
    about = {"decision": decision, "made_with": made_with(), "lock": Path("requirements.lock")}
    first, again = (bill(read_card(written / "model"), sets, evaluation=evaluation, **about) for _ in range(2))
    assert first == again == json.loads((written / "decision" / BOM).read_text())
    evaluation["attack_success_rate"] = {"badnets": {"k": 0, "n": 0, "rate": None, "low": None, "high": None}}
    found = bill(read_card(written / "model"), sets, evaluation=evaluation, **about | {"lock": Path("none")})
    metrics = found["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [row["type"] for row in metrics] == ["clean accuracy"]
    assert not any(part["bom-ref"].startswith("pkg:") for part in found["components"]) and faults(json.dumps(found)) is None
