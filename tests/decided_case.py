"""A small finished training to decide on: real data sets, a real bundle and an evaluation about exactly these."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harmless_scan import SCAN
from PIL import Image
from safetensors.numpy import save_file

from cbd.bundle import CARD, WEIGHTS, BundleCard, bundle_digest
from cbd.config import Gate
from cbd.dataset import make_row, to_batches, write_dataset
from cbd.files import sha256_file, write_json
from components.decide import Subject, decide

CLASSES = ("ant", "bee", "cat", "dog")
POLICY = Gate(min_clean_accuracy=0.9)
VALID = {"passed": True, "critical": [], "warnings": [], "checks": []}


@dataclass(frozen=True, slots=True)
class Case:
    """The artifacts of one run, in one workspace."""

    workspace: Path
    run_id: str
    subject: Subject

    @property
    def bundle(self) -> Path:
        assert self.subject.model is not None
        return self.subject.model

    @property
    def decision(self) -> Path:
        return self.workspace / self.run_id / "decision"

    def decide(self) -> dict[str, Any]:
        return decide(self.subject, self.decision, policy=POLICY, workspace=self.workspace, run_id=self.run_id)


def make_case(
    workspace: Path,
    make_evaluation: Callable[..., dict[str, Any]],
    *,
    run_id: str = "run-1",
    kind: str = "deconfounded",
    trial: bool = False,
    **changes: Any,
) -> Case:
    """A case under `<workspace>/<run_id>`; `changes` go to the evaluation, `weight` makes another model, `per_class` another data set."""
    root, weight = workspace / run_id, changes.pop("weight", 1.0)
    data = make_dataset(root / "dataset", changes.pop("per_class", 2), trial=trial)
    trusted = make_dataset(root / "trusted_set", 1)
    bundle = make_bundle(root / "model", data, kind=kind, trial=trial, weight=weight)
    digests = {"model_digest": bundle_digest(bundle), "data_digest": data, "trusted_digest": trusted}
    write_json(root / "evaluation" / "evaluation.json", make_evaluation(**{**digests, **changes}))
    write_json(root / "validation" / "validation.json", {**VALID, "data_digest": data, "trusted_digest": trusted})
    write_json(root / "scan" / "scan.json", {**SCAN, "model_digest": digests["model_digest"], "trusted_digest": trusted})
    names = ("dataset", "trusted_set", "validation", "evaluation", "model")
    return Case(workspace, run_id, Subject(*(root / name for name in names), scan=root / "scan"))


def make_dataset(folder: Path, per_class: int, *, trial: bool = False) -> str:
    """The digest of a data set of tiny images."""
    rows = []
    for label, name in enumerate(CLASSES):
        for index in range(per_class):
            buffer = io.BytesIO()
            Image.fromarray(np.full((4, 4, 3), 40 * label + 10 * index + per_class, np.uint8)).save(buffer, "PNG")
            rows.append(make_row(buffer.getvalue(), label=label, original_path=f"{name}/{index}.png", source="test"))
    return write_dataset(folder, to_batches(rows), class_names=CLASSES, supplier="test", trial=trial).digest


def make_bundle(folder: Path, data_digest: str, *, kind: str = "deconfounded", trial: bool = False, weight: float = 1.0) -> Path:
    """A bundle of one weight."""
    folder.mkdir(parents=True)
    save_file({"weight": np.array([weight], np.float32)}, folder / WEIGHTS)
    values: dict[str, Any] = {
        "kind": kind,
        "architecture": "wrn-16-1",
        "class_names": CLASSES,
        "image_size": 32,
        "data_digest": data_digest,
    }
    card = BundleCard(**values, params={}, seed=0, trial=trial, weights_sha256=sha256_file(folder / WEIGHTS))
    write_json(folder / CARD, card.model_dump(mode="json"))
    return folder


def change_json(path: Path, **values: Any) -> None:
    """Overwrites keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def swap(target: Path, source: Path) -> None:
    """Puts a copy of the folder `source` in place of `target`."""
    shutil.rmtree(target)
    shutil.copytree(source, target)


def record(case: Case) -> None:
    """What the steps of a run leave under `<workspace>/runs/<run_id>/records`, as far as the case has it."""
    parts = [("ingest", "dataset"), ("ingest", "trusted_set"), ("validate", "validation"), ("evaluate", "evaluation")]
    parts += [("train_deconfounded", "model"), ("decide", "decision")]
    steps: dict[str, dict[str, str]] = {}
    for step, artifact in parts:
        steps.setdefault(step, {})[artifact] = str(case.workspace / case.run_id / artifact)
    steps["scan"] = {"scanned": str(case.workspace / case.run_id / "scan")}
    verdict = json.loads((case.decision / "decision.json").read_text())["verdict"]
    for step, paths in steps.items():
        outputs = {"paths": paths} | ({"verdict": verdict} if step == "decide" else {})
        write_json(case.workspace / "runs" / case.run_id / "records" / f"{step}.json", {"status": "succeeded", "outputs": outputs})
