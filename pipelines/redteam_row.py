"""A row of the red team: what one trained model is worth, on the trusted set and as a detector."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cbd.dataset import Samples
from cbd.errors import ConfigError, DataError
from cbd.truth import Truth
from components.summary import read_object

COLUMNS = ("attack", "preset", "seed", "poison_rate", "target_label", "ca", "asr", "excess_asr", "robust_accuracy", "der")
BY_GROUP = ("ca_by_group", "asr_by_group", "num_groups")
DETECTION = ("separated", "suspects", "auroc", "tpr_at_1_percent_fpr")
SECONDS = "seconds.json"


def groups_of(trusted_set: Path, pattern: str) -> npt.NDArray[np.int64]:
    """int64 [N]: number of the group of every trusted image."""
    from cbd.dataset import read_manifest

    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by {pattern!r}: no regular expression: {error}") from None
    paths = read_manifest(trusted_set)["original_path"].to_pylist()
    found = [wanted.search(path) for path in paths]
    if None in found:
        raise ConfigError(f"--group-by {pattern!r}: matches nothing in {paths[found.index(None)]!r}; every trusted image needs a group")
    names = [(match[1] if match.groups() else match[0]) or "" for match in found if match]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def row_of(
    about: tuple[str | None, str, int],
    trained: Path,
    clean: Path,
    undefended: Path | None,
    copies: list[Path],
    trusted_set: Path,
    groups: npt.NDArray[np.int64] | None,
) -> dict[str, Any]:
    """The row of a trial; of several attacks that with the highest excess.

    Args:
        about: attack, preset and seed.
        trained: folder of what was trained.
        clean: folder of a model that was trained without poison and without defence.
        undefended: folder of one that was trained on the same data without defence, if there is one.
        copies: what the suppliers left behind, each a folder with `truth`.
        trusted_set: what is measured on.
        groups: int64 [N], number of the group of each trusted image; None: rates by group are not asked for.
    """
    from cbd.bundle import read_card
    from cbd.dataset import load_samples
    from cbd.evaluate import defence_effectiveness
    from cbd.truth import read_truth

    truths = [truth for copy in copies if (truth := read_truth(copy / "truth"))]
    samples = load_samples(trusted_set, image_size=read_card(trained / "model").image_size)
    seconds = read_object(trained / SECONDS).get("seconds")
    if groups is None:
        groups = np.arange(len(samples.labels))
        by_group = dict.fromkeys(BY_GROUP)
    else:
        by_group = {"num_groups": len(np.unique(groups))}
    if not truths:
        accuracy = _measure([trained], None, samples, trusted_set, groups)[0]
        known = (*about, 0.0, None, accuracy.ca, None, None, None, None)
        by_group = {"ca_by_group": accuracy.ca_by_group, "asr_by_group": None} | by_group
        return dict(zip(COLUMNS, known, strict=True)) | by_group | _detected(trained, truths) | {"seconds": seconds}
    rows = []
    for truth in truths:
        compared = [trained, clean, *([undefended] if undefended else [])]
        own, harmless, *plain = _measure(compared, truth, samples, trusted_set, groups)
        effect = None
        if plain:
            effect = defence_effectiveness(ca=own.ca, asr=own.asr, undefended_ca=plain[0].ca, undefended_asr=plain[0].asr)
        known = (*about, sum(truth.poison_rate for truth in truths), truth.target_label)
        row = dict(zip(COLUMNS, (*known, own.ca, own.asr, own.asr - harmless.asr, own.kept, effect), strict=True))
        rows.append(row | {"ca_by_group": own.ca_by_group, "asr_by_group": own.asr_by_group} | by_group)
    return max(rows, key=lambda row: float(row["excess_asr"])) | _detected(trained, truths) | {"seconds": seconds}


class _Measured(NamedTuple):
    """Shares in [0, 1] of one model."""

    ca: float
    asr: float
    kept: float
    """Robust accuracy."""
    ca_by_group: float
    asr_by_group: float


def _measure(
    folders: list[Path], truth: Truth | None, samples: Samples, trusted_set: Path, groups: npt.NDArray[np.int64]
) -> list[_Measured]:
    """What the model in each folder does; the images are stamped once for all. Without a truth there are no triggered ones."""
    from cbd.attacks import make_attack
    from cbd.bundle import read_card
    from cbd.evaluate import predictions

    num_classes = len(read_card(folders[0] / "model").class_names)
    victims, triggered = np.zeros(len(samples.labels), bool), None
    if truth is not None:
        victims = truth.goal.victims(samples.labels, num_classes=num_classes)
        if not victims.any():
            raise DataError(f"{trusted_set}: no image that the attack is after; give a trusted set of all classes")
        triggered = make_attack(truth.attack, **truth.trigger).stamp(samples.images[victims])
    measured = []
    for folder in folders:
        network = _network(folder)
        right = predictions(network, samples.images) == samples.labels
        hit = kept = np.zeros(0, bool)
        if truth is not None and triggered is not None:
            called, true = predictions(network, triggered), samples.labels[victims]
            hit, kept = called == truth.goal.wanted(true, num_classes=num_classes), called == true
        shares = [float(values.mean()) if len(values) else 0.0 for values in (right, hit, kept)]
        measured.append(_Measured(*shares, _mean_of_groups(right, groups), _mean_of_groups(hit, groups[victims])))
    return measured


def _mean_of_groups(values: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]) -> float:
    """The mean over groups of the share of true values in each, in [0, 1]; 0 without values."""
    if not len(values):
        return 0.0
    of = np.bincount(groups)
    return float((np.bincount(groups, values)[of > 0] / of[of > 0]).mean())


def _network(folder: Path) -> Any:
    from cbd.models import load_model
    from cbd.training import best_device

    return load_model(folder / "model")[0].to(best_device())


def _detected(trained: Path, truths: list[Truth]) -> dict[str, Any]:
    """What the evidence on single samples is worth; None where there is none."""
    from components.evaluate import detected
    from components.train_confounder import SEPARATION
    from components.train_deconfounded import read_separation

    if not (trained / "confounder" / SEPARATION).is_file():
        return dict.fromkeys(DETECTION)
    told, measured = read_separation(trained / "confounder"), detected(trained / "evidence", *truths) or {}
    return {name: told[name] for name in DETECTION[:2]} | {name: measured.get(name) for name in DETECTION[2:]}
