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
    parser.add_argument("--epochs", type=int, help="of the deconfounded model and the one to compare with")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    share_cores()
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    rows = {row["draw"]: row for row in known}
    try:
        for number in range(arguments.draws):
            drawn = draw(number, arguments.num_classes)

            def params_of(*, preset: str, seed: int, drawn: dict[str, Any] = drawn) -> Params:
                changed = {"poison__attack": "badnets", "poison__trigger": drawn["trigger"], "poison__target_label": drawn["target"]}
                rate = drawn["rate"] or None
                return load(
                    params_path=None, preset=preset, seed=seed, deconfounded__epochs=arguments.epochs, poison__poison_rate=rate, **changed
                )

            outputs = steps.redteam(
                str(arguments.data / "train.parquet"),
                str(arguments.data / "test.parquet"),
                arguments.out.with_suffix(""),
                limit=arguments.limit,
                params_of=params_of,
                attacks=("badnets" if drawn["rate"] else "clean",),
                presets=("cbd",),
                seeds=(number % SEEDS,),
                known=known,
            )
            row = outputs["rows"][0]
            rows[number] = about() | {"draw": number, "trigger": drawn["trigger"], "held": held(row)} | row
            write_json(arguments.out, list(rows.values()))
    except CbdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    told = [rows[number] for number in range(arguments.draws)]
    shown = (
        "draw",
        "place",
        "pattern",
        "colour",
        "target_label",
        "poison_rate",
        "ca",
        "asr",
        "excess_asr",
        "separated",
        "suspects",
        "held",
    )
    print(table(shown, [row | row["trigger"] for row in told]))
    print(f"\n{sum(row['held'] for row in told)} of {len(told)} held")
    return 0


def held(row: dict[str, Any]) -> bool:
    """Whether the product was right about this draw."""
    if row["excess_asr"] is None:
        return not row["separated"]
    return row["excess_asr"] <= MAX_EXCESS or not row["separated"]


if __name__ == "__main__":
    sys.exit(main())
