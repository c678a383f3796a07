"""What the commands `audit` do: evidence is verified, shown as a timeline, and proven to outsiders."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cbd.errors import ConfigError, DataError
from cbd.files import replacing
from cbd.heads import walk
from cbd.keys import KEYS, PUBLIC, load_public_key, read_public_key
from components.keyring import trusted_keys
from components.proof import check_proof, make_proof
from components.verification import verify_all, verify_run
from pipelines.options import WORKSPACE

DEMOS = Path("cbd-demo")
"""Where `cbd demo` keeps its runs, each with a workspace of its own."""
SHOWN = ("verdict", "sentence", "name", "version", "alias", "from", "reason", "by", "expires", "supplier", "accepted", "num_files")
"""What a timeline tells of an event's data, in this order."""


def verify(subject: str | None, workspace: Path, *, trust: Sequence[Path], since: Path | None = None) -> Iterator[str]:
    """A sentence for everything that holds of a workspace (None), a run or a proof; raises for the first thing that does not."""
    keys, place = [read_public_key(path) for path in trust], place_of(workspace)
    if subject is None:
        yield f"workspace: {place}"
        yield from verify_all(place, trusted=keys)
    elif Path(subject).is_file():
        if not keys:
            own = [load_public_key(place)] if (place / KEYS / PUBLIC).exists() else []
            keys = own + trusted_keys(place)
        if not keys:
            raise ConfigError(f"{subject}: a proof is worth what its key is; name the public key that you trust with --trust KEY")
        yield from check_proof(Path(subject), keys, since=since)
    else:
        folder = _find(subject, place)
        yield from verify_run(folder, folder.parent.parent, trusted=keys)


def timeline(run: str | None, workspace: Path) -> dict[str, Any]:
    """`events`: time, line, event, run and the gist of each entry of the verified log, oldest first; of all, or about one run."""
    run_id = Path(run).name if run else None
    rows = []
    for line in walk(place_of(workspace)):
        data = line.entry["data"]
        if run_id in (None, data.get("run_id")):
            gist = "; ".join(f"{name} {data[name]}" for name in SHOWN if data.get(name) not in (None, ""))
            about = {"time": line.entry["time"], "line": line.entry["seq"], "event": line.entry["event"], "run": data.get("run_id") or "-"}
            rows.append({**about, "gist": gist})
    if run_id and not rows:
        raise DataError(f"{run}: the log of {workspace} says nothing of such a run; see all with: cbd audit show")
    return {"events": rows}


def prove(run: str, workspace: Path, *, since: Path | None, out: Path) -> dict[str, Any]:
    """What the proof that this writes to `out` proves."""
    proof, content = make_proof(place_of(workspace), Path(run).name, since=since)
    with replacing(out) as temporary:
        temporary.write_bytes(content)
    return {"run": Path(run).name, "lines": [each["entry"]["seq"] for each in proof["lines"]], "of": proof["head"]["size"], "out": str(out)}


def place_of(workspace: Path) -> Path:
    """The workspace that is meant; without one at the default place that of the latest demo, if there was one here."""
    if workspace == WORKSPACE and not workspace.exists() and (demos := sorted(DEMOS.glob("*/workspace"))):
        return demos[-1].resolve()
    return workspace.resolve()


def _find(run: str, workspace: Path) -> Path:
    """The folder of a run, given its id or the folder itself."""
    for folder in (Path(run), workspace / "runs" / run):
        if folder.is_dir():
            return folder.resolve()
    raise DataError(f"{run}: no such run or proof; give a run of {workspace}, or name another workspace with --workspace")
