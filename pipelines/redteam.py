"""The defence against known attacks: for each attack, preset and seed poison, train, measure; one row each, one table of all."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd.config import Ingest, Params, Poison, canonical_json
from cbd.dataset import DatasetInfo
from cbd.errors import ConfigError
from cbd.files import replacing, write_json
from cbd.truth import Truth
from components.records import progress
from pipelines.options import BASELINES
from pipelines.redteam_row import SECONDS, groups_of, row_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TABLE = "redteam.parquet"
HALF = 0.5
"""Of the class that a clean-label or source-specific attack poisons: it cannot take a share of the whole data set."""
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "clean": (),
    "all-to-all": ({"attack": "badnets", "mapping": "all-to-all"},),
    "source-specific": ({"attack": "badnets", "source_label": 1},),
    "several": ({"attack": "badnets"}, {"attack": "blend", "target_label": 1}),
}
"""Threat models beyond one attack on one target: what they change in the section `poison`, once for each supplier; `clean` has none."""


@dataclass(frozen=True)
class Trial:
    """One model to be trained and measured."""

    attack: str | None
    """An attack or a variant; None trains on the data as taken in."""
    preset: str
    params: Params

    def digest(self, taken_in: Path) -> str:
        """12 hex digits that name this trial on this data: data sets, attack, preset and parameters."""
        about = self.params.model_dump(mode="json", include={"seed", "model", "confounder", "deconfounded", "poison"})
        return _digest([self.attack, self.preset, about], *(_digest_of(taken_in / name) for name in ("dataset", "trusted_set")))

    def poisons(self, info: DatasetInfo) -> list[Poison]:
        """The section `poison` of each supplier, with a rate that the attack can have on this data set."""
        changes = VARIANTS.get(self.attack, ({"attack": self.attack},)) if self.attack else ()
        return [fitted(Poison(**{**self.params.poison.model_dump(), **change}), info) for change in changes]


def redteam(
    taken_in: Path,
    out: Path,
    *,
    attacks: Sequence[str],
    presets: Sequence[str],
    seeds: Sequence[int],
    params_of: Callable[..., Params],
    known: Sequence[dict[str, Any]] = (),
    group_by: str | None = None,
) -> list[dict[str, Any]]:
    """One row for every attack, preset and seed, also written to `out/redteam.parquet`. What was measured before is not measured again.

    The preset `none` is plain training. A row's `excess_asr` is its ASR less that of the same trigger on a model that was trained without
    defence on the data as taken in, which is trained too. `der` compares with the undefended model of the same attack and seed; without
    `none` among the presets it is None.

    Args:
        taken_in: folder with `dataset` and `trusted_set`, as `ingest` writes it.
        out: gets one folder per poisoned copy and per model, and the table.
        attacks: names of attacks, or of `VARIANTS`.
        presets: names of presets, or of `BASELINES`: other defences, on the schedule of the preset `none`.
        seeds: of poison and training.
        params_of: the parameters of a `preset=` and a `seed=`; the attack in them is replaced by the trial's.
        known: rows of earlier calls, which stand for their trials if data and parameters are the same.
        group_by: a regular expression on the paths of trusted images; those with the same match (its first group, if it has one) belong
            together, such as frames of one video. Rates are then also told as means over groups, each of which counts once.

    Raises:
        ConfigError: no attack, preset or seed, or an unknown one; or no such expression.
        DataError: the data does not fit an attack.
    """
    if not (attacks and presets and seeds):
        raise ConfigError("red team: expected at least one attack, one preset and one seed; name them")
    groups = groups_of(taken_in / "trusted_set", group_by) if group_by else None
    rows: list[dict[str, Any]] = []
    measured = {row["trial"]: row for row in known}
    trials = [(seed, attack, preset) for seed in seeds for attack in attacks for preset in presets]
    for index, (seed, attack, preset) in enumerate(trials):
        progress("redteam", index, len(trials), f"{attack} {preset} seed {seed}")
        plain = params_of(preset="none", seed=seed)
        trial = Trial(attack, preset, plain if preset in ("none", *BASELINES) else params_of(preset=preset, seed=seed))
        name = trial.digest(taken_in)
        if name not in measured or (groups is not None and measured[name].get("num_groups") is None):
            measured[name] = measure(trial, taken_in, out, plain=plain, compared="none" in presets, groups=groups)
        rows.append(measured[name])
        write_table(rows, out / TABLE)
    progress("redteam", len(trials), len(trials))
    return rows


def take_in(data: str, trusted: str, out: Path, *, limit: int, params: Ingest) -> Path:
    """The folder in `out` with `dataset` and `trusted_set`, taken in unless it is there.

    Raises:
        DataError: the delivery or the trusted set is missing or unusable.
    """
    from components.ingest import IngestOptions, IngestPaths, ingest

    about = f"{data} {trusted} {limit} {params.model_dump_json()}"
    folder = out / f"taken-in-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with replacing(folder) as temporary:
            paths = IngestPaths(*(temporary / name for name in IngestPaths._fields))
            ingest(data, trusted, outputs=paths, params=params, options=IngestOptions(supplier="redteam", limit=limit))
    return folder


def measure(
    trial: Trial, taken_in: Path, out: Path, *, plain: Params, compared: bool, groups: "npt.NDArray[np.int64] | None"
) -> dict[str, Any]:
    """The row of a trial, after training all that it takes and `out` does not hold yet.

    Args:
        trial: what is trained and measured.
        taken_in: folder with `dataset` and `trusted_set`.
        out: gets the poisoned copies and the models.
        plain: parameters of a training without defence, of the trial's seed.
        compared: also train without defence on the trial's data, for `der`.
        groups: int64 [N], number of the group of each trusted image; None: rates by group are not asked for.

    Raises:
        DataError: the data does not fit the attack.
    """
    copies = _poisoned(taken_in / "dataset", trial, out)
    source = (copies[-1] if copies else taken_in) / "dataset"
    clean = train(taken_in / "dataset", Trial(None, "none", plain), out)
    undefended = (train(source, Trial(trial.attack, "none", plain), out) if copies else clean) if compared else None
    trained = undefended if undefended and trial.preset == "none" else train(source, trial, out, copies)
    about = (trial.attack, trial.preset, trial.params.seed)
    return {"trial": trial.digest(taken_in)} | row_of(about, trained, clean, undefended, copies, taken_in / "trusted_set", groups)


def fitted(poison: Poison, info: DatasetInfo) -> Poison:
    """The section with the poison rate that an attack on a single class can have on this data set."""
    from cbd.attacks import attack_class

    alone = poison.target_label if attack_class(str(poison.attack)).clean_label else poison.source_label
    if alone is None or alone >= len(info.class_names):
        return poison
    return poison.model_copy(update={"poison_rate": int(HALF * info.class_counts[alone]) / info.num_images})


def _poisoned(dataset: Path, trial: Trial, out: Path) -> list[Path]:
    """The folders with `dataset` and `truth` that the trial's suppliers leave behind, one upon the other."""
    from cbd.dataset import read_info
    from components.poison import poison

    copies: list[Path] = []
    for section in trial.poisons(read_info(dataset)):
        source = copies[-1] / "dataset" if copies else dataset
        copy = out / f"{section.attack}-seed{trial.params.seed}-{_digest(section.model_dump(), _digest_of(source))}"
        if not (copy / "truth").is_dir():  # the last that is written
            poison(
                source,
                copy / "dataset",
                truth=copy / "truth",
                params=section,
                seed=trial.params.seed,
                before=[made / "truth" for made in copies],
            )
        copies.append(copy)
    return copies


