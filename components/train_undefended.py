"""On demand: a model trained on the same data without any defence, for comparison; never promotable."""

from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.bundle import bundle_digest
from cbd.config import Params
from cbd.files import replacing
from components.checkpoints import going_on
from components.processes import in_processes
from components.records import kfp_component
from components.training import card_of, checkpoint_folder, live_curves, load, teller, write_history


@in_processes("model")
def train_undefended(
    dataset: Path, model: Path, *, params: Params, checkpoints: Path, tracked: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Digest of the undefended model that this writes to the folder `model`; schedule and network are the deconfounded model's.

    Raises:
        DataError: the data set is missing or altered.
    """
    import contextlib

    from cbd.deconfounded import train_deconfounded as train
    from cbd.models import save_bundle

    data = load(dataset, params)
    place = checkpoint_folder(checkpoints, data.info, params, "deconfounded")
    with live_curves(*tracked, "train_undefended") if tracked else contextlib.nullcontext() as curves:
        trained = train(
            data.images,
            data.labels,
            None,
            num_classes=len(data.info.class_names),
            params=params,
            **going_on(place / "undefended.safetensors", teller("train_undefended", curves)),
        )
    with replacing(model) as temporary:
        save_bundle(trained.model, card_of("undefended", data.info, params), temporary)
        write_history(temporary / "history.jsonl", trained.history)
    return {"model_digest": bundle_digest(model)}


@kfp_component
def train_undefended_step(
    records: str,
    workspace: str,
    run_id: str,
    enabled: bool,
    seed: int,
    preset: str,
    model_params: dict,
    training: dict,
    deconfounded_params: dict,
    dataset: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
):
    """Trains without defence, if that is wanted.

    Args:
        records: prefix of the step records.
        workspace: folder of checkpoints and tracking store.
        run_id: names the run in the tracking server.
        enabled: whether it is wanted; otherwise nothing is done and no record is left.
        seed: seed of every generator.
        preset: name of the preset.
        model_params: section `model` of params.yaml.
        training: section of params.yaml.
        deconfounded_params: section `deconfounded` of params.yaml.
        dataset: the untrusted data set.
        model: the undefended model's bundle.
    """
    from pathlib import Path

    from components.attestation import attest_training
    from components.records import step
    from components.train_undefended import train_undefended
    from components.training import training_params

    if enabled:
        with step(records, "train_undefended") as outputs:
            outputs["paths"] = {"model": model.path}
            params = training_params(seed, preset, model_params, deconfounded=deconfounded_params, training=training)
            made = {"params": params, "checkpoints": Path(workspace) / "checkpoints", "tracked": (workspace, run_id)}
            outputs |= train_undefended(Path(dataset.path), Path(model.path), **made)
            outputs["attestation"] = attest_training(records, "train_undefended", Path(model.path), workspace=workspace)
