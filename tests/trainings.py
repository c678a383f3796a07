"""Trainings that do almost nothing, for the tests of what runs them in several processes."""

import os
import signal
from pathlib import Path
from typing import Any

from cbd.config import Gate, Params, Training
from cbd.distributed import agree, is_first, num_processes
from cbd.errors import DataError
from components.checkpoints import going_on
from components.processes import in_processes
from components.records import progress


def params(processes: int, nodes: int = 1) -> Params:
    return Params(gate=Gate(min_clean_accuracy=0), training=Training(processes=processes, nodes=nodes))


@in_processes("out")
def counting(dataset: Path, out: Path, *, params: Params, checkpoints: Path, tracked: tuple[str, str] | None = None) -> dict[str, Any]:
    """Writes what it read and how many took part."""
    out.mkdir(parents=True)
    progress("counting", num_processes(), num_processes())
    (out / "made").write_text(f"{(dataset / 'given').read_text()} by {num_processes()}")
    (checkpoints / f"first-{is_first()}").touch()
    return {"tracked": tracked, "agreed": agree(num_processes())}


@in_processes("out")
def dying(dataset: Path, out: Path, *, params: Params, checkpoints: Path) -> dict[str, Any]:
    """One process is killed while the others wait for it, with half of the output written."""
    out.mkdir(parents=True)
    (out / "half").touch()
    if not is_first():
        os.kill(os.getpid(), signal.SIGKILL)
    agree(1)
    return {}


@in_processes("out")
def refusing(dataset: Path, out: Path, *, params: Params, checkpoints: Path) -> dict[str, Any]:
    """Refuses what it is given."""
    raise DataError(f"{dataset}: nothing in it")


@in_processes("out")
def keeping(dataset: Path, out: Path, *, params: Params, checkpoints: Path) -> dict[str, Any]:
    """Saves one epoch, as a session does it."""
    given = going_on(checkpoints / "f00" / "a.safetensors", lambda done, total, measures: None)
    found = given["checkpoint"].exists()
    if is_first():
        given["checkpoint"].write_bytes(b"epoch 1")
    given["on_epoch"](1, 1, {})
    out.mkdir(parents=True, exist_ok=True)
    return {"found": agree(found) and found}
