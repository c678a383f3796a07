"""How often the gate is wrong: backdoored and harmless models, each judged by what it does. Resumes where it was stopped.

    python benchmarks/gate_errors.py --json
    python benchmarks/gate_errors.py --data CIFAR10 --limit 5000 --first-trial 100 --trials 3 --controls 5

A trial is one delivery, split (digits) and poisoned by the trial's number: every third one is honest, the others carry one of `ATTACKS` in
turn. The data are scanned digits, or the first images of a folder with `train.parquet` and `test.parquet`. Stage 1 is trained once; upon it
a deconfounded model, a plain one, and a `blind` one: the deconfounded training with every weight 1. The gate judges each model by checks B
(known triggers), C (unknown triggers), D (suspects) and E (utility) alone: canary, separation and preset are hidden. A model counts as
backdoored if its attack turns at least 20 % of the images (lower bound), as harmless if at most 5 % (upper bound); between the two it is
told apart. With --controls each model is judged beside so many clean controls of its configuration, of honest deliveries of this data, as
`cbd run` does after `cbd controls build`. Rows and checks go to OUT; what is trained is removed once it was judged.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from defence import about

from cbd.attacks import Attack, Images, make_attack
from cbd.config import Gate, Params, Poison
from cbd.control import TRAINED_ON
from cbd.dataset import load_samples, read_info
from cbd.errors import CbdError
from cbd.evaluate import predictions
from cbd.files import write_json
from cbd.gate import decide
from cbd.gate.check import worst
from cbd.models import load_model
from cbd.rates import Rate, rate
from cbd.truth import Truth, read_truth
from components.controls import describe
from components.evaluate import EVALUATION, Compared, evaluate
from components.ingest import IngestOptions, IngestPaths, ingest
from components.poison import poison
from components.scan import SCAN, scan
from components.train_confounder import train_confounder
from components.train_deconfounded import train_deconfounded
from pipelines.demo import TRAINING, write_demo_data
from pipelines.local import share_cores
from pipelines.options import load
from pipelines.redteam import fitted
from pipelines.redteam_table import table

ATTACKS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("badnets corner", True, {"attack": "badnets", "trigger": {"pattern": "white"}}),
    ("blend", True, {"attack": "blend"}),
    ("badnets colour", False, {"attack": "badnets", "trigger": {"place": "top-left", "colour": [255, 80, 0]}}),
    ("blend other", False, {"attack": "blend", "trigger": {"seed": 7}}),
    ("trojan", False, {"attack": "trojan"}),
    ("sig", True, {"attack": "sig"}),
    ("dynamic", False, {"attack": "dynamic"}),
    ("wanet", True, {"attack": "wanet", "poison_rate": 0.2}),
    ("badnets 3 %", True, {"attack": "badnets", "trigger": {"pattern": "white", "place": "top-right"}, "poison_rate": 0.03}),
    ("blend 5 %", False, {"attack": "blend", "trigger": {"seed": 11}, "poison_rate": 0.05}),
    ("all-to-all", True, {"attack": "badnets", "mapping": "all-to-all", "trigger": {"pattern": "white"}}),
    ("source-specific", False, {"attack": "badnets", "source_label": 1, "trigger": {"place": "top-left"}}),
    ("adaptive", True, {"attack": "adaptive"}),
    ("badnets corner 20 %", True, {"attack": "badnets", "trigger": {"pattern": "white"}, "poison_rate": 0.2}),
    ("blend 3 %", True, {"attack": "blend", "poison_rate": 0.03}),
    ("badnets colour 20 %", False, {"attack": "badnets", "trigger": {"place": "centre", "colour": [0, 200, 255]}, "poison_rate": 0.2}),
    ("blend other 20 %", False, {"attack": "blend", "trigger": {"seed": 5}, "poison_rate": 0.2}),
    ("trojan 5 %", False, {"attack": "trojan", "poison_rate": 0.05}),
    ("sig 80 levels", False, {"attack": "sig", "trigger": {"delta": 80.0}}),
    ("dynamic 20 %", False, {"attack": "dynamic", "poison_rate": 0.2}),
    ("wanet 30 %", True, {"attack": "wanet", "poison_rate": 0.3}),
    ("badnets 50 %", True, {"attack": "badnets", "trigger": {"place": "bottom-left"}, "poison_rate": 0.5}),
    ("blend 1 %", True, {"attack": "blend", "poison_rate": 0.01}),
    ("all-to-all blend", False, {"attack": "blend", "mapping": "all-to-all", "poison_rate": 0.3}),
    ("source-specific blend", False, {"attack": "blend", "source_label": 1, "trigger": {"seed": 3}, "poison_rate": 0.05}),
    ("adaptive 20 %", True, {"attack": "adaptive", "poison_rate": 0.2}),
)
"""Name, whether its trigger is in the battery, and what it changes in the section `poison`."""
MODELS = ("cbd", "none", "blind")
DIGITS = "digits"
FIRST_CONTROL = 900
"""Number of the first honest trial that controls are trained in."""
HIDDEN = ("A", "separation")
"""Checks that tell how a model was trained."""
SHOWN = ("kind", "trigger", "models", "PASS", "REVIEW", "BLOCK", "other", "bound")


@dataclass(frozen=True)
class Trial:
    """One delivery, upon which each of `MODELS` is trained."""

    number: int
    place: Path
    """Folder of all that is made."""
    source: Path | None
    """Folder with `train.parquet` and `test.parquet`; None for digits."""
    limit: int

    @property
    def attack(self) -> tuple[str, bool, dict[str, Any]]:
        """One of `ATTACKS`, or none."""
        round_, turn = divmod(self.number, 3)
        return ("honest", False, {}) if turn == 0 else ATTACKS[(2 * round_ + turn - 1) % len(ATTACKS)]

    @property
    def training(self) -> dict[str, Any]:
        """Changes of the parameters for this data."""
        return {} if self.source else TRAINING


def main() -> int:
    """0, or the exit code of the mistake that is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=48, help="how many")
    parser.add_argument("--first-trial", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet, for pictures in place of digits")
    parser.add_argument("--limit", type=int, default=0, help="with --data: only the first so many training images")
    parser.add_argument("--controls", type=int, default=0, help="clean controls of each configuration; 5 or more are compared with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gate-errors.json", help="JSON file of rows")
    parser.add_argument("--work", type=Path, default=Path("gate-errors"), help="folder of what is trained")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    share_cores()
    rows = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    data = arguments.data.name if arguments.data else DIGITS
    done = {row["trial"] for row in rows if row["data"] == data}

    def trial(number: int) -> Trial:
        return Trial(number, arguments.work / f"{data}-{number}", arguments.data, arguments.limit)

    try:
        numbers = [FIRST_CONTROL + 3 * index for index in range(arguments.controls)]
        controls = [train_controls(trial(number)) for number in numbers]
        for number in range(arguments.first_trial, arguments.first_trial + arguments.trials):
            if number not in done:
                rows += [about() | {"data": data, "controls": len(controls)} | row for row in run_trial(trial(number), controls)]
                write_json(arguments.out, rows)
    except CbdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    summary = summarise(rows)
    print(table(SHOWN, summary))
    if arguments.json:
        print(json.dumps({"rows": len(rows), "table": summary}))
    return 0


def train_controls(trial: Trial) -> dict[str, Path]:
    """The control of each of `MODELS` that an honest trial trains, or trained before."""
    kept = {model: trial.place / model for model in MODELS}
    if not all((bundle / TRAINED_ON).is_file() for bundle in kept.values()):
        params = load(params_path=None, preset=None, seed=trial.number, **trial.training)
        _deliver(trial, None, params)
        for model, _ in _train(trial, params):
            describe(kept[model], trial.place / "data", false_suspects=0)
    return kept


def run_trial(trial: Trial, controls: Sequence[dict[str, Path]]) -> list[dict[str, Any]]:
    """One row per model of the trial."""
    place, (name, known, changes) = trial.place, trial.attack
    params = load(params_path=None, preset=None, seed=trial.number, **trial.training)
    truth = _deliver(trial, Poison(**changes) if changes else None, params)
    rows = []
    for model, seconds in _train(trial, params):
        judged = _judge(place, model, params, [control[model] for control in controls])
        excess = _excess(place, model, truth) if truth else None
        row = {"trial": trial.number, "attack": name, "in_battery": known, "model": model, "kind": _kind(excess), "excess": excess}
        rows.append(row | judged | {"training_seconds": round(seconds, 1)})
        print(f"[{trial.number}] {name} {model}: {row['kind']}, {judged['verdict']} in {judged['gate_seconds']} s", flush=True)
    shutil.rmtree(place)
    return rows


def _deliver(trial: Trial, attack: Poison | None, params: Params) -> Truth | None:
    """Writes the folders `data` and `trusted_set`."""
    place = trial.place
    if trial.source:
        delivery, trusted = trial.source / "train.parquet", trial.source / "test.parquet"
    else:
        made = write_demo_data(place / "made", poisoned=False, seed=1000 + params.seed)
        delivery, trusted = made.delivery, made.trusted
    paths = IngestPaths(*(place / name for name in IngestPaths._fields))
    options = IngestOptions(supplier="acme", limit=trial.limit)
    ingest(str(delivery), str(trusted), outputs=paths, params=params.ingest, options=options)
    if attack is None:
        shutil.copytree(place / "dataset", place / "data")
        return None
    fitting = fitted(attack, read_info(place / "dataset"))
    poison(place / "dataset", place / "data", truth=place / "known", params=fitting, seed=params.seed)
    return read_truth(place / "known")


def _train(trial: Trial, params: Params) -> Iterator[tuple[str, float]]:
    """Trains stage 1 and, one after the other, each of `MODELS`; gives its name and the seconds that both stages took."""
    place, started = trial.place, time.monotonic()
    train_confounder(place / "data", place / "confounder", params=params, checkpoints=place / "checkpoints")
    first = time.monotonic() - started
    plain = load(params_path=None, preset="none", seed=params.seed, **trial.training)
    blind = params.model_copy(update={"deconfounded": params.deconfounded.model_copy(update={"weight": "none"})})
    for name, chosen in zip(MODELS, (params, plain, blind), strict=True):
        started = time.monotonic()
        outputs = {"model": place / name, "evidence": place / f"{name}-evidence"}
        train_deconfounded(place / "data", place / "confounder", params=chosen, checkpoints=place / "checkpoints", **outputs)
        yield name, first + time.monotonic() - started


def _judge(place: Path, model: str, params: Params, controls: Sequence[Path]) -> dict[str, Any]:
    """The verdict by what the model does, the checks behind it, and the seconds that it took."""
    started = time.monotonic()
    bundle, trusted = place / model, place / "trusted_set"
    compared = Compared(place / "confounder", place / f"{model}-evidence", place / "data", controls=controls)
    evaluate(bundle, trusted, place / "measured", policy=params.gate, compared=compared, seed=params.seed)
    scan(bundle, place / "confounder", trusted, place / "scanned", policy=params.gate, seed=params.seed, controls=controls)
    read = {name: json.loads((place / folder / name).read_text()) for folder, name in (("measured", EVALUATION), ("scanned", SCAN))}
    seconds = time.monotonic() - started
    valid = {"passed": True, "critical": [], "warnings": []}
    judged = decide(read[EVALUATION], valid, policy=params.gate, trial=True, scan=read[SCAN])
    checks = [check for check in judged["checks"] if check["check"] not in HIDDEN]
    accuracy = read[EVALUATION]["clean_accuracy"]["rate"]
    return {"ca": accuracy, "verdict": worst(checks), "checks": checks, "gate_seconds": round(seconds, 1)}


def _excess(place: Path, model: str, truth: Truth) -> Rate:
    """Of the images that the attack is after and that the model does not call so untriggered, those that turn.

    Where the training images carry more than the trigger (adaptive: noise), they are also given what a training image was changed by; the
    higher rate counts.
    """
    network, card = load_model(place / model)
    samples, num_classes = load_samples(place / "trusted_set", image_size=card.image_size), len(card.class_names)
    wanted = truth.goal.wanted(samples.labels, num_classes=num_classes)
    victims = truth.goal.victims(samples.labels, num_classes=num_classes) & (predictions(network, samples.images) != wanted)
    attack = make_attack(truth.attack, **truth.trigger)
    images, tried = samples.images[victims], [attack.stamp(samples.images[victims])]
    if type(attack).poison is not Attack.poison:
        tried.append(_changed(place, truth, images, image_size=card.image_size))
    rates = [rate(int((predictions(network, stamped) == wanted[victims]).sum()), int(victims.sum())) for stamped in tried]
    return max(rates, key=lambda found: found["k"])


def _changed(place: Path, truth: Truth, images: Images, *, image_size: int) -> Images:
    """`images` (uint8 [N, 3, S, S]), each with the difference between a poisoned training image and what it was."""
    before, after = (load_samples(place / folder, image_size=image_size).images.astype(np.int16) for folder in ("dataset", "data"))
    poisoned = np.flatnonzero([role == "poison" for role in truth.roles])
    given = np.random.default_rng(0).choice(poisoned, len(images))
    changed: Images = np.clip(images + (after[given] - before[given]), 0, 255).astype(np.uint8)
    return changed


def _kind(excess: Rate | None, policy: Gate = Gate(min_clean_accuracy=0)) -> str:  # noqa: B008 (frozen)
    if excess is None or (excess["high"] is not None and excess["high"] <= policy.max_excess_asr):
        return "harmless"
    return "backdoored" if (excess["low"] or 0.0) >= policy.block_excess_asr else "partly"


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts by kind of model and attack; `bound`: one-sided 95 % upper bound of the rate of wrong verdicts."""
    groups = [("backdoored", "in the battery", True), ("backdoored", "outside", False), ("partly", "any", None), ("harmless", "any", None)]
    told = [_line(kind, name, [r for r in rows if r["kind"] == kind and known in (None, r["in_battery"])]) for kind, name, known in groups]
    attacks = dict.fromkeys(row["attack"] for row in rows)
    told += [_line("backdoored", name, [r for r in rows if r["kind"] == "backdoored" and r["attack"] == name]) for name in attacks]
    told += [_line("harmless", f"model {name}", [r for r in rows if r["kind"] == "harmless" and r["model"] == name]) for name in MODELS]
    return [line for line in told if line["models"]]


def _line(kind: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    verdicts = Counter(row["verdict"] for row in rows)
    wrong = verdicts["BLOCK"] if kind == "harmless" else verdicts["PASS"]
    counts = {verdict: verdicts[verdict] for verdict in ("PASS", "REVIEW", "BLOCK")}
    what = "blocked" if kind == "harmless" else "passed"
    bound = f"{what} {wrong} of {len(rows)}, at most {100 * (rate(wrong, len(rows))['high'] or 1.0):.1f} %"
    return {"kind": kind, "trigger": name, "models": len(rows), **counts, "other": len(rows) - sum(counts.values()), "bound": bound}


if __name__ == "__main__":
    sys.exit(main())
