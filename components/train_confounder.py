"""Fourth step: the confounder, the pilot and the patterns, and whether these views tell a group of samples apart."""

from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.config import Params
from cbd.files import replacing, write_json
from components.checkpoints import going_on
from components.processes import in_processes
from components.records import kfp_component, progress
from components.training import card_of, checkpoint_folder, live_curves, load, teller, write_history

LOSSES = "losses.parquet"
SEPARATION = "separation.json"
PATTERN_IMAGE = "pattern-{number}.png"


@in_processes("out")
def train_confounder(
    dataset: Path, out: Path, *, params: Params, checkpoints: Path, tracked: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Steps and separation of the confounder whose bundle, per-sample losses and curves this writes to the folder `out`.

    Args:
        dataset: the untrusted data set.
        out: gets the bundle (never deployable), `losses.parquet`, `separation.json`, `history.jsonl` and a picture of each pattern.
        params: the seed and the sections `model` and `confounder`.
        checkpoints: folder from which a killed training goes on.
        tracked: workspace and run id of the live curves; None for none.

    Raises:
        DataError: the data set is missing or altered.
    """
    import contextlib

    from cbd import confounder

    data = load(dataset, params)
    place = checkpoint_folder(checkpoints, data.info, params, "confounder")
    common: dict[str, Any] = {"num_classes": len(data.info.class_names), "params": params}
    with live_curves(*tracked, "train_confounder", params, section="confounder") if tracked else contextlib.nullcontext() as curves:
        found = confounder.train_confounder(
            data.images,
            data.labels,
            **going_on(place / "confounder.safetensors", teller("train_confounder", curves, what="confounder")),
            **common,
        )
        flown, separation, curve = None, None, []
        if params.confounder.pilot:
            told = teller("train_confounder", curves, what="pilot")
            flown, separation, curve = _fly(data, found, place=place, on_epoch=told, common=common)
    progress("train_confounder", 0, 1, "looking for patterns that images of a class share")
    patterns = _patterns(data, found, flown, params=params)
    separation, added = _group(data, separation, patterns, params=params)
    with replacing(out) as temporary:
        temporary.mkdir()
        _write(temporary, found, patterns, data=data, params=params)
        views = {"separation": separation, "patterns": patterns, "added": added}
        written = _write_separation(temporary, found, flown, curve, data=data, **views)
    return {"steps": found.steps} | {name: written[name] for name in ("separated", "gap", "suspects")}


def _fly(data: Any, found: Any, *, place: Path, on_epoch: Any, common: dict[str, Any]) -> tuple[Any, Any, list[dict[str, float]]]:
    """The pilot, whether it and the confounder tell a group apart, and what it knew after each epoch.

    One that has learned the trigger itself flies again without what it must judge.
    """
    import numpy as np
    import torch

    from cbd.evidence import swallowed
    from cbd.pilot import train_pilot

    about = {"steps": found.steps, **common}
    flown = train_pilot(data.images, data.labels, found.losses, **going_on(place / "pilot.safetensors", on_epoch), **about)
    history = flown.history
    separation = _separate(found, flown, data, seed=common["params"].seed)
    if (without := swallowed(separation, found.losses.numpy().astype(np.float64), data.labels.cpu().numpy())) is not None:
        again = going_on(place / "pilot-again.safetensors", on_epoch) | {"without": torch.from_numpy(without)}
        flown = train_pilot(data.images, data.labels, found.losses, **again, **about)
        separation = _separate(found, flown, data, seed=common["params"].seed)
        history = [*history, *({**row, "step": found.steps + row["step"]} for row in flown.history)]
    return flown, separation, [{"step": row["step"], "evidence": row["evidence"]} for row in history]


def _separate(found: Any, flown: Any, data: Any, *, seed: int) -> Any:
    """Whether confounder and pilot tell a group apart."""
    import numpy as np

    from cbd.evidence import separate

    views = (view.numpy().astype(np.float64) for view in (found.losses, flown.preferences, found.final_losses))
    return separate(*views, data.labels.cpu().numpy(), seed=seed)


def _group(data: Any, separation: Any, patterns: list[Any], *, params: Params) -> tuple[Any, int]:
    """The separation by confounder and pilot with all that patterns found, and how many samples a detector added; without a pilot none."""
    import numpy as np
    import torch

    from cbd.detector import detect
    from cbd.evidence import Separation, teaches, with_groups

    labels = data.labels.cpu().numpy()
    if separation is None:
        return Separation(None, None, None, None, np.zeros(len(labels))), 0
    known = with_groups(separation, [(pattern.members, 1.0) for pattern in patterns])
    if not teaches(separation, labels, [pattern.members for pattern in patterns]):
        return known, 0

    def told(done: int, of: int) -> None:
        progress("train_confounder", done, of, "detector")

    group = torch.from_numpy(separation.posterior > 0.5)
    scores = detect(data.images, data.labels, group, params=params, told=told).numpy().astype(np.float64)
    more = np.flatnonzero((scores > 0.5) & (known.posterior <= 0.5))
    return with_groups(known, [(more, scores[more])] if len(more) else []), len(more)


def _patterns(data: Any, found: Any, flown: Any, *, params: Params) -> list[Any]:
    """The planted patterns; none without a pilot, whose view a verdict on them needs."""
    from cbd.pattern import find_patterns

    if flown is None:
        return []
    views = {"losses": found.losses, "preferences": flown.preferences, "seed": params.seed}
    return [pattern for pattern in find_patterns(data.images, data.labels, found.model, **views) if pattern.planted]


def _write(folder: Path, found: Any, patterns: list[Any], *, data: Any, params: Params) -> None:
    import numpy as np
    from PIL import Image

    from cbd.models import save_bundle

    save_bundle(found.model, card_of("confounder", data.info, params), folder)
    write_history(folder / "history.jsonl", found.history)
    for number, pattern in enumerate(patterns):
        shown = np.clip(np.rint(128 + pattern.mean), 0, 255).astype(np.uint8)
        Image.fromarray(shown.transpose(1, 2, 0)).save(folder / PATTERN_IMAGE.format(number=number))


def _write_separation(
    folder: Path, found: Any, flown: Any, curve: list[dict[str, float]], *, data: Any, separation: Any, patterns: list[Any], added: int
) -> dict[str, Any]:
    """Writes what the views say of every sample and of all together; returns the latter."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cbd.crowds import crowded_classes
    from cbd.evidence import histogram, with_groups

    losses = found.losses.numpy().astype(np.float64)
    seen = np.full(len(losses), np.nan) if flown is None else flown.preferences.numpy().astype(np.float64)
    known, labels = separation.posterior > 0.5, data.labels.cpu().numpy()
    crowds = []
    if flown is not None:
        crowds = crowded_classes(losses, seen, flown.logits.numpy().astype(np.float64), labels, known=known, counts=flown.counts.numpy())
    separation = with_groups(separation, [(crowd.members, crowd.posterior) for crowd in crowds])
    columns = {"sample_id": data.sample_ids, "confounder_loss": losses, "preference": seen, "posterior": separation.posterior}
    columns["doubted"] = np.isin(labels, [crowd.label for crowd in crowds]) & ~known
    pq.write_table(pa.table(columns), folder / LOSSES, compression="zstd")
    names = data.info.class_names
    told = {
        "separated": separation.separated,
        "p_value": separation.p_value,
        "gap": separation.gap,
        "share": separation.share,
        "suspects": int((separation.posterior > 0.5).sum()),
        "added": added,
        "patterns": [_tell_pattern(number, pattern, names) for number, pattern in enumerate(patterns)],
        "crowds": [_tell_crowd(crowd, names) for crowd in crowds],
        "steps": found.steps,
        "curve": curve,
        "histogram": histogram(losses),
    }
    write_json(folder / SEPARATION, told)
    return told


def _tell_pattern(number: int, pattern: Any, class_names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "class_name": class_names[pattern.label],
        "image": PATTERN_IMAGE.format(number=number),
        "num_images": len(pattern.members),
        "gap": round(pattern.gap, 3),
        "transfer": pattern.transfer,
        "contradiction": round(pattern.contradiction, 4),
        "preference": round(pattern.preference, 4),
    }


def _tell_crowd(crowd: Any, class_names: tuple[str, ...]) -> dict[str, Any]:
    about = {"contradicted": crowd.share, "p_value": crowd.p_value}
    return {"class_name": class_names[crowd.label], "num_images": len(crowd.members)} | about


@kfp_component
def train_confounder_step(
    records: str,
    workspace: str,
    run_id: str,
    seed: int,
    preset: str,
    model_params: dict,
    training: dict,
    confounder_params: dict,
    dataset: dsl.Input[dsl.Dataset],
    confounder: dsl.Output[dsl.Model],
):
    """Trains the confounder and the pilot.

    Args:
        records: prefix of the step records.
        workspace: folder of checkpoints and tracking store.
        run_id: names the run in the tracking server.
        seed: seed of every generator.
        preset: name of the preset.
        model_params: section `model` of params.yaml.
        training: section of params.yaml.
        confounder_params: section `confounder` of params.yaml.
        dataset: the untrusted data set.
        confounder: bundle, per-sample losses, separation and curves.
    """
    from pathlib import Path

    from components.attestation import attest_training
    from components.records import step
    from components.train_confounder import train_confounder
    from components.training import training_params

    with step(records, "train_confounder") as outputs:
        outputs["paths"] = {"confounder": confounder.path}
        params = training_params(seed, preset, model_params, confounder=confounder_params, training=training)
        made = {"params": params, "checkpoints": Path(workspace) / "checkpoints", "tracked": (workspace, run_id)}
        outputs |= train_confounder(Path(dataset.path), Path(confounder.path), **made)
        outputs["attestation"] = attest_training(records, "train_confounder", Path(confounder.path), workspace=workspace)
