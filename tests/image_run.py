"""Started inside the image by image.sh: every component of the pipeline, by KFP's executor, on a small delivery."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from small_delivery import write_small

from cbd.images import encode_png
from components import STEPS
from components.records import read_records

REFUSED = {"ingest", "validate", "decide", "report"}
"""What runs where validation refuses the delivery."""


def main() -> None:
    """Ends with an error unless each step ran and succeeded, and each left what KFP's executor writes."""
    root = write_small(Path(tempfile.mkdtemp()))
    _check(_run(root, "--baseline"), set(STEPS))
    (root / "delivery" / "0" / "tiny.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8)))
    _check(_run(root), REFUSED)
    print(f"{len(STEPS)} components ran, and the refusal")


def _run(root: Path, *more: str) -> Path:
    """The folder of a run that ended with a verdict."""
    command = ["cbd", "run", "--data", root / "delivery", "--trusted", root / "trusted", "--workspace", root / "workspace", *more]
    done = subprocess.run([*command, "--params", root / "params.yaml", "--json"], stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    if result["verdict"] is None or result["alarms"] or result["stopped"]:
        sys.exit(f"error: exit code {done.returncode}, {result}")
    return Path(result["run_dir"])


def _check(run: Path, steps: set[str]) -> None:
    states = {name: record["status"] for name, record in read_records(str(run / "records")).items()}
    outputs = list((run / "kfp").rglob("executor_output.json"))
    if states != dict.fromkeys(steps, "succeeded") or len(outputs) != len(steps):
        sys.exit(f"error: expected {sorted(steps)} to succeed and to write an output each, found {states} and {len(outputs)} outputs")


if __name__ == "__main__":
    main()
