"""The canary: the run's own positive control, trained on a copy of the data into which known triggers were put; never promotable."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.audit import append
from cbd.canary import Plant, plan_canary
from cbd.config import Canary, Params, Poison, canonical_json, check_section
from cbd.dataset import load_samples, read_info, read_manifest
from cbd.files import replacing, sha256_file
from cbd.heads import read_log
from cbd.truth import Truth, read_truth
from components.attempts import code_digest
from components.attestation import attest_canary
from components.poison import poison
from components.records import kfp_component, progress, told_as
from components.suspect_list import suspect_ids
from components.version import version_canary

CANARY = "canary.json"
KEPT = "canaries"
"""Folder of the workspace that keeps every canary's result."""


def canary(dataset: Path, trusted_set: Path, out: Path, *, params: Params, workspace: Path, run_id: str) -> dict[str, Any]:
    """What stage 1 saw of each planted family and what stage 2 left of it, in brief; all of it goes to `out/canary.json`.

    The result is kept in the workspace and named in its log. A result of the same configuration and trusted set that is younger
    than `canary.every` decided runs is used again; with `every: 0` there is none, and `out` stays an empty folder.

    Args:
        dataset: the untrusted data set.
        trusted_set: what the canary's models are measured on.
        out: gets `canary.json`.
        params: the seed and the sections `model`, `confounder`, `deconfounded` and `canary`.
        workspace: with the log, the registry and the checkpoints.
        run_id: of the run that asks.

    Raises:
        DataError: a data set is missing or altered, or the log or a kept result was.
    """
    info = read_info(dataset)
    about = params.model_dump(mode="json", include={"seed", "model", "confounder", "deconfounded", "canary"})
    about |= {"class_names": info.class_names, "trial": info.trial, "code": code_digest()}
    about["trusted_digest"] = read_info(trusted_set).digest
    key = hashlib.sha256(canonical_json(about)).hexdigest()
    kept = None if info.trial else _young_enough(workspace, key, every=params.canary.every)
    reused = kept is not None
    if params.canary.every and not reused:
        named = {"config_sha256": key, "data_digest": info.digest, "run_id": run_id}
        kept = _keep(workspace, named, _train(dataset, trusted_set, params=params, workspace=workspace))
    with replacing(out) as temporary:
        temporary.mkdir()
        if kept is not None:
            (temporary / CANARY).write_bytes(kept.read_bytes())
    return {"reused": reused, "canary_sha256": sha256_file(kept) if kept else None}


def logged(workspace: Path, sha256: str) -> bool:
    """Whether the workspace's log names a canary's result of this SHA-256; raises DataError if the log was altered."""
    return any(entry["event"] == "canary" and entry["data"]["sha256"] == sha256 for entry in read_log(workspace))


def _young_enough(workspace: Path, key: str, *, every: int) -> Path | None:
    """The kept result of the last canary of this configuration, if fewer than `every` runs were decided since."""
    if every < 2:
        return None
    age, last = 0, None
    for entry in read_log(workspace):
        if entry["event"] == "canary" and entry["data"]["config_sha256"] == key:
            age, last = 0, entry["data"]["sha256"]
        age += entry["event"] == "decision" and not entry["data"]["trial"]
    kept = workspace / KEPT / f"{last}.json"
    return kept if last and age < every and kept.is_file() and sha256_file(kept) == last else None


def _keep(workspace: Path, named: dict[str, Any], measured: dict[str, Any]) -> Path:
    """The file with the result, which the log names from now on."""
    content = canonical_json({"schema_version": 1, **named, **measured})
    digest = hashlib.sha256(content).hexdigest()
    kept = workspace / KEPT / f"{digest}.json"
    with replacing(kept) as temporary:
        temporary.write_bytes(content)
    told = {"sha256": digest, **named}
    if not any(entry["event"] == "canary" and entry["data"] == told for entry in read_log(workspace)):  # a step that runs again
        append(workspace, "canary", told)
    return kept


def _train(dataset: Path, trusted_set: Path, *, params: Params, workspace: Path) -> dict[str, Any]:
    """Plants, versions, trains and measures."""
    from components.train_confounder import train_confounder
    from components.train_deconfounded import train_deconfounded

    with tempfile.TemporaryDirectory() as folder, told_as("canary"):
        place, checkpoints = Path(folder), workspace / "checkpoints"
        plants, copy, truths = _plant(dataset, place, params=params)
        version = version_canary(copy, workspace=str(workspace), truths=truths)
        caught = train_confounder(copy, place / "confounder", params=params, checkpoints=checkpoints)
        outputs = {"model": place / "model", "evidence": place / "evidence"}
        train_deconfounded(copy, place / "confounder", params=params, checkpoints=checkpoints, **outputs)
        progress("measure", 0, 1)
        known = [truth for truth in map(read_truth, truths) if truth]
        told = {"canary_digest": version["digest"], "tag": version["tag"], "trusted_digest": read_info(trusted_set).digest}
        told |= {"steps": caught["steps"], "separated": caught["separated"], "num_images": read_info(copy).num_images}
        return told | _measure(place, trusted_set, list(zip(plants, known, strict=True)), params=params)


