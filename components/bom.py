"""The bill of materials of a model, with a model card, and that of an image: CycloneDX 1.6 (ECMA-424) in JSON.

Written by hand, since cyclonedx-python-lib knows no model card; its validator checks the result in the tests.
"""

import importlib.metadata
import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbd.bundle import BundleCard
from cbd.dataset import DatasetInfo

LICENCE = "Apache-2.0"
"""Of cbd itself, as in pyproject.toml."""
MODEL, CODE, LOCK = "model", "cbd", "requirements.lock"
FORMAT = {"$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"[ -~]{1,200}")

Part = dict[str, Any]


def bill(
    card: BundleCard,
    sets: Mapping[str, DatasetInfo],
    *,
    evaluation: Mapping[str, Any],
    decision: Mapping[str, Any],
    made_with: Mapping[str, Any],
    lock: Path,
) -> dict[str, Any]:
    """The bill of materials of a model that was decided on; the same inputs in the same environment give the same bytes.

    Args:
        card: the model bundle's.
        sets: the data set that it was trained on as `dataset`, and the `trusted set` that it was measured on.
        evaluation: content of `evaluation.json`.
        decision: content of `decision.json`.
        made_with: digests of code, commit, image and lock, see `components.attestation.made_with`.
        lock: `requirements.lock`; no packages are listed where it is missing.
    """
    packages = [_package(name, version) for name, version in _PINNED.findall(lock.read_text() if lock.is_file() else "")]
    data = [_dataset(name, info) for name, info in sets.items()]
    code = _code(made_with)
    files = [_file(LOCK, str(made_with[LOCK]))] if made_with.get(LOCK) else []
    model, digest = _model(card, sets, evaluation, decision), str(decision["digests"]["model"])
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:cbd:run:{decision['run_id']}:model:{digest}")
    depends = {
        MODEL: [CODE, *(part["bom-ref"] for part in data)],
        CODE: [part["bom-ref"] for part in (*files, *packages)],
    }
    return {
        **FORMAT,
        "serialNumber": f"urn:uuid:{serial}",
        "metadata": {
            "timestamp": decision["created"],
            "lifecycles": [{"phase": "build"}],
            "component": model,
            "properties": [_property("run_id", decision["run_id"]), _property("verdict", decision["verdict"])],
        },
        "components": [*data, code, *files, *packages],
        "dependencies": [{"ref": ref, "dependsOn": sorted(set(on))} for ref, on in depends.items()],
    }


def installed() -> dict[str, Any]:
    """The bill of materials of an image: every package that is installed here; `python -m components.bom` prints it."""
    found = sorted({(each.name, each.version) for each in importlib.metadata.distributions() if each.name != CODE})
    packages = [_package(name, version) for name, version in found]
    own = {"type": "application", "bom-ref": CODE, "name": CODE, "version": importlib.metadata.version(CODE)}
    return {
        **FORMAT,
        "metadata": {"lifecycles": [{"phase": "build"}], "component": own | {"licenses": [{"license": {"id": LICENCE}}]}},
        "components": packages,
        "dependencies": [{"ref": CODE, "dependsOn": [part["bom-ref"] for part in packages]}],
    }


def _model(card: BundleCard, sets: Mapping[str, DatasetInfo], evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> Part:
    side = card.image_size
    parameters = {
        "approach": {"type": "supervised"},
        "task": "image classification",
        "architectureFamily": "convolutional neural network",
        "modelArchitecture": card.architecture,
        "datasets": [{"ref": name} for name in sets],
        "inputs": [{"format": f"uint8 RGB [N, 3, {side}, {side}]"}],
        "outputs": [{"format": f"float logits [N, {len(card.class_names)}], float embedding"}],
    }
    limits = ["Triggers that neither the battery, the scan nor stage 1 sees were not looked for.", *_tell(decision["checks"])]
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": f"{card.kind} {card.architecture}",
        "version": str(decision["digests"]["model"]),
        "hashes": [{"alg": "SHA-256", "content": card.weights_sha256}],
        "licenses": [{"license": {"name": "not declared: it follows from the data's"}}],
        "modelCard": {
            "modelParameters": parameters,
            "quantitativeAnalysis": {"performanceMetrics": _metrics(evaluation)},
            "considerations": {"technicalLimitations": limits},
        },
        "properties": [_property("bundle_digest", str(decision["digests"]["model"])), _property("trial", str(card.trial).lower())],
    }


def _metrics(evaluation: Mapping[str, Any]) -> list[Part]:
    """Clean accuracy, and the attack success rate of each attack that was measured."""
    measured = [("clean accuracy", "trusted set", evaluation["clean_accuracy"])]
    measured += [("attack success rate", name, rate) for name, rate in evaluation["attack_success_rate"].items()]
    return [_metric(*each) for each in measured if each[2] and each[2]["rate"] is not None]


def _metric(kind: str, of: str, rate: Mapping[str, Any]) -> Part:
    bounds = {"lowerBound": f"{rate['low']:.6f}", "upperBound": f"{rate['high']:.6f}"}
    return {"type": kind, "slice": of, "value": f"{rate['rate']:.6f}", "confidenceInterval": bounds}


def _tell(checks: list[Mapping[str, Any]]) -> list[str]:
    return [str(check["sentence"]) for check in checks if check["result"] != "PASS"]


def _dataset(name: str, info: DatasetInfo) -> Part:
    trusted = name == "trusted set"
    told = f"{info.num_images} images of {len(info.class_names)} classes from {info.supplier}"
    return {
        "type": "data",
        "bom-ref": name,
        "name": name,
        "version": info.digest,
        "description": told,
        "hashes": [{"alg": "SHA-256", "content": info.digest}],
        "licenses": [{"license": {"name": "not declared by the supplier"}}],
        "data": [{"type": "dataset", "name": name, "classification": "trusted" if trusted else "untrusted", "description": told}],
        "properties": [_property("trial", str(info.trial).lower())],
    }


def _code(made_with: Mapping[str, Any]) -> Part:
    known = [(name, made_with.get(name)) for name in ("commit", "image")]
    return {
        "type": "application",
        "bom-ref": CODE,
        "name": CODE,
        "version": importlib.metadata.version("cbd"),
        "hashes": [{"alg": "SHA-256", "content": str(made_with["code"])}],
        "licenses": [{"license": {"id": LICENCE}}],
        "properties": [_property(name, str(value)) for name, value in known if value],
    }


def _file(name: str, digest: str) -> Part:
    return {"type": "file", "bom-ref": name, "name": name, "hashes": [{"alg": "SHA-256", "content": digest}]}


def _package(name: str, version: str) -> Part:
    """One line of the lock; `scope` is optional for what is not installed here in this version."""
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}"
    part: Part = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl, "scope": "optional"}
    try:
        about = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return part
    if about["Version"] != version:
        return part
    licence = _licence(about.get("License-Expression"), about.get("License"), about.get_all("Classifier") or [])
    return part | {"scope": "required"} | ({"licenses": [licence]} if licence else {})


def _licence(expression: str | None, text: str | None, classifiers: list[str]) -> Part | None:
    """What a package says of its licence: an SPDX expression, a name, or nothing that could be told."""
    if expression:
        return {"expression": expression}
    named = [each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License :: ")]
    name = next((each for each in (*named, (text or "").strip()) if _ATTRIBUTE.fullmatch(each)), None)
    return {"license": {"name": name}} if name else None


def _property(name: str, value: str) -> Part:
    return {"name": f"cbd:{name}", "value": value}


if __name__ == "__main__":
    print(json.dumps(installed(), indent=1))
