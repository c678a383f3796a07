"""The steps of the pipeline `redteam`: a trial told by plain values, its row in a file, and the table of all rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbd.config import Ingest, Params, Poison, check_section
from cbd.errors import DataError
from cbd.files import write_json
from components.records import kfp_component
from components.summary import read_object
from pipelines.options import BASELINES
from pipelines.redteam import TABLE, Trial, measure, take_in, train, write_table
from pipelines.redteam_row import groups_of
from pipelines.redteam_table import write_page

ROWS = "rows"
"""Folder of the rows, each under its trial's digest."""


def arguments(
    delivery: dict[str, Any], *, attacks: Sequence[str], presets: Sequence[str], seeds: Sequence[int], params_of: Callable[..., Params]
) -> dict[str, Any]:
    """The pipeline's delivery, its lists of trials and its parameters; `none` is always there, for the others are compared with it.

    Args:
        delivery: `data`, `trusted` and `limit`.
        attacks: names of attacks, or of `redteam.VARIANTS`.
        presets: names of presets, or of `redteam.BASELINES`.
        seeds: of poison and training.
        params_of: the parameters of a `preset=` and a `seed=`.
    """
    pairs = [{"attack": attack, "seed": seed} for seed in seeds for attack in attacks]
    others = [preset for preset in presets if preset != "none"]
    known = {preset: params_of(preset=preset, seed=seeds[0]) for preset in ("none", *others) if preset not in BASELINES}
    return {
        "delivery": {**delivery, "ingest": known["none"].ingest.model_dump(mode="json", exclude_none=True)},
        "seeds": [{"attack": "", "preset": "none", "seed": seed} for seed in seeds],
        "undefended": [{**pair, "preset": "none"} for pair in pairs],
        "defended": [{**pair, "preset": preset} for pair in pairs for preset in others],
        "presets": {name: _sections(params) for name, params in known.items()},
    }


def _sections(params: Params) -> dict[str, Any]:
    return params.model_dump(mode="json", exclude_none=True, include={"model", "confounder", "deconfounded", "poison"})


@kfp_component
def take_in_step(out: str, delivery: dict):
    """Takes the delivery and the trusted set in.

    Args:
        out: folder of all that the red team does.
        delivery: data, trusted set, limit, and the section `ingest` of params.yaml.
    """
    from pipelines import trials

    trials.take_delivery_in(out, delivery)


@kfp_component
def trial_step(out: str, delivery: dict, trial: dict, presets: dict, group_by: str):
    """Trains and measures one trial.

    Args:
        out: folder of all that the red team does.
        delivery: as for `take_in_step`.
        trial: attack, preset and seed; without an attack the model without poison is trained and not measured.
        presets: sections of params.yaml by preset.
        group_by: regular expression on paths of trusted images; empty is none.
    """
    from pipelines import trials

    trials.run_trial(out, delivery, trial, presets=presets, group_by=group_by)


@kfp_component
def table_step(out: str, delivery: dict, undefended: list, defended: list, presets: dict):
    """Writes the rows of all trials as one table.

    Args:
        out: folder of all that the red team does; gets `redteam.parquet` and `redteam.md`.
        delivery: as for `take_in_step`.
        undefended: trials, as `trial_step` knows them.
        defended: trials.
        presets: sections of params.yaml by preset.
    """
    from pipelines import trials

    trials.collect(out, delivery, [*undefended, *defended], presets=presets)


def take_delivery_in(out: str, delivery: dict[str, Any]) -> Path:
    """The folder in `out` with the data sets (see `pipelines.redteam.take_in`); raises ConfigError if the section is malformed."""
    params = check_section(Ingest, delivery["ingest"], name="ingest")
    return take_in(delivery["data"], delivery["trusted"], Path(out), limit=int(delivery["limit"]), params=params)


def run_trial(out: str, delivery: dict[str, Any], told: dict[str, Any], *, presets: dict[str, Any], group_by: str) -> None:
    """Trains what the trial takes, and writes its row to `out/rows` (see `pipelines.redteam.measure`); not again if it is there.

    Raises:
        ConfigError: a section is malformed.
        DataError: the data does not fit the attack.
    """
    sets, folder = take_delivery_in(out, delivery), Path(out)
    plain, trial = _trial(told, presets)
    if not trial.attack:
        train(sets / "dataset", trial, folder)
        return
    row = _row(folder, trial, sets)
    groups = groups_of(sets / "trusted_set", group_by) if group_by else None
    if not row.is_file() or group_by:
        write_json(row, measure(trial, sets, folder, plain=plain, compared=True, groups=groups))


def collect(out: str, delivery: dict[str, Any], trials: Sequence[dict[str, Any]], *, presets: dict[str, Any]) -> None:
    """Writes the rows of these trials, seed by seed and attack by attack, as `out/redteam.parquet` and `out/redteam.md`.

    Raises:
        DataError: a row is missing.
    """
    sets, folder, rows = take_delivery_in(out, delivery), Path(out), []
    for told in trials:
        path = _row(folder, _trial(told, presets)[1], sets)
        if not (row := read_object(path)):
            about = f"{told['attack']} {told['preset']} seed {int(told['seed'])}"
            raise DataError(f"{path}: the row of {about} is missing; run the trial again")
        rows.append(row)
    order = [(told["seed"], told["attack"]) for told in trials]
    rows.sort(key=lambda row: order.index((row["seed"], row["attack"])))
    write_table(rows, folder / TABLE)
    write_page(rows, folder)


def _trial(told: dict[str, Any], presets: dict[str, Any]) -> tuple[Params, Trial]:
    """The parameters of a training without defence, and the trial."""
    from components.training import training_params

    def params_of(preset: str) -> Params:
        sections = dict(presets[preset])
        poison = check_section(Poison, sections.pop("poison"), name="poison")
        return training_params(int(told["seed"]), preset, sections.pop("model"), **sections).model_copy(update={"poison": poison})

    plain, preset = params_of("none"), told["preset"]
    return plain, Trial(told["attack"] or None, preset, plain if preset in ("none", *BASELINES) else params_of(preset))


def _row(out: Path, trial: Trial, taken_in: Path) -> Path:
    return out / ROWS / f"{trial.digest(taken_in)}.json"