def _plant(dataset: Path, place: Path, *, params: Params) -> tuple[list[Plant], Path, list[Path]]:
    """The plan, the copy with all of its triggers, and the truth of each."""
    import numpy as np

    info = read_info(dataset)
    labels = np.array(read_manifest(dataset)["label"].to_pylist(), np.int64)
    about = {"num_classes": len(info.class_names), "data_digest": info.digest, "seed": params.seed}
    plants, truths = plan_canary(labels, params.canary, **about), list[Path]()
    for number, plant in enumerate(plants):
        section = Poison(
            attack=plant.attack,  # type: ignore[arg-type]
            trigger=plant.trigger,
            poison_rate=plant.num_images / info.num_images,
            target_label=plant.target_label,
        )
        copy, truth = place / f"copy-{number}", place / f"truth-{number}"
        poison(dataset, copy, truth=truth, params=section, seed=params.seed, before=truths)
        dataset = copy
        truths.append(truth)
    return plants, dataset, truths


def _measure(place: Path, trusted_set: Path, planted: Sequence[tuple[Plant, Truth]], *, params: Params) -> dict[str, Any]:
    """Per family what stage 1 saw and what the deconfounded model does under the trigger; and how many others are suspects."""
    import pyarrow.parquet as pq

    from cbd.attacks import make_attack
    from cbd.evaluate import attack_success, predictions, turned
    from cbd.models import load_model
    from cbd.rates import rate
    from cbd.training import best_device
    from components.train_deconfounded import EVIDENCE

    confounder, model = (load_model(place / name)[0].to(best_device()) for name in ("confounder", "model"))
    samples = load_samples(trusted_set, image_size=params.model.image_size)
    num_classes = len(read_info(trusted_set).class_names)
    before = predictions(model, samples.images)
    evidence = place / "evidence" / EVIDENCE
    suspects = set(suspect_ids(evidence))
    stamped = set().union(*(truth.samples_with("poison", "cover") for _, truth in planted))
    families = []
    for plant, truth in planted:
        attack, marked = make_attack(truth.attack, **truth.trigger), truth.samples_with("poison")
        after = predictions(model, attack.stamp(samples.images))
        left = turned(before, after, samples.labels, num_classes=num_classes)[plant.target_label]
        learned = attack_success(confounder, samples.images, samples.labels, attack=attack, goal=truth.goal, num_classes=num_classes)
        about = {"family": plant.family, "attack": plant.attack, "trigger": plant.trigger, "target": plant.target_label}
        seen = {"found": rate(len(marked & suspects), len(marked)), "learned": learned}
        families.append(about | {"num_poisoned": len(marked)} | seen | {"left": rate(*left)})
    others = [sample for sample in pq.read_table(evidence, columns=["sample_id"])["sample_id"].to_pylist() if sample not in stamped]
    return {"families": families, "false_suspects": rate(sum(sample in suspects for sample in others), len(others))}


@kfp_component
def canary_step(
    records: str,
    workspace: str,
    run_id: str,
    seed: int,
    preset: str,
    model_params: dict,
    training: dict,
    confounder_params: dict,
    deconfounded_params: dict,
    canary_params: dict,
    dataset: dsl.Input[dsl.Dataset],
    trusted_set: dsl.Input[dsl.Dataset],
    canary: dsl.Output[dsl.Artifact],
):
    """Trains the canary and measures what stage 1 saw of it.

    Args:
        records: prefix of the step records.
        workspace: folder of the log, the registry and the checkpoints.
        run_id: the run that asks.
        seed: seed of every generator.
        preset: name of the preset.
        model_params: section `model` of params.yaml.
        training: section of params.yaml.
        confounder_params: section `confounder` of params.yaml.
        deconfounded_params: section `deconfounded` of params.yaml.
        canary_params: section `canary` of params.yaml.
        dataset: the untrusted data set.
        trusted_set: what the canary's models are measured on.
        canary: what was seen.
    """
    from components.canary import canary_recorded

    sections = {"confounder": confounder_params, "deconfounded": deconfounded_params, "training": training}
    about = {"canary": canary_params, "seed": seed, "preset": preset, "model": model_params, "sections": sections}
    canary_recorded(records, (dataset.path, trusted_set.path, canary.path), about, workspace=workspace, run_id=run_id)


def canary_recorded(records: str, places: tuple[str, str, str], about: dict[str, Any], *, workspace: str, run_id: str) -> None:
    """`canary` with the step recorded; `places` are the paths of data set, trusted set and output."""
    from components.records import step
    from components.training import training_params

    dataset, trusted_set, out = (Path(place) for place in places)
    with step(records, "canary") as outputs:
        params = training_params(about["seed"], about["preset"], about["model"], **about["sections"])
        params = params.model_copy(update={"canary": check_section(Canary, about["canary"], name="canary")})
        outputs["paths"] = {"canary": str(out)}
        outputs |= canary(dataset, trusted_set, out, params=params, workspace=Path(workspace), run_id=run_id)
        if outputs["canary_sha256"]:
            used = params.model_dump(mode="json", include={"seed", "canary"})
            outputs["attestation"] = attest_canary(records, out / CANARY, parameters=used, workspace=workspace)
