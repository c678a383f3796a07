"""A training in several processes: the same function in each, started by torchrun here, or by Kubeflow Trainer on several machines.

The first process writes what the function writes, in a folder of the job; from there it goes to its place only when all have ended well.
The others write elsewhere, and it is thrown away. Their stdout is thrown away, too.
"""

import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cbd import errors
from cbd.config import Params, Training
from cbd.errors import CbdError, EnvironmentFault
from cbd.files import replacing, write_json
from components.parallel import num_cores
from components.records import TOLD_AS, told_as

Train = TypeVar("Train", bound=Callable[..., dict[str, Any]])
JOB, RESULT, REFUSED = "job.json", "result.json", "refused-{rank}.json"
ENDED = re.compile(r"rank\s+: (\d+) .*\n\s+exitcode\s+: (-?\d+)")
"""What torchrun tells of each process that failed."""


def in_processes(*outputs: str) -> Callable[[Train], Train]:
    """Makes a training one that runs in as many processes as `params.training` says, in this one if that is a single one.

    What it gives then says in how many, too. It takes `params` and `checkpoints`, which all processes can read and the first can write.

    Args:
        outputs: the training's parameters that are paths which it writes; other paths it reads.

    Raises (when the training is called):
        CbdError: the one that a process raised.
        EnvironmentFault: a process ended in another way.
    """

    def decorate(train: Train) -> Train:
        @functools.wraps(train)
        def spread(*args: Any, **kwargs: Any) -> dict[str, Any]:
            given = inspect.signature(train).bind(*args, **kwargs).arguments
            training: Training = given["params"].training
            if training.is_alone or "LOCAL_RANK" in os.environ:
                return train(*args, **kwargs)
            return _together(f"{train.__module__}:{train.__name__}", given, outputs)

        return spread  # type: ignore[return-value]

    return decorate


def _together(function: str, given: dict[str, Any], outputs: tuple[str, ...]) -> dict[str, Any]:
    training: Training = given["params"].training
    with _job_folder(given, outputs) as folder:
        places = {name: folder / "out" / name for name in outputs}
        if training.nodes > 1:
            places |= _staged(folder, {name: value for name, value in given.items() if name not in (*outputs, "checkpoints")})
        _write_job(folder, function, given | places, outputs)
        _run(folder, training)
        told: dict[str, Any] = json.loads((folder / RESULT).read_text())
        for name in outputs:
            with replacing(given[name]) as temporary:
                shutil.move(places[name], temporary)
    return told | {"training": training.model_dump()}


@contextlib.contextmanager
def _job_folder(given: dict[str, Any], outputs: tuple[str, ...]) -> Iterator[Path]:
    """A folder that vanishes in the end: beside what is written, or where other machines see it, too."""
    near: Path = given["checkpoints"] if given["params"].training.nodes > 1 else given[outputs[0]].parent
    near.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".training-", dir=near, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _staged(folder: Path, given: dict[str, Any]) -> dict[str, Path]:
    """Copies of the paths among `given`, where other machines see them."""
    paths = {name: value for name, value in given.items() if isinstance(value, Path)}
    return {name: Path(shutil.copytree(path, folder / "in" / name)) for name, path in paths.items()}


def _write_job(folder: Path, function: str, given: dict[str, Any], outputs: tuple[str, ...]) -> None:
    paths = {name: str(value) for name, value in given.items() if isinstance(value, Path)}
    others = {"tracked": given.get("tracked"), "params": given["params"].model_dump(mode="json"), "told_as": TOLD_AS.get()}
    write_json(folder / JOB, {"function": function, "paths": paths, "outputs": outputs, **others})


def _run(folder: Path, training: Training) -> None:
    """Runs the job; raises what ended it."""
    if training.nodes > 1:
        from components.trainjob import follow

        why = follow(command(folder), training, folder=folder)
    else:
        why = _torchrun(folder, training.processes)
    for refused in sorted(folder.glob(REFUSED.format(rank="*"))):
        told = json.loads(refused.read_text())
        raise getattr(errors, told["kind"])(told["message"])
    if why or not (folder / RESULT).is_file():
        raise EnvironmentFault(
            f"training in {training.nodes * training.processes} processes: {why or 'it left no result'}; "
            "the output above says more; run it again, it goes on from the last whole epoch"
        )


def command(folder: Path, *options: str) -> list[str]:
    """The command that runs the job of this folder; how many processes on how many machines stands in `options` or in variables PET_*."""
    return ["python", "-m", "torch.distributed.run", *options, "-m", "components.processes", str(folder)]


def _torchrun(folder: Path, processes: int) -> str | None:
    """Runs the job on this machine; why it failed, or None."""
    here = ("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}")
    threads = {"OMP_NUM_THREADS": str(max(1, int(os.environ.get("OMP_NUM_THREADS", num_cores())) // processes))}
    asked = [sys.executable, *command(folder, *here)[1:]]
    lines = []
    with subprocess.Popen(
        asked,
        env=os.environ | threads,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="backslashreplace",
    ) as child:
        assert child.stdout is not None
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                lines = [*lines[-200:], line]
        except BaseException:
            child.terminate()  # torchrun ends its children
            raise
    return None if child.returncode == 0 else _why("".join(lines), child.returncode)


def _why(text: str, code: int) -> str:
    """What ended the process that failed, by torchrun's account: one that was killed comes first, because others fail when it is gone.

    SIGTERM comes last: torchrun itself sends it to the others.
    """
    failed = sorted((int(ended) == -signal.SIGTERM, int(ended), int(rank)) for rank, ended in ENDED.findall(text))
    if not failed:
        return f"torchrun ended with code {code}"
    _, ended, rank = failed[0]
    how = f"was ended by {signal.Signals(-ended).name}" if ended < 0 else f"ended with code {ended}"
    return f"process {rank} {how}"


def work(folder: Path) -> None:
    """Does one process's part of the job of this folder."""
    from cbd import distributed

    job = json.loads((folder / JOB).read_text())
    module, _, name = job["function"].partition(":")
    train = getattr(importlib.import_module(module), name)
    given: dict[str, Any] = {key: Path(path) for key, path in job["paths"].items()}
    given["params"] = Params.model_validate(job["params"])
    rank = os.environ["RANK"]
    try:
        with distributed.started(), contextlib.ExitStack() as stack:
            if job["told_as"]:
                stack.enter_context(told_as(job["told_as"]))
            if distributed.is_first():
                given |= {"tracked": tuple(job["tracked"])} if job["tracked"] else {}
                write_json(folder / RESULT, train(**given))
            else:
                elsewhere = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
                train(**given | {output: elsewhere / output for output in job["outputs"]})
    except CbdError as error:
        write_json(folder / REFUSED.format(rank=rank), {"kind": type(error).__name__, "message": str(error)})
        raise SystemExit(1) from None


if __name__ == "__main__":
    work(Path(sys.argv[1]))
