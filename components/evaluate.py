"""Sixth step: the model is attacked and measured on the trusted set."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.attacks import make_attack
from cbd.bundle import CARD, bundle_digest
from cbd.config import Gate
from cbd.dataset import load_samples, read_info, read_manifest
from cbd.errors import DataError
from cbd.files import replacing, write_json
from cbd.rates import rate
from cbd.truth import Truth, read_truth
from components.controls import find_controls, loaded, told
from components.records import kfp_component, progress
from components.train_deconfounded import EVIDENCE, read_separation

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Compared:
    """What a model is measured beside; what is None is not measured."""

    confounder: Path | None = None
    evidence: Path | None = None
    dataset: Path | None = None
    """What the model was trained on; with the evidence it tells of whom the suspects are."""
    undefended: Path | None = None
    champion: tuple[Path, str] | None = None
    """Its bundle and its version."""
    truth: Truth | None = field(default=None)
    """Where the poison is known, for trials and demos."""
    controls: Sequence[Path] = ()
    """Bundles of clean controls, as `components.controls.find_controls` gives them."""


def evaluate(model: Path, trusted_set: Path, out: Path, *, policy: Gate, compared: Compared, seed: int) -> dict[str, Any]:
    """The measurements in brief; all of them go to `out/evaluation.json`.

    Args:
        model: bundle of the candidate.
        trusted_set: data set that does not come from the supplier, with the model's classes.
        out: gets `evaluation.json`.
        policy: tells which upper bound needs a comparison with harmless triggers.
        compared: confounder, evidence, undefended model, champion and truth, as far as there are any.
        seed: of the harmless triggers.

    Raises:
        DataError: a bundle or data set is missing or altered, or the trusted set has other classes than the model.
    """
    from cbd import evaluate as measure
    from cbd.models import load_model
    from cbd.training import best_device

    network, card = load_model(model)
    network.to(best_device())
    info = read_info(trusted_set)
    if info.class_names != card.class_names:
        raise DataError(
            f"{trusted_set}: classes {list(info.class_names)}, expected the model's {list(card.class_names)}; give its trusted set"
        )
    samples = load_samples(trusted_set, image_size=card.image_size)
    images, labels, num_classes = samples.images, samples.labels, len(card.class_names)
    progress("evaluate", 1, 3, "clean accuracy")
    predicted = measure.predictions(network, images)
    found: dict[str, Any] = {
        "schema_version": 1,
        "model_digest": bundle_digest(model),
        "data_digest": card.data_digest,
        "trusted_digest": info.digest,
        "num_images": len(labels),
        "class_names": list(card.class_names),
        "clean_accuracy": measure.clean_accuracy(predicted, labels),
        "per_class": [_class_accuracy(name, predicted[labels == label] == label) for label, name in enumerate(card.class_names)],
        "champion": _against_champion(compared.champion, predicted, samples, card.class_names),
    }
    progress("evaluate", 2, 3, "known triggers")
    about = {"limit": policy.max_excess_asr, "null_members": policy.null_members, "seed": seed}
    controls = loaded(compared.controls, trusted_set)
    found["battery"] = measure.run_battery(network, images, labels, num_classes=num_classes, controls=controls, **about)
    found["controls"] = told(compared.controls) if controls else None
    names = ("k", "n", "rate", "low", "high")
    found["attack_success_rate"] = {row["trigger"]: {name: row[name] for name in names} for row in found["battery"]}
    progress("evaluate", 3, 3, "confounder and comparisons")
    found |= _with_truth(model, compared, samples, found["attack_success_rate"])
    found["samples"] = count_suspects(compared.evidence, compared.dataset) if compared.evidence and compared.dataset else None
    with replacing(out) as temporary:
        temporary.mkdir()
        write_json(temporary / EVALUATION, found)
    worst = max(found["battery"], key=lambda row: row["rate"] or 0.0)
    return {
        "clean_accuracy": found["clean_accuracy"],
        "worst_trigger": worst["trigger"],
        "attack_success_rate": found["attack_success_rate"],
    }


def count_suspects(evidence: Path, dataset: Path) -> dict[str, Any]:
    """Suspects among the training images, in all, by class and supplier; on how many the model was trained, how many it follows."""
    import numpy as np
    import pyarrow.parquet as pq

    info, manifest = read_info(dataset), read_manifest(dataset)
    columns = ["sample_id", "label", "predicted", "preference", "sample_weight", "suspect"]
    table = {name: column.to_numpy() for name, column in zip(columns, pq.read_table(evidence / EVIDENCE, columns=columns), strict=True)}
    if table["sample_id"].tolist() != manifest["sample_id"].to_pylist():
        raise DataError(f"{evidence / EVIDENCE}: is about other images than {dataset}; train the model again")
    suspect, sources = table["suspect"], np.array(manifest["source"].to_pylist(), object)
    doubtful = suspect & (table["preference"] > 0.5)

    def subset(name: str, of: Any) -> dict[str, Any]:
        return {"name": name, "k": int(suspect[of].sum()), "n": int(of.sum())}

    return {
        "data_digest": info.digest,
        "num_images": len(suspect),
        "suspects": int(suspect.sum()),
        "kept": rate(int((suspect & (table["sample_weight"] > 0.5)).sum()), int(suspect.sum())),
        "followed": rate(int((doubtful & (table["predicted"] == table["label"])).sum()), int(doubtful.sum())),
        "per_class": [subset(name, table["label"] == label) for label, name in enumerate(info.class_names)],
        "per_source": [subset(name, sources == name) for name in sorted(set(sources))],
    }


def _class_accuracy(name: str, right: Any) -> dict[str, Any]:
    k, n = int(right.sum()), len(right)
    return {"class_name": name, "k": k, "n": n, "rate": k / n if n else None}


def _against_champion(
    champion: tuple[Path, str] | None, predicted: Any, samples: Any, class_names: tuple[str, ...]
) -> dict[str, Any] | None:
    """The champion on the same images; None without one."""
    if champion is None:
        return None
    from cbd.evaluate import compare, predictions
    from cbd.models import load_model

    network, card = load_model(champion[0])
    if card.class_names != class_names or samples.images.shape[-1] != card.image_size:
        raise DataError(f"champion version {champion[1]}: other classes or image size than the candidate; register under another --name")
    theirs = predictions(network, samples.images)
    return {"version": champion[1], "digest": bundle_digest(champion[0])} | compare(predicted, theirs, samples.labels, class_names)


def _with_truth(model: Path, compared: Compared, samples: Any, success: dict[str, Any]) -> dict[str, Any]:
    """What is said of the confounder, the detection and the baseline; `success` gets the attack of the truth under its own name."""
    truth = compared.truth
    if truth is not None and truth.known_trigger:
        success[truth.attack] = _attacked(model, samples, truth)
    stage_one = read_separation(compared.confounder) if compared.confounder else {"steps": 0, "separated": None, "gap": None}
    caught = _attacked(compared.confounder, samples, truth) if compared.confounder and truth and truth.known_trigger else None
    return {
        "confounder": {**{name: stage_one[name] for name in ("steps", "separated", "gap")}, "asr": caught},
        "detection": detected(compared.evidence, truth) if compared.evidence and truth else None,
        "baseline": _baseline(compared.undefended, samples, truth) if compared.undefended else None,
    }


def _attacked(bundle: Path, samples: Any, truth: Truth) -> Any:
    from cbd.evaluate import attack_success
    from cbd.models import load_model
    from cbd.training import best_device

    network, card = load_model(bundle)
    attack, num_classes = make_attack(truth.attack, **truth.trigger), len(card.class_names)
    network.to(best_device())
    return attack_success(network, samples.images, samples.labels, attack=attack, goal=truth.goal, num_classes=num_classes)


def _baseline(undefended: Path, samples: Any, truth: Truth | None) -> dict[str, Any]:
    from cbd.evaluate import clean_accuracy, predictions
    from cbd.models import load_model
    from cbd.training import best_device

    network, _ = load_model(undefended)
    accuracy = clean_accuracy(predictions(network.to(best_device()), samples.images), samples.labels)
    return {"ca": accuracy, "asr": _attacked(undefended, samples, truth) if truth and truth.known_trigger else None}


def detected(evidence: Path, *truths: Truth) -> dict[str, float] | None:
    """How well the ranks in the evidence table tell poison, by any of the truths, from the rest (see `cbd.evidence.detection`)."""
    import numpy as np
    import pyarrow.parquet as pq

    from cbd.evidence import detection

    table = pq.read_table(evidence / EVIDENCE, columns=["sample_id", "rank"])
    marked = set().union(*(truth.samples_with("poison") for truth in truths))
    poisoned = np.array([sample in marked for sample in table["sample_id"].to_pylist()])
    return detection(-table["rank"].to_numpy().astype(np.float64), poisoned)


@kfp_component
def evaluate_step(
    records: str,
    workspace: str,
    run_id: str,
    name: str,
    seed: int,
    gate: dict,
    dataset: dsl.Input[dsl.Dataset],
    trusted_set: dsl.Input[dsl.Dataset],
    truth: dsl.Input[dsl.Artifact],
    confounder: dsl.Input[dsl.Model],
    model: dsl.Input[dsl.Model],
    evidence: dsl.Input[dsl.Artifact],
    undefended: dsl.Input[dsl.Model],
    evaluation: dsl.Output[dsl.Artifact],
):
    """Attacks and measures the model on the trusted set.

    Args:
        records: prefix of the step records.
        workspace: folder in which the champion is looked up.
        run_id: names the run in the tracking server.
        name: name of the registered model.
        seed: seed of the harmless triggers.
        gate: section `gate` of params.yaml.
        dataset: the untrusted data set.
        trusted_set: the trusted set.
        truth: what is known about the poison.
        confounder: what stage 1 left behind.
        model: the candidate.
        evidence: the table of all samples.
        undefended: the undefended model, or nothing.
        evaluation: all measurements.
    """
    from pathlib import Path

    from components.attestation import attest_evaluation
    from components.evaluate import EVALUATION, evaluate_run
    from components.records import step

    with step(records, "evaluate") as outputs:
        outputs["paths"] = {"evaluation": evaluation.path}
        inputs = {"dataset": dataset, "trusted_set": trusted_set, "truth": truth, "confounder": confounder, "model": model}
        paths = {key: Path(artifact.path) for key, artifact in {**inputs, "evidence": evidence, "undefended": undefended}.items()}
        outputs |= evaluate_run(paths, Path(evaluation.path), policy=gate, seed=seed, workspace=workspace, name=name)
        about = {"model": paths["model"], "trusted_set": paths["trusted_set"], "policy": gate, "workspace": workspace}
        outputs["attestation"] = attest_evaluation(records, Path(evaluation.path) / EVALUATION, **about)


def evaluate_run(paths: dict[str, Path], out: Path, *, policy: dict[str, Any], seed: int, workspace: str, name: str) -> dict[str, Any]:
    """`evaluate` with the artifacts of a pipeline run, the champion of its workspace, and the undefended model if one was trained."""
    from cbd.config import check_section
    from components.tracking import champion_bundle

    champion = champion_bundle(Path(workspace), name, read_info(paths["trusted_set"]).class_names)
    undefended = paths["undefended"] if (paths["undefended"] / CARD).is_file() else None
    checked = check_section(Gate, policy, name="gate")
    with tempfile.TemporaryDirectory() as folder:
        about = {name: paths[name] for name in ("model", "trusted_set")}
        found = find_controls(Path(workspace), Path(folder), **about, min_images=checked.min_images)
        given = {name: paths[name] for name in ("confounder", "evidence", "dataset")}
        compared = Compared(**given, undefended=undefended, champion=champion, truth=read_truth(paths["truth"]), controls=found.bundles)
        outputs = evaluate(paths["model"], paths["trusted_set"], out, policy=checked, compared=compared, seed=seed)
    return outputs | {"controls": {"used": len(found.bundles), "unused": found.unused}}