def _train_baseline(source: Path, model: Path, trial: Trial, *, truths: list[Truth | None], checkpoints: Path) -> None:
    """Writes the bundle of another defence's model, as one that can never be promoted."""
    import torch

    from cbd.baselines import train_baseline
    from cbd.models import save_bundle
    from components.training import card_of, checkpoint_folder, load, teller

    data = load(source, trial.params)
    marked = set().union(*(truth.samples_with("poison") for truth in truths if truth))
    trained = train_baseline(
        trial.preset,
        data.images,
        data.labels,
        poisoned=torch.tensor([sample in marked for sample in data.sample_ids]),
        num_classes=len(data.info.class_names),
        params=trial.params,
        checkpoint=checkpoint_folder(checkpoints, data.info, trial.params, "deconfounded") / f"{trial.preset}.safetensors",
        on_epoch=teller("redteam", None, what=trial.preset),
    )
    with replacing(model) as temporary:
        save_bundle(trained, card_of("undefended", data.info, trial.params), temporary)


def train(source: Path, trial: Trial, out: Path, copies: Sequence[Path] = ()) -> Path:
    """The folder in `out` with `model` (and `confounder`, `evidence` under a defence) and `seconds.json`, trained unless it is there.

    Args:
        source: data set to train on.
        trial: of the attack that made it.
        out: also gets `checkpoints`.
        copies: what the suppliers left behind, each a folder with `truth`.
    """
    from cbd.truth import read_truth
    from components.train_confounder import train_confounder
    from components.train_deconfounded import train_deconfounded
    from components.train_undefended import train_undefended

    params = trial.params
    about = params.model_dump(mode="json", include={"seed", "model", "confounder", "deconfounded"})
    name = f"{trial.attack or 'clean'}-{trial.preset}-seed{params.seed}-{_digest(about, _digest_of(source))}"
    folder, checkpoints = out / name, out / "checkpoints"
    if (folder / SECONDS).is_file():
        return folder
    started = time.monotonic()
    if trial.preset == "none":
        train_undefended(source, folder / "model", params=params, checkpoints=checkpoints)
    elif trial.preset in BASELINES:
        _train_baseline(source, folder / "model", trial, truths=[read_truth(copy / "truth") for copy in copies], checkpoints=checkpoints)
    else:
        train_confounder(source, folder / "confounder", params=params, checkpoints=checkpoints)
        places = {"model": folder / "model", "evidence": folder / "evidence"}
        train_deconfounded(source, folder / "confounder", params=params, checkpoints=checkpoints, **places)
    write_json(folder / SECONDS, {"seconds": time.monotonic() - started})
    return folder


def _digest_of(dataset: Path) -> str:
    from cbd.dataset import read_info

    return read_info(dataset).digest


def _digest(about: Any, *data: str) -> str:
    return hashlib.sha256(canonical_json([about, *data])).hexdigest()[:12]


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the rows as Parquet, one each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
