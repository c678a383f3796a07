"""What people do with data that is held: rule on refused files and suspects, and look at versions of data sets."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.errors import ConfigError, DataError
from cbd.files import replacing
from pipelines.outcome import find_artifact, find_run
from pipelines.progress import printable

SHOWN = ("id", "status", "reason", "supplier", "first_seen", "label_name", "original_path")
SEVERAL_LABELS = "conflicting-labels"
EXAMPLES = 5


def quarantined(workspace: Path, *, status: str | None, top: int) -> dict[str, Any]:
    """The `top` refused files that were seen last, and how many there are of each status."""
    from components.quarantine import listed

    known = listed(workspace)
    chosen = [held for held in reversed(known) if status in (None, held.status)]
    files = [{name: getattr(held, name) for name in SHOWN} for held in chosen[:top]]
    return {"files": files, "total": len(chosen), "counts": dict(Counter(held.status for held in known))}


def show_quarantined(name: str, workspace: Path, *, out: Path | None) -> dict[str, Any]:
    """All about a refused file; its bytes go to `out`."""
    from components.quarantine import find, read_bytes

    (held,) = find(workspace, [name])
    if out is not None:
        known = dict(read_bytes(workspace, [held.id]))
        if held.id not in known:
            raise DataError(f"{name}: was refused unread ({held.reason}), so there are no bytes; ask the supplier for it")
        with replacing(out) as temporary:
            temporary.write_bytes(known[held.id])
    return held._asdict() | {"written": str(out) if out else None}


def release(names: Sequence[str], workspace: Path, *, by: str, reason: str, label_name: str | None) -> dict[str, Any]:
    """Enters into the audit log that these files come back; the entry's number and hash.

    Raises:
        DataError: no such file, or one that cannot come back.
        ConfigError: it came under several labels, and none was chosen.
    """
    from cbd.config import Ingest
    from components import quarantine

    files = quarantine.find(workspace, names)
    known = {name for name, _ in quarantine.read_bytes(workspace, [held.id for held in files])}
    for held in files:
        if held.id not in known:
            raise DataError(
                f"{held.id[:12]}: was refused unread ({held.reason}), so there are no bytes to release; have it delivered again"
            )
        if (held.reason == SEVERAL_LABELS or held.num_labels > 1) and label_name is None:
            raise ConfigError(f"{held.id[:12]}: came under several labels; say with --label which one holds")
        if held.label_name is None and label_name is None:
            raise ConfigError(f"{held.id[:12]}: came without a label; give it one with --label")
    digests = quarantine.pixel_digests(workspace, files, Ingest())
    labels = {held.id: label_name or held.label_name for held in files}
    return _told(quarantine.rule(workspace, "release", digests, labels, by=printable(by), reason=printable(reason)), len(files))


def reject(names: Sequence[str], workspace: Path, *, run: str | None, by: str, reason: str) -> dict[str, Any]:
    """Enters into the audit log that these files, or images of a run's data set (all its suspects without names), never come again.

    Raises:
        DataError: no such file, image or run.
    """
    from cbd.config import Ingest
    from components import quarantine
    from components.records import read_records

    if run is None:
        digests = quarantine.pixel_digests(workspace, quarantine.find(workspace, names), Ingest())
    else:
        run_dir = find_run(run, workspace)
        if run_dir.parent.parent != workspace.resolve():
            raise ConfigError(f"--run {run}: is a run of {run_dir.parent.parent}; give that as --workspace, where the ruling must stand")
        chosen = [_whole(name, run_dir) for name in names] or _suspects(run_dir)
        dataset, model = find_artifact(run_dir, "ingest", "dataset"), read_records(str(run_dir / "records"))["ingest"]["outputs"]["model"]
        digests = dict(quarantine.send(dataset, chosen, workspace, run_id=run_dir.name, model=model))
    return _told(quarantine.rule(workspace, "reject", digests, {}, by=printable(by), reason=printable(reason)), len(digests))


def versions(workspace: Path) -> dict[str, Any]:
    """Every version in the registry, the latest first."""
    from cbd.dataset import DatasetInfo
    from components.places import DELIVERY, POISONED, kind_of
    from components.registry import versions as known
    from components.suspect_list import SuspectList

    rows = []
    for tag, about in reversed(known(workspace)):
        row = {"tag": tag, "kind": kind_of(tag), "num_images": None, "num_classes": None, "supplier": None}
        if isinstance(about, SuspectList):
            row |= {"num_images": about.num_suspects, "digest": about.digest}
        else:
            row["num_classes"] = len(about.class_names)
        if isinstance(about, DatasetInfo):
            row |= {"num_images": about.num_images, "supplier": about.supplier, "digest": about.digest}
            row |= {"kind": POISONED} if about.trial and kind_of(tag) == DELIVERY else {}
        rows.append(row)
    return {"versions": rows}


def diff(old: str, new: str, workspace: Path) -> dict[str, Any]:
    """What changed between two versions, by the pixels of their images."""
    from cbd.dataset import read_info, read_manifest
    from components.registry import fetch

    seen: list[dict[str, tuple[str, str, str]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, tag in enumerate((old, new)):
            place = Path(folder) / str(number)
            fetch(tag, place, workspace=workspace)
            names, manifest = read_info(place).class_names, read_manifest(place)
            columns = (manifest[name].to_pylist() for name in ("pixel_digest", "label", "source", "original_path"))
            seen.append({pixels: (names[label], source, path) for pixels, label, source, path in zip(*columns, strict=True)})
    before, after = seen
    added, removed = [[one[key] for key in one if key not in other] for one, other in ((after, before), (before, after))]
    moved = [(before[key], after[key]) for key in before if key in after and before[key][0] != after[key][0]]
    return {
        "old": {"tag": old, "num_images": len(before)},
        "new": {"tag": new, "num_images": len(after)},
        "added": _counts(added),
        "removed": _counts(removed),
        "relabelled": {"num_images": len(moved), "examples": [f"{now[2]}: {was[0]} -> {now[0]}" for was, now in moved[:EXAMPLES]]},
    }


def checkout(version: str, out: Path, workspace: Path, *, truth: Path | None) -> dict[str, Any]:
    """What was brought to `out`, and what is known of its poison to `truth`."""
    from cbd.bundle import BundleCard, bundle_digest
    from components.registry import fetch

    if truth is not None and (out.resolve() in (truth.resolve(), *truth.resolve().parents) or truth.resolve() in out.resolve().parents):
        raise ConfigError(f"--truth {truth}: lies in --out {out}, or holds it; write the truth beside the data set")
    about = fetch(version, out, workspace=workspace, truth=truth)
    bundle = isinstance(about, BundleCard)
    told = {"digest": bundle_digest(out)} if bundle else {"num_images": about.num_images, "digest": about.digest}
    return {"out": str(out), "truth": str(truth) if truth else None} | told


def add(folder: Path, workspace: Path, *, kind: str | None, truths: Sequence[Path]) -> dict[str, Any]:
    """The version under which something lies in the registry from now on; no run learns from it by that.

    Raises:
        ConfigError: truths of what is not poisoned on purpose.
        DataError: it is missing, altered or no such thing.
    """
    from cbd.dataset import read_info
    from components import version

    poisoned = kind == "canary" or (kind is None and read_info(folder).trial)
    if truths and not poisoned:
        raise ConfigError(f"--truth {truths[0]}: {folder} is no poisoned copy; only those are kept with their truth")
    if poisoned:
        return (version.version_canary if kind else version.version)(folder, workspace=str(workspace), truths=truths)
    store = {"trusted": version.version_trusted_set, "control": version.version_control, None: version.version}[kind]
    return store(folder, workspace=str(workspace))


def _counts(images: list[tuple[str, str, str]]) -> dict[str, Any]:
    classes, suppliers = Counter(image[0] for image in images), Counter(image[1] for image in images)
    by = {"classes": dict(sorted(classes.items())), "suppliers": dict(sorted(suppliers.items()))}
    return {"num_images": len(images), **by, "examples": [image[2] for image in images[:EXAMPLES]]}


def _whole(name: str, run_dir: Path) -> str:
    """The sample id that begins so in the run's data set."""
    from cbd.dataset import read_manifest
    from components.quarantine import MIN_ID

    hits = [
        sample for sample in read_manifest(find_artifact(run_dir, "ingest", "dataset"))["sample_id"].to_pylist() if sample.startswith(name)
    ]
    if len(name) < MIN_ID or len(hits) != 1:
        raise DataError(
            f"{name!r}: {len(hits)} images of run {run_dir.name} have a sample id that begins so; `cbd suspects {run_dir.name}` lists them"
        )
    return str(hits[0])


def _suspects(run_dir: Path) -> list[str]:
    from components.suspect_list import suspect_ids

    found = suspect_ids(find_artifact(run_dir, "train_deconfounded", "evidence") / "evidence.parquet")
    if not found:
        raise DataError(f"{run_dir.name}: has no suspects; name sample ids")
    return found


def _told(entry: dict[str, Any], num: int) -> dict[str, Any]:
    told = entry["data"]
    return {"action": told["action"], "num_files": num, "by": told["by"], "reason": told["reason"], "entry": entry["seq"]}
