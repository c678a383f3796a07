"""The defence against known attacks: for each attack, preset and seed poison, train, measure; one row each, one table of all."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd.config import Params, canonical_json
from cbd.errors import ConfigError, DataError
from cbd.files import replacing, write_json
from components.records import progress
from components.summary import read_object

COLUMNS = ("attack", "preset", "seed", "poison_rate", "target_label", "ca", "asr", "excess_asr", "robust_accuracy", "der")
DETECTION = ("separated", "suspects", "auroc", "tpr_at_1_percent_fpr")
TABLE = "redteam.parquet"
CLEAN_LABEL_SHARE = 0.5
"""Of the target class: a clean-label attack cannot take a share of the whole data set."""


@dataclass(frozen=True)
class Trial:
    """One row to be measured; `attack` None trains on the data as taken in."""

    attack: str | None
    preset: str
    params: Params


def redteam(
    taken_in: Path, out: Path, *, attacks: Sequence[str], presets: Sequence[str], seeds: Sequence[int], params_of: Callable[..., Params]
) -> list[dict[str, Any]]:
    """One row for every attack, preset and seed, also written to `out/redteam.parquet`. What was measured before is not measured again.

    The preset `none` is plain training. A row's `excess_asr` is its ASR less that of the same trigger on a model that was trained without
    defence on the data as taken in; `der` compares with the undefended model of the same attack and seed. Both of these are trained too.

    Args:
        taken_in: folder with `dataset` and `trusted_set`, as `ingest` writes it.
        out: gets one folder per poisoned copy and per model, and the table.
        attacks: names of attacks.
        presets: names of presets.
        seeds: of poison and training.
        params_of: the parameters of `preset=` and `seed=` with an `attack=`.

    Raises:
        ConfigError: no attack, preset or seed, or an unknown one.
        DataError: the data does not fit an attack.
    """
    if not (attacks and presets and seeds):
        raise ConfigError("red team: expected at least one attack, one preset and one seed; name them")
    rows = []
    trials = [(seed, attack, preset) for seed in seeds for attack in attacks for preset in presets]
    for index, (seed, attack, preset) in enumerate(trials):
        progress("redteam", index, len(trials), f"{attack} {preset} seed {seed}")
        of_seed = {name: _fitted(params_of(preset=name, seed=seed, attack=attack), taken_in / "dataset") for name in {preset, "none"}}
        clean, _ = _train(taken_in, Trial(None, "none", of_seed["none"]), out)
        undefended, poisoned = _train(taken_in, Trial(attack, "none", of_seed["none"]), out)
        trained, _ = (undefended, poisoned) if preset == "none" else _train(taken_in, Trial(attack, preset, of_seed[preset]), out)
        rows.append(_row(Trial(attack, preset, of_seed[preset]), trained, clean, undefended, poisoned, taken_in / "trusted_set"))
        _write_table(rows, out / TABLE)
    progress("redteam", len(trials), len(trials))
    return rows


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, rates in percent; what was not measured is a dash."""
    names = [*COLUMNS[:4], *COLUMNS[5:], *DETECTION, "seconds"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_cell(name, row[name]) for name in names) + " |" for row in rows)])


def _fitted(params: Params, dataset: Path) -> Params:
    """The parameters with the poison rate that a clean-label attack can have on this data set."""
    from cbd.attacks import make_attack
    from cbd.dataset import read_info

    poison, info = params.poison, read_info(dataset)
    if poison.attack is None or not make_attack(poison.attack).clean_label or poison.target_label >= len(info.class_names):
        return params
    share = int(CLEAN_LABEL_SHARE * info.class_counts[poison.target_label]) / info.num_images
    return params.model_copy(update={"poison": poison.model_copy(update={"poison_rate": share})})


