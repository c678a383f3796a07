"""The defence against known attacks, on a data set of yours: prints a table and writes its rows. Resumes where it was stopped.

    python benchmarks/defence.py --data CIFAR10 --limit 10000 --attacks all --presets none,cbd --seeds 3 --out out.json

CIFAR10 is a folder with `train.parquet` and `test.parquet` in the Hugging Face image convention. Everything trained is kept beside OUT, in
a folder of the same name without its ending; rows that stand in OUT are kept, so that a table can grow over days and machines. Delete OUT
to measure anew.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cbd.config import Params
from cbd.errors import CbdError
from cbd.files import write_json
from pipelines import redteam_table, steps
from pipelines.local import share_cores
from pipelines.options import ATTACKS, BASELINES, PRESETS, VARIANTS, load, split


def main() -> int:
    """0, or the exit code of the mistake that is told."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many training images; 0 for all")
    parser.add_argument("--attacks", default="all", help=f"all ({','.join(ATTACKS)}), or some of them or of {','.join(VARIANTS)}")
    parser.add_argument("--presets", default="none,cbd", help=f"some of {','.join(PRESETS + BASELINES)}")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--poison-rate", type=float, help="share of the data set; not for clean-label attacks")
    parser.add_argument("--epochs", type=int, help="of the deconfounded and the undefended model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    share_cores()

    def params_of(*, preset: str, seed: int) -> Params:
        changed = {"poison__attack": ATTACKS[0], "poison__poison_rate": arguments.poison_rate, "deconfounded__epochs": arguments.epochs}
        return load(params_path=None, preset=preset, seed=seed, **changed)

    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    try:
        outputs = steps.redteam(
            str(arguments.data / "train.parquet"),
            str(arguments.data / "test.parquet"),
            arguments.out.with_suffix(""),
            limit=arguments.limit,
            params_of=params_of,
            attacks=split(arguments.attacks, ATTACKS, "--attacks", more=VARIANTS),
            presets=split(arguments.presets, PRESETS, "--presets", more=BASELINES),
            seeds=range(arguments.first_seed, arguments.first_seed + arguments.seeds),
            known=known,
        )
    except CbdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = {row["trial"]: row for row in known} | {row["trial"]: about() | row for row in outputs["rows"]}
    write_json(arguments.out, list(rows.values()))
    print(redteam_table.render(outputs["rows"]))
    print(f"\nMedians over seeds, of all in {arguments.out}:\n\n{redteam_table.medians(list(rows.values()))}")
    for said in sorted({f"{row['date']}, commit {row['commit']}, {row['machine']}" for row in rows.values()}):
        print(f"\n{said}")
    print(f"wrote {arguments.out} ({len(rows)} rows)")
    return 0


def about() -> dict[str, str]:
    """When, with what code and on what a row was measured."""
    return {"date": str(datetime.date.today()), "commit": commit(), "machine": machine()}


def commit() -> str:
    """The commit that is checked out, `+` with changes of its own."""
    told = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def machine() -> str:
    """The hardware in words."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
    return f"{os.cpu_count()} cores ({name}), Python {platform.python_version()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
