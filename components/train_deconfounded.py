"""Fifth step: the deconfounded model, and the evidence on every sample."""

import hashlib
import json
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.bundle import bundle_digest, read_card
from cbd.config import Params
from cbd.dataset import read_images
from cbd.errors import DataError
from cbd.files import replacing, sha256_file
from components.checkpoints import going_on
from components.processes import in_processes
from components.records import kfp_component
from components.train_confounder import LOSSES, SEPARATION
from components.training import Loaded, card_of, checkpoint_folder, live_curves, load, teller, write_history

EVIDENCE = "evidence.parquet"
GALLERY = "gallery.parquet"
SHOWN = 48
"""Images in the gallery, the most suspicious first."""


@in_processes("model", "evidence")
def train_deconfounded(
    dataset: Path,
    confounder: Path,
    *,
    model: Path,
    evidence: Path,
    params: Params,
    checkpoints: Path,
    tracked: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Digest of the deconfounded model that this writes to the folder `model`; the evidence table goes to the folder `evidence`.

    Args:
        dataset: the untrusted data set.
        confounder: folder that `train_confounder` wrote on the same data.
        model: gets the bundle and `history.jsonl`.
        evidence: gets `evidence.parquet`, one row per sample, and `gallery.parquet`: `sample_id` and `image`, the original bytes, of
            the most suspicious ones, for whoever looks at them where the data set does not lie.
        params: the seed and the sections `model` and `deconfounded`.
        checkpoints: folder from which a killed training goes on.
        tracked: workspace and run id of the live curves; None for none.

    Raises:
        DataError: the data set or the confounder is missing or altered, or they do not belong together.
    """
    import contextlib

    from cbd.deconfounded import train_deconfounded as train
    from cbd.models import save_bundle

    data = load(dataset, params)
    found, views = _stage_one(confounder, data, params=params)
    place = checkpoint_folder(checkpoints, data.info, params, "deconfounded")
    with live_curves(*tracked, "train_deconfounded", params, section="deconfounded") if tracked else contextlib.nullcontext() as curves:
        trained = train(
            data.images,
            data.labels,
            found,
            num_classes=len(data.info.class_names),
            params=params,
            **going_on(place / f"deconfounded-{_digest(confounder)[:16]}.safetensors", teller("train_deconfounded", curves)),
        )
    with replacing(model) as temporary:
        card = card_of("deconfounded", data.info, params)
        stage_one = read_card(confounder).params["confounder"]  # this step is not told it
        save_bundle(trained.model, card.model_copy(update={"params": {**card.params, "confounder": stage_one}}), temporary)
        write_history(temporary / "history.jsonl", trained.history)
    with replacing(evidence) as temporary:
        temporary.mkdir()
        suspects = _write_evidence(temporary / EVIDENCE, trained, views, data)
        _write_gallery(temporary, dataset)
    return {"model_digest": bundle_digest(model), "suspects": suspects, "num_images": data.info.num_images}


def _digest(confounder: Path) -> str:
    """SHA-256 (hex) of the confounder's bundle and of what it says of every sample: stage 2 of other evidence is another training."""
    return hashlib.sha256(f"{bundle_digest(confounder)} {sha256_file(confounder / LOSSES)}".encode()).hexdigest()


def _stage_one(confounder: Path, data: Loaded, *, params: Params) -> tuple[Any, dict[str, Any]]:
    """What stage 1 left behind, as stage 2 uses it, and its per-sample columns.

    Where the views looked and found nothing, the confounder holds nothing that a model should be made independent of: it is left out.
    """
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from cbd.deconfounded import Evidence
    from cbd.evidence import isolation_weights
    from cbd.models import load_model

    network, card = load_model(confounder)
    if card.kind != "confounder" or card.data_digest != data.info.digest:
        raise DataError(
            f"{confounder}: a {card.kind} of data set {card.data_digest[:12]}, expected a confounder of {data.info.digest[:12]}; train one"
        )
    views = {name: np.array(column) for name, column in pq.read_table(confounder / LOSSES).to_pydict().items()}
    if views["sample_id"].tolist() != data.sample_ids:
        raise DataError(f"{confounder / LOSSES}: holds other samples than the data set; train the confounder again")
    device = data.images.device
    losses, weights = (
        torch.from_numpy(values.astype(np.float32)).to(device)
        for values in (views["confounder_loss"], isolation_weights(views["posterior"]))
    )
    nothing = params.deconfounded.weight == "isolation" and read_separation(confounder)["separated"] is False
    return Evidence(None if nothing else network.to(device), losses, weights, torch.from_numpy(views["doubted"]).to(device)), views


def _write_evidence(path: Path, trained: Any, views: dict[str, Any], data: Loaded) -> int:
    """Writes the evidence table; returns how many samples are suspects: of the doubted ones those whose label the model disbelieves."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cbd.evidence import BELIEVED, rank_samples

    final_losses, weights = (values.numpy().astype(np.float64) for values in (trained.final_losses, trained.sample_weights))
    posterior, preferences = np.where(views["doubted"], 0.5, views["posterior"]), np.nan_to_num(views["preference"], nan=1.0)
    suspect = np.where(views["doubted"], final_losses > BELIEVED, posterior > 0.5)
    labels = data.labels.cpu().numpy()
    table = {
        "sample_id": data.sample_ids,
        "label": labels,
        "predicted": trained.predicted.numpy(),
        "confounder_loss": views["confounder_loss"],
        "preference": views["preference"],
        "final_loss": final_losses,
        "sample_weight": weights,
        "rank": rank_samples(posterior, views["confounder_loss"], preferences, final_losses, labels),
        "suspect": suspect,
    }
    pq.write_table(pa.table(table), path, compression="zstd")
    return int(suspect.sum())


def _write_gallery(evidence: Path, dataset: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ranked = pq.read_table(evidence / EVIDENCE, columns=["sample_id", "rank"]).sort_by("rank")["sample_id"].to_pylist()[:SHOWN]
    images = read_images(dataset, ranked)
    pq.write_table(pa.table({"sample_id": ranked, "image": [images[sample] for sample in ranked]}), evidence / GALLERY)


def read_separation(confounder: Path) -> dict[str, Any]:
    """What the confounder's folder says of its separation."""
    told: dict[str, Any] = json.loads((confounder / SEPARATION).read_text())
    return told


@kfp_component
def train_deconfounded_step(
    records: str,
    workspace: str,
    run_id: str,
    seed: int,
    preset: str,
    model_params: dict,
    training: dict,
    deconfounded_params: dict,
    dataset: dsl.Input[dsl.Dataset],
    confounder: dsl.Input[dsl.Model],
    model: dsl.Output[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
):
    """Trains the deconfounded model.

    Args:
        records: prefix of the step records.
        workspace: folder of checkpoints and tracking store.
        run_id: names the run in the tracking server.
        seed: seed of every generator.
        preset: name of the preset.
        model_params: section `model` of params.yaml.
        training: section of params.yaml.
        deconfounded_params: section `deconfounded` of params.yaml.
        dataset: the untrusted data set.
        confounder: what stage 1 left behind.
        model: the deconfounded model's bundle.
        evidence: the table of all samples.
    """
    from pathlib import Path

    from components.attestation import attest_training
    from components.records import step
    from components.train_deconfounded import train_deconfounded
    from components.training import training_params

    with step(records, "train_deconfounded") as outputs:
        outputs["paths"] = {"model": model.path, "evidence": evidence.path}
        params = training_params(seed, preset, model_params, deconfounded=deconfounded_params, training=training)
        made = {"params": params, "checkpoints": Path(workspace) / "checkpoints", "tracked": (workspace, run_id)}
        out = {"model": Path(model.path), "evidence": Path(evidence.path)}
        outputs |= train_deconfounded(Path(dataset.path), Path(confounder.path), **out, **made)
        used = {"confounder": Path(confounder.path), "workspace": workspace}
        outputs["attestation"] = attest_training(records, "train_deconfounded", out["model"], **used)
