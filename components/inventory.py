"""What a finished run left behind: every file that its steps wrote, with its SHA-256; the log names the digest of this list."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd.audit import append
from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import replacing, sha256_file
from cbd.heads import Head
from components.anchors import close_log

INVENTORY = "inventory.json"
"""In the run's folder."""
_KEYS = {"schema_version", "run_id", "artifacts", "files"}


@dataclass(frozen=True, slots=True)
class Inventory:
    """The files of a run, as they were when it was closed. All paths are relative to the run's folder."""

    artifacts: dict[str, str]
    """`<step>/<artifact>`: where it lies."""
    files: dict[str, str]
    """Path: SHA-256."""


def take_inventory(run_dir: Path, records: dict[str, dict[str, Any]]) -> tuple[Inventory, str]:
    """The inventory of a run and the SHA-256 of the `inventory.json` that this writes.

    It holds the pipeline's arguments, the records of all steps but the report's, which is not over yet, and the files of every artifact
    that they name in the run's folder. On a cluster these are what each step kept here: all but the shards of data sets, which the
    data registry has.
    """
    artifacts = {
        f"{step}/{name}": Path(path).resolve().relative_to(run_dir.resolve()).as_posix()
        for step, record in sorted(records.items())
        for name, path in sorted(_paths(record).items())
        if step != "report" and isinstance(path, str) and path and _is_below(Path(path), run_dir)
    }
    places = [run_dir / path for path in artifacts.values()]
    places += [path for path in (run_dir / "records").glob("*.json") if path.name != "report.json"]
    places += sorted((run_dir / "attestations").glob("*.json"))
    places += [path for path in [run_dir / "arguments.json"] if path.is_file()]
    files = {path.relative_to(run_dir).as_posix(): sha256_file(path) for place in places for path in _files(place)}
    content = canonical_json({"schema_version": 1, "run_id": run_dir.name, "artifacts": artifacts, "files": files})
    with replacing(run_dir / INVENTORY) as temporary:
        temporary.write_bytes(content)
    return Inventory(artifacts, files), sha256_file(run_dir / INVENTORY)


def seal(run_dir: Path, workspace: Path, *, records: dict[str, dict[str, Any]], result: dict[str, Any]) -> Head:
    """The head of the log after its line `closed`, which names the run's inventory, its page and how each step ended.

    Args:
        run_dir: the run's folder, named by its id, with `report.html`.
        workspace: with the log.
        records: of all steps, by name.
        result: what the run came to: `verdict` and whether it is `consistent`.

    Raises:
        DataError, EnvironmentFault: the log was altered, or it or its anchors cannot be written.
    """
    inventory, digest = take_inventory(run_dir, records)
    about = {"run_id": run_dir.name, "verdict": result["verdict"], "consistent": result["consistent"], "num_files": len(inventory.files)}
    about |= {"inventory_sha256": digest, "page_sha256": sha256_file(run_dir / "report.html")}
    append(workspace, "closed", {**about, "steps": {name: record.get("status") for name, record in records.items() if name != "report"}})
    return close_log(workspace)


def check_inventory(run_dir: Path, sha256: str) -> Inventory:
    """The inventory of a run, after checking that it is the one of this SHA-256 and that every file is as it says.

    Raises:
        DataError: names the first file that is missing, altered, or a link.
    """
    path = run_dir / INVENTORY
    if not path.is_file() or path.is_symlink():
        raise DataError(f"{path}: missing; restore the run's folder")
    data = path.read_bytes()
    if (found := sha256_file(path)) != sha256:
        raise DataError(f"{path}: altered: SHA-256 is {found[:12]}, the log says {sha256[:12]}; restore the run's folder")
    content = json.loads(data)
    if set(content) != _KEYS or content["schema_version"] != 1:
        raise DataError(f"{path}: schema version {content.get('schema_version')}, expected 1; read it with the version of cbd that made it")
    for name, told in content["files"].items():
        file = run_dir / name
        if not file.resolve().is_relative_to(run_dir.resolve()) or file.is_symlink():
            raise DataError(f"{file}: is a link, or leads out of the run's folder; restore the run's folder")
        if not file.is_file():
            raise DataError(f"{file}: missing; restore the run's folder")
        if (found := sha256_file(file)) != told:
            raise DataError(f"{file}: altered: SHA-256 is {found[:12]}, the inventory says {told[:12]}; restore the run's folder")
    return Inventory(content["artifacts"], content["files"])


def _paths(record: dict[str, Any]) -> dict[str, Any]:
    outputs = record.get("outputs")
    paths = outputs.get("paths") if isinstance(outputs, dict) else None
    return paths if isinstance(paths, dict) else {}


def _is_below(path: Path, folder: Path) -> bool:
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


def _files(place: Path) -> list[Path]:
    found = [place] if place.is_file() else sorted(place.rglob("*"))
    return [path for path in found if path.is_file() and not path.is_symlink()]