def _train(taken_in: Path, trial: Trial, out: Path) -> tuple[Path, Path | None]:
    """The folder with `model` (and `confounder`, `evidence` under a defence) and `seconds.json`, and the poisoned copy's folder."""
    from components.poison import poison
    from components.train_confounder import train_confounder
    from components.train_deconfounded import train_deconfounded
    from components.train_undefended import train_undefended

    params = trial.params
    source, copy = taken_in / "dataset", None
    if trial.attack:
        copy = out / f"{trial.attack}-seed{params.seed}-{_digest(params.poison.model_dump(), _digest_of(source))}"
        if not (copy / "truth").is_dir():  # the last that is written
            poison(source, copy / "dataset", truth=copy / "truth", params=params.poison, seed=params.seed)
        source = copy / "dataset"
    about = params.model_dump(mode="json", include={"seed", "model", "confounder", "deconfounded"})
    name = f"{trial.attack or 'clean'}-{trial.preset}-seed{params.seed}-{_digest(about, _digest_of(source))}"
    folder, checkpoints = out / name, out / "checkpoints"
    if (folder / "seconds.json").is_file():
        return folder, copy
    started = time.monotonic()
    if trial.preset == "none":
        train_undefended(source, folder / "model", params=params, checkpoints=checkpoints)
    else:
        train_confounder(source, folder / "confounder", params=params, checkpoints=checkpoints)
        places = {"model": folder / "model", "evidence": folder / "evidence"}
        train_deconfounded(source, folder / "confounder", params=params, checkpoints=checkpoints, **places)
    write_json(folder / "seconds.json", {"seconds": time.monotonic() - started})
    return folder, copy


def _row(trial: Trial, trained: Path, clean: Path, undefended: Path, copy: Path | None, trusted_set: Path) -> dict[str, Any]:
    from cbd.attacks import make_attack
    from cbd.dataset import load_samples, read_truth
    from cbd.evaluate import attack_success, clean_accuracy, defence_effectiveness, predictions, robust_accuracy
    from cbd.models import load_model
    from cbd.training import best_device

    truth = read_truth(copy / "truth") if copy else None
    if truth is None:
        raise ConfigError("red team: a row needs an attack; name one")
    samples = load_samples(trusted_set, image_size=trial.params.model.image_size)
    attack, target = make_attack(truth.attack, **truth.trigger), truth.target_label

    def measure(folder: Path) -> tuple[float, float, float]:
        network = load_model(folder / "model")[0].to(best_device())
        of = {"images": samples.images, "labels": samples.labels, "attack": attack, "target_label": target}
        rates = (
            clean_accuracy(predictions(network, samples.images), samples.labels)["rate"],
            attack_success(network, **of)["rate"],
            robust_accuracy(network, **of)["rate"],
        )
        if None in rates:
            raise DataError(f"{trusted_set}: no image outside class {target}; give a trusted set of all classes")
        return rates

    ca, asr, kept = measure(trained)
    plain_ca, plain_asr, _ = (ca, asr, kept) if trained == undefended else measure(undefended)
    poison = trial.params.poison
    effect = defence_effectiveness(ca=ca, asr=asr, undefended_ca=plain_ca, undefended_asr=plain_asr)
    known = (trial.attack, trial.preset, trial.params.seed, poison.poison_rate, target, ca, asr, asr - measure(clean)[1], kept, effect)
    seconds = read_object(trained / "seconds.json").get("seconds")
    return dict(zip(COLUMNS, known, strict=True)) | _detected(trained, truth) | {"seconds": seconds}


def _detected(trained: Path, truth: Any) -> dict[str, Any]:
    """What the evidence on single samples is worth; None where there is none."""
    from components.evaluate import detected
    from components.train_confounder import SEPARATION

    separation = read_object(trained / "confounder" / SEPARATION)
    measured = (detected(trained / "evidence", truth) or {}) if (trained / "evidence").is_dir() else {}
    told = {"separated": separation.get("separated"), "suspects": separation.get("suspects")}
    return told | {name: measured.get(name) for name in DETECTION[2:]}


def _digest_of(dataset: Path) -> str:
    from cbd.dataset import read_info

    return read_info(dataset).digest


def _digest(about: dict[str, Any], data: str) -> str:
    return hashlib.sha256(canonical_json([about, data])).hexdigest()[:12]


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name in ("poison_rate", "ca", "asr", "excess_asr", "robust_accuracy"):
        return f"{100 * value:.1f} %"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
