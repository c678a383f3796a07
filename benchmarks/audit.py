"""How long an audit takes: a workspace with the records of many runs, signed through the real functions, then verified in processes.

The artifacts are tiny, so that what is measured is the log, the heads, the decisions and the bookkeeping; hashing files adds about a second
per gigabyte and core.

    .venv/bin/python benchmarks/audit.py --json
    .venv/bin/python benchmarks/audit.py --runs 100 --keep FOLDER
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cbd.audit import append  # noqa: E402
from cbd.bundle import CARD, WEIGHTS, BundleCard, bundle_digest  # noqa: E402
from cbd.config import Gate, canonical_json, section_digest  # noqa: E402
from cbd.decision import SCHEMA_VERSION  # noqa: E402
from cbd.files import sha256_file, write_json  # noqa: E402
from components.anchors import close_log  # noqa: E402
from components.decision import write_decision  # noqa: E402
from components.git import git  # noqa: E402
from components.inventory import seal  # noqa: E402
from components.records import read_records  # noqa: E402

CLASSES = ("ant", "bee")
GOALS = {"all_seconds": 60.0, "one_run_seconds": 4.0, "one_run_besides_imports_seconds": 2.0}


def make_workspace(workspace: Path, num_runs: int, heads_every: int) -> None:
    """A workspace of so many closed runs; a head after every few, as if the others were closed by faster processes."""
    registry = workspace / "registry"
    registry.mkdir(parents=True)
    git(registry, "init", "--quiet", "--initial-branch=main")
    git(registry, "commit", "--quiet", "--allow-empty", "--message", "Start")
    for number in range(num_runs):
        make_run(workspace, f"run-{number:05d}", anchored=number % heads_every == 0)


def make_run(workspace: Path, run_id: str, *, anchored: bool) -> None:
    """A run with a data set, a trusted set, a model, all measurements, a signed decision, and the line that closes it."""
    run_dir, place = workspace / "runs" / run_id, workspace / "runs" / run_id / "kfp"
    git(workspace / "registry", "commit", "--quiet", "--allow-empty", "--message", run_id)
    digests: dict[str, Any] = {name: make_dataset(place / name, f"{run_id}{name}") for name in ("dataset", "trusted_set")}
    digests = {"data": digests["dataset"], "trusted": digests["trusted_set"], "model": make_bundle(place / "model", digests["dataset"])}
    for name in ("evaluation", "validation", "canary", "scan"):
        write_json(place / name / f"{name}.json", {"run": run_id, "measured": list(range(200))})
        digests[name] = sha256_file(place / name / f"{name}.json")
    append(
        workspace, "delivery", {"run_id": run_id, "supplier": "acme", "digests": {"data": digests["data"], "trusted": digests["trusted"]}}
    )
    policy = Gate(min_clean_accuracy=0.9)
    checks = [{"check": "B", "name": f"trigger-{i}", "result": "PASS", "sentence": "At most 1 % of images turn."} for i in range(12)]
    decision = {"schema_version": SCHEMA_VERSION, "run_id": run_id, "created": "2026-11-28T00:00:00Z", "verdict": "INCONCLUSIVE"}
    decision |= {"sentence": "INCONCLUSIVE: synthetic", "checks": checks, "trial": False, "policy": policy.model_dump(mode="json")}
    decision |= {"policy_sha256": section_digest(policy), "digests": digests, "attempt": {"number": 1, "config_sha256": "0" * 64}}
    digest = write_decision(decision, place / "decision", workspace)
    told = {"name": "model-00000000", "version": run_id, "alias": None, "model_digest": digests["model"], "branch": "record"}
    append(workspace, "register", {**told, "decision_digest": digest, "run_id": run_id})
    paths = {"ingest": ("dataset", "trusted_set"), "validate": ("validation",), "evaluate": ("evaluation",), "canary": ("canary",)}
    paths |= {"train_deconfounded": ("model",), "decide": ("decision",)}
    for step, names in paths.items():
        outputs = {"paths": {name: str(place / name) for name in names}}
        write_json(run_dir / "records" / f"{step}.json", {"step": step, "status": "succeeded", "outputs": outputs})
    outputs = {"paths": {"scanned": str(place / "scan")}}
    write_json(run_dir / "records" / "scan.json", {"step": "scan", "status": "succeeded", "outputs": outputs})
    (run_dir / "report.html").write_text(f"<title>{run_id}</title>" + " " * 100_000)
    if anchored:
        close_log(workspace)
    seal(run_dir, workspace, records=read_records(str(run_dir / "records")), result={"verdict": "INCONCLUSIVE", "consistent": True})


def make_dataset(folder: Path, content: str) -> str:
    """The digest of a data set of one shard."""
    folder.mkdir(parents=True)
    (folder / "shard-00000.parquet").write_bytes(content.encode() * 5000)
    info: dict[str, Any] = {"schema_version": 2, "class_names": CLASSES, "num_images": 2, "class_counts": [1, 1], "image_sizes": {}}
    info |= {"supplier": "acme", "trial": False, "shards": {"shard-00000.parquet": sha256_file(folder / "shard-00000.parquet")}}
    digest = hashlib.sha256(canonical_json(info)).hexdigest()
    write_json(folder / "dataset.json", {**info, "digest": digest})
    return digest


def make_bundle(folder: Path, data_digest: str) -> str:
    """The digest of a bundle."""
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(data_digest.encode() * 10_000)
    about: dict[str, Any] = {"kind": "deconfounded", "architecture": "wrn-16-1", "class_names": CLASSES, "image_size": 32, "params": {}}
    card = BundleCard(**about, data_digest=data_digest, seed=0, trial=False, weights_sha256=sha256_file(folder / WEIGHTS))
    write_json(folder / CARD, card.model_dump(mode="json"))
    return bundle_digest(folder)


def measure(arguments: list[str], workspace: Path) -> dict[str, float]:
    """Seconds and peak memory of a `cbd audit verify` in a process of its own, and of the imports alone."""
    code = f"import time, sys; started = time.monotonic(); from pipelines import evidence; print(time.monotonic() - started); {_RUN}"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *arguments, str(workspace)], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"error: cbd audit verify failed: {done.stderr.strip()[-300:]}")
    imports, memory_kib = done.stdout.split()[0], done.stdout.split()[-1]
    return {"seconds": round(seconds, 2), "imports_seconds": round(float(imports), 2), "peak_mb": round(int(memory_kib) / 1024, 1)}


_RUN = (
    "from pathlib import Path; import resource; "
    "run = None if sys.argv[1] == '--all' else sys.argv[1]; "
    "print(sum(1 for _ in evidence.verify(run, Path(sys.argv[2]), trust=()))); "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="Runs in the workspace (default 1000).")
    parser.add_argument("--heads-every", type=int, default=1, help="One run in so many writes a head of its own besides the closing one.")
    parser.add_argument("--keep", type=Path, help="Where to keep the workspace; made there unless it exists.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = options.keep or Path(folder) / "workspace"
        started = time.monotonic()
        if not workspace.exists():
            make_workspace(workspace, options.runs, options.heads_every)
        made = time.monotonic() - started
        size = (workspace / "audit.jsonl").stat().st_size
        with (workspace / "audit.jsonl").open("rb") as log:
            num_lines = sum(1 for _ in log)
        one, everything = (measure([run], workspace) for run in (f"run-{options.runs // 2:05d}", "--all"))
    result: dict[str, Any] = {"runs": options.runs, "log_lines": num_lines, "log_bytes": size, "made_seconds": round(made, 1)}
    result |= {"all": everything, "one_run": one, "goals": GOALS, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}
    besides = one["seconds"] - one["imports_seconds"]
    result["within_goals"] = (
        everything["seconds"] <= GOALS["all_seconds"]
        and one["seconds"] <= GOALS["one_run_seconds"]
        and besides <= GOALS["one_run_besides_imports_seconds"]
    )
    if options.json:
        print(json.dumps(result))
    else:
        print(f"{options.runs} runs, {num_lines} lines; all: {everything}; one run: {one}; within goals: {result['within_goals']}")


if __name__ == "__main__":
    main()
