"""The defence against triggers drawn at random: rate, corner, pattern, colour, target and seed. Resumes where it was stopped.

    python benchmarks/draws.py --data CIFAR10 --limit 10000 --draws 20 --out draws.json

CIFAR10 is a folder with `train.parquet` and `test.parquet` in the Hugging Face image convention. A draw without poison counts as held if
nothing separates; any other if the excess ASR is at most 5 points, or the run itself says that it found nothing (then no model passes).
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from defence import about

from cbd.config import Params
from cbd.errors import CbdError
from cbd.files import write_json
from pipelines import steps
from pipelines.local import share_cores
from pipelines.options import load
from pipelines.redteam_table import table

RATES = (0.0, 0.005, 0.01, 0.03, 0.1, 0.2)
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
SEEDS = 3
"""Of the trainings: so many models without poison to compare with."""
MAX_EXCESS = 0.05
SHOWN = ("draw", "place", "pattern", "colour", "target_label", "poison_rate", "ca", "asr", "excess_asr", "separated", "suspects", "held")


def draw(number: int, num_classes: int) -> dict[str, Any]:
    """What draw `number` changes in the parameters; its rate may be 0."""
    chance = random.Random(number)
    trigger = {
        "pattern": chance.choice(("checker", "white")),
        "place": chance.choice(CORNERS),
        "colour": [chance.choice((0, 128, 255)) for _ in range(3)],
    }
    if not any(trigger["colour"]):
        trigger["colour"] = [255, 255, 255]
    return {"rate": chance.choice(RATES), "target": chance.randrange(num_classes), "trigger": trigger}


def main() -> int:
    """0, or the exit code of the mistake that is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many training images; 0 for all")
    parser.add_argument("--num-classes", type=int, default=10, help="targets are drawn from so many")
    parser.add_argument("--draws", type=int, default=20, help="how many")
    parser.add_argument("--first-draw", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="of the deconfounded model and the one to compare with")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    share_cores()
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    rows = {row["draw"]: row for row in known}
    try:
        numbers = range(arguments.first_draw, arguments.first_draw + arguments.draws)
        for number in numbers:
            rows[number] = measure(number, arguments, known)
            write_json(arguments.out, list(rows.values()))
    except CbdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    told = [rows[number] for number in numbers]
    print(table(SHOWN, [row | row["trigger"] for row in told]))
    print(f"\n{sum(row['held'] for row in told)} of {len(told)} held")
    return 0


def measure(number: int, arguments: argparse.Namespace, known: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of draw `number`, one of `known` if it was measured before."""
    drawn = draw(number, arguments.num_classes)

    def params_of(*, preset: str, seed: int) -> Params:
        changed = {"attack": "badnets", "trigger": drawn["trigger"], "target_label": drawn["target"], "poison_rate": drawn["rate"] or None}
        poison = {f"poison__{name}": value for name, value in changed.items()}
        return load(params_path=None, preset=preset, seed=seed, deconfounded__epochs=arguments.epochs, **poison)

    outputs = steps.redteam(
        *(str(arguments.data / name) for name in ("train.parquet", "test.parquet")),
        arguments.out.with_suffix(""),
        limit=arguments.limit,
        params_of=params_of,
        attacks=("badnets" if drawn["rate"] else "clean",),
        presets=("cbd",),
        seeds=(number % SEEDS,),
        known=known,
    )
    row = outputs["rows"][0]
    return about() | {"draw": number, "trigger": drawn["trigger"], "held": held(row)} | row


def held(row: dict[str, Any]) -> bool:
    """Whether the product was right about this draw."""
    if row["excess_asr"] is None:
        return not row["separated"]
    return row["excess_asr"] <= MAX_EXCESS or not row["separated"]


if __name__ == "__main__":
    sys.exit(main())
