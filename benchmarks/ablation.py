"""What each part of the defence is worth: one change at a time to the default preset, over attacks and seeds. Resumes where it was stopped.

    python benchmarks/ablation.py --attacks trojan,blend,sig --seeds 3 --out ablation.json

Without --data it runs on the demo's digits, minutes each; DATA is a folder with `train.parquet` and `test.parquet` in the Hugging Face
image convention. Everything trained is kept beside OUT, in a folder of the same name without its ending; stage 1 is trained once for all
variants that leave it alone.
"""

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from defence import commit, machine

from cbd.config import Params
from cbd.errors import CbdError
from cbd.files import write_json
from pipelines import steps
from pipelines.demo import TRAINING, write_demo_data
from pipelines.local import share_cores
from pipelines.options import ATTACKS, VARIANTS, load, split

FORMULA = {"deconfounded__weight": "formula"}
CHANGES: dict[str, dict[str, Any]] = {
    "cbd": {},
    "no-weight": {"deconfounded__weight": "none"},
    "formula-stored": FORMULA,
    "formula-augmented": {**FORMULA, "deconfounded__confounder_view": "augmented"},
    "formula-normalised": {**FORMULA, "deconfounded__normalise_weight": True},
    "formula-memory": {**FORMULA, "deconfounded__weight_memory": 0.9},
    "formula-cap": {**FORMULA, "deconfounded__weight_cap": 0.5},
    "relabel": {"deconfounded__relabel": True},
    "no-dependence": {"deconfounded__mi_weight": 0.0},
    "distance-correlation": {"deconfounded__dependence": "distance_correlation", "deconfounded__mi_weight": 0.1},
    "hsic": {"deconfounded__dependence": "hsic", "deconfounded__mi_weight": 0.1},
    "bottleneck": {"deconfounded__bottleneck_weight": 1e-4},
    "step-schedule": {"deconfounded__schedule": "step"},
    "batch-64": {"deconfounded__batch_size": 64},
    "no-noise": {"deconfounded__noise": 0.0},
}
"""Name of the variant: what it changes in the default preset."""


def main() -> int:
    """0, or the exit code of the mistake that is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and test.parquet; by default the demo's digits")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many training images; 0 for all")
    parser.add_argument(
        "--attacks", default="trojan,blend,sig", help=f"all ({','.join(ATTACKS)}), or some of them or of {','.join(VARIANTS)}"
    )
    parser.add_argument("--variants", default="all", help=f"some of {','.join(CHANGES)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--epochs", type=int, help="of the deconfounded and the undefended model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    share_cores()
    place = arguments.out.with_suffix("")
    try:
        options = {"params_path": None, "deconfounded__epochs": arguments.epochs}
        if arguments.data is None:
            data, trusted = _digits(place)
            options = {**TRAINING, **{name: value for name, value in options.items() if value is not None}, "params_path": None}
        else:
            data, trusted = arguments.data / "train.parquet", arguments.data / "test.parquet"

        def params_of(*, preset: str, seed: int) -> Params:
            changed = {"preset": "none"} if preset == "none" else {"preset": "cbd", **CHANGES[preset]}
            return load(**{**options, "seed": seed, "poison__attack": "badnets", **changed})

        outputs = steps.redteam(
            str(data),
            str(trusted),
            place,
            limit=arguments.limit,
            params_of=params_of,
            attacks=split(arguments.attacks, ATTACKS, "--attacks", more=VARIANTS),
            presets=("none", *split(arguments.variants, tuple(CHANGES), "--variants")),
            seeds=range(arguments.seeds),
        )
    except CbdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_json(arguments.out, outputs["rows"])
    print(table(outputs["rows"]))
    print(f"\n{datetime.date.today()}, commit {commit()}, {machine()}; medians over {arguments.seeds} seeds")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, in percent: of every variant and attack the median clean accuracy, and median and (highest) excess ASR if there is any."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    lines = ["| variant | " + " | ".join(f"{attack}: CA, excess ASR" for attack in attacks) + " |", "|" + "---|" * (len(attacks) + 1)]
    for preset in dict.fromkeys(row["preset"] for row in rows):
        cells = []
        for attack in attacks:
            of = [row for row in rows if row["preset"] == preset and row["attack"] == attack]
            excess = [100 * row["excess_asr"] for row in of if row["excess_asr"] is not None]
            told = f"; {statistics.median(excess):.1f} ({max(excess):.1f})" if excess else ""
            cells.append(f"{100 * statistics.median(row['ca'] for row in of):.1f}{told}")
        lines.append(f"| {preset} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _digits(place: Path) -> tuple[Path, Path]:
    """Delivery and trusted set of the demo, from an honest supplier."""
    if not (place / "digits").is_dir():
        write_demo_data(place / "digits", poisoned=False)
    return place / "digits" / "delivery", place / "digits" / "trusted"


if __name__ == "__main__":
    sys.exit(main())
