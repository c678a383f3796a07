"""What the training steps share: the data set on the device, progress and live curves, what names a training."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cbd.bundle import BundleCard, Kind
from cbd.config import Confounder, Deconfounded, Gate, Model, Params, Training, canonical_json, check_section
from cbd.dataset import DatasetInfo, load_samples, read_info
from components.records import progress

if TYPE_CHECKING:
    from torch import Tensor

    from cbd.training import OnEpoch
    from components.tracking import LiveCurves


class Loaded(NamedTuple):
    """A data set on the device to train on."""

    images: "Tensor"
    """uint8 [N, 3, S, S]"""
    labels: "Tensor"
    """int64 [N]"""
    sample_ids: list[str]
    info: DatasetInfo


def load(dataset: Path, params: Params) -> Loaded:
    """The verified data set, resident on the best device; raises DataError if it is missing or altered."""
    import torch

    from cbd.training import best_device

    samples, device = load_samples(dataset, image_size=params.model.image_size), best_device()
    return Loaded(
        torch.from_numpy(samples.images).to(device), torch.from_numpy(samples.labels).to(device), samples.sample_ids, read_info(dataset)
    )


def training_params(seed: int, preset: str, model: dict[str, Any], **sections: dict[str, Any]) -> Params:
    """The sections that a training step was given, checked again, as `Params` (its policy is a placeholder: no training reads one)."""
    kinds = {"confounder": Confounder, "deconfounded": Deconfounded, "training": Training}
    checked: dict[str, Any] = {name: check_section(kinds[name], values, name=name) for name, values in sections.items()}
    return Params.model_validate(
        {"seed": seed, "preset": preset, "model": check_section(Model, model, name="model"), "gate": Gate(min_clean_accuracy=0), **checked}
    )


def checkpoint_folder(checkpoints: Path, info: DatasetInfo, params: Params, *sections: str) -> Path:
    """Where a training of this data, with the seed, `model` and these sections, leaves its state and finds it again."""
    about = {"data": info.digest, "params": params.model_dump(mode="json", include={"seed", "model", *sections})}
    return checkpoints / hashlib.sha256(canonical_json(about)).hexdigest()[:32]


def card_of(kind: Kind, info: DatasetInfo, params: Params) -> BundleCard:
    """The card of a model trained on this data, but for the digest of its weights."""
    return BundleCard(
        kind=kind,
        architecture=params.model.architecture,
        class_names=info.class_names,
        image_size=params.model.image_size,
        data_digest=info.digest,
        params=params.model_dump(mode="json", include={"preset", "model", "confounder", "deconfounded"}),
        seed=params.seed,
        trial=info.trial,
        weights_sha256="",
    )


def teller(step: str, curves: "LiveCurves | None" = None, *, what: str = "") -> "OnEpoch":
    """A callback that prints progress after each epoch and logs its measurements to the live curves."""

    def tell(done: int, total: int, measures: dict[str, float]) -> None:
        shown = " ".join(f"{name} {value:.3f}" for name, value in measures.items() if name not in ("step", "epoch"))
        progress(step, done, total, f"epoch {what} {shown}".replace("  ", " "))
        if curves is not None:
            curves.log(done, {(f"{what}." if what else "") + name: value for name, value in measures.items()})

    return tell


@contextmanager
def live_curves(workspace: str, run_id: str, step: str, params: Params | None = None, *, section: str = "") -> Iterator["LiveCurves"]:
    """Curves of a step in the run's MLflow record, under `<step>.`, with the parameters it was given: `section` beside what all share.

    Other sections hold defaults in a step that is not told them; logged, they would be wrong, and MLflow takes no second value.
    """
    from components.tracking import LiveCurves

    told = params.model_dump(mode="json", include={"seed", "preset", "model", section}) if params else None
    with LiveCurves(Path(workspace), run_id, prefix=f"{step}.", params=told) as curves:
        yield curves


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """One JSON line per epoch."""
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in history))
