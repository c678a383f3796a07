"""Single steps by hand: the same functions that the pipeline's components call."""

from pathlib import Path
from typing import Any

from cbd.config import Params
from pipelines.launch import check_uri
from pipelines.outcome import find_artifact, find_run
from pipelines.progress import by_hand

SUSPECT_COLUMNS = ["rank", "original_path", "given", "predicted", "sample_weight", "suspect", "sample_id"]


@by_hand()
def ingest(data: str, trusted: str, *, out: Path, params: Params, supplier: str, limit: int, truth: str) -> dict[str, Any]:
    """Counts and digests of a delivery that was taken in to `out`: folders dataset, trusted_set, quarantine and truth."""
    from components.ingest import IngestOptions, IngestPaths
    from components.ingest import ingest as take_in

    check_uri("--data", data)
    check_uri("--trusted", trusted)
    paths = IngestPaths(*(out / name for name in IngestPaths._fields))
    options = IngestOptions(supplier=supplier, limit=limit, truth_source=truth, poison=params.poison, seed=params.seed)
    return take_in(data, trusted, outputs=paths, params=params.ingest, options=options)


@by_hand()
def poison(dataset: Path, out: Path, *, params: Params) -> dict[str, Any]:
    """Counts of a poisoned copy of a data set in `out/dataset`; its ground truth is kept apart in `out/truth`."""
    from components.poison import poison as stamp

    return stamp(dataset, out / "dataset", truth=out / "truth", params=params.poison, seed=params.seed)


@by_hand()
def validate(dataset: Path, trusted_set: Path, out: Path) -> dict[str, Any]:
    """Whether the data set passed, with what failed; the whole is in `out/validation.json`."""
    from components.validate import validate as check

    return check(dataset, out, trusted_set=trusted_set)


@by_hand()
def gate(places: dict[str, Path], params: Params) -> dict[str, Any]:
    """What the decision says that this writes, signed with the workspace's key, to `places["out"]`."""
    from components.decide import Subject, decide

    subject = Subject(places["data"], places["trusted"], places["validation"], places["evaluation"], places["model"])
    return decide(subject, places["out"], policy=params.gate, workspace=places["workspace"], run_id=f"by-hand-{places['out'].name}")


def suspects(run: str, workspace: Path, *, top: int) -> dict[str, Any]:
    """The `top` most suspicious training images of a run, most suspicious first, with their names of classes."""
    import pyarrow.parquet as pq

    from cbd.dataset import read_info, read_manifest

    run_dir = find_run(run, workspace)
    dataset = find_artifact(run_dir, "ingest", "dataset")
    table = pq.read_table(find_artifact(run_dir, "train_deconfounded", "evidence") / "evidence.parquet")
    names, paths = read_info(dataset).class_names, read_manifest(dataset)
    path_of = dict(zip(paths["sample_id"].to_pylist(), paths["original_path"].to_pylist(), strict=True))
    rows = table.sort_by("rank").slice(0, top).to_pylist()
    for row in rows:
        row |= {"original_path": path_of.get(row["sample_id"]), "given": names[row["label"]], "predicted": names[row["predicted"]]}
    listed = [{column: row[column] for column in SUSPECT_COLUMNS} for row in rows]
    return {"suspects": listed, "total": int(sum(table["suspect"].to_pylist())), "run_dir": str(run_dir)}
