"""Runs on disk as the pipeline leaves them, small and made by hand: what the tests of the report read."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cbd.anomaly import anomaly_indices
from cbd.config import canonical_json
from cbd.dataset import make_row, to_batches, write_dataset
from cbd.files import write_json
from cbd.rates import rate
from cbd.truth import Truth, write_truth

CLASSES = ("zero", "one", "two", "three")
POISONED = 12


def solid(colour: tuple[int, int, int], side: int = 32) -> bytes:
    """An image of one colour as PNG bytes."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def colours(num: int) -> list[tuple[int, int, int]]:
    """Distinct saturated colours that a page does not use by itself."""
    return [(255 - 5 * (i % 24), 0 if i < 24 else 120, 130 + 5 * (i % 24)) for i in range(num)]


def make_run(run: Path, *, verdict: str = "PASS", class_names: tuple[str, ...] = CLASSES, pictures: list[bytes] | None = None) -> str:
    """The records folder of a finished run under `run`: 60 or more images, 12 of them poisoned, 3 refused."""
    pictures = pictures or [solid(colour) for colour in colours(48)] + [solid((i, 90, 20)) for i in range(12)]
    kfp = run / "kfp"
    rows = [make_row(data, label=i % len(class_names), original_path=f"{i:03d}.png", source="acme") for i, data in enumerate(pictures)]
    info = write_dataset(kfp / "dataset", to_batches(rows), class_names=class_names, supplier="acme")
    roles = ["poison" if i < POISONED else "clean" for i in range(len(rows))]
    ids = [row.sample_id for row in rows]
    write_truth(kfp / "truth", Truth("badnets", 0, 0.1, {"size": 3}, ids, roles, [row.label for row in rows]))
    _write_quarantine(kfp / "quarantine")
    _write_training(kfp, ids, [row.label for row in rows], num_classes=len(class_names))
    write_json(kfp / "evaluation" / "evaluation.json", evaluation(class_names))
    sha256 = write_canary(kfp / "canary", info.digest)
    write_scan(kfp / "scanned", len(class_names))
    decided = write_decision(kfp / "decision", verdict)
    _write_records(run / "records", kfp, info.digest, verdict=verdict, decided=decided, accepted=len(rows), class_names=class_names)
    edit_record(str(run / "records"), "canary", outputs={"reused": False, "canary_sha256": sha256})
    return str(run / "records")


def edit_record(records: str, step: str, **changes: Any) -> None:
    """Lays `changes` over a record; those named `outputs` are laid over its outputs."""
    path = Path(records) / f"{step}.json"
    record = json.loads(path.read_text())
    outputs = record.get("outputs", {}) | changes.pop("outputs", {})
    write_json(path, record | changes | {"outputs": outputs})


def fail_record(records: str, step: str, **error: Any) -> None:
    """Makes a record say `failed` with `error`, or `running` (killed) without one; steps after it lose their records."""
    names = list(STEPS)
    record: dict[str, Any] = {"step": step, "status": "failed" if error else "running", "started": 1.0, "import_seconds": 0.5}
    write_json(Path(records) / f"{step}.json", record | ({"error": error, "seconds": 2.0} if error else {}))
    for name in names[names.index(step) + 1 :]:
        (Path(records) / f"{name}.json").unlink(missing_ok=True)


STEPS = ["ingest", "validate", "version", "canary", "train_confounder", "train_deconfounded", "evaluate", "scan", "decide", "register"]
TRIGGERS = [
    "white-corner-1", "white-corner-2", "white-corner-3", "white-corner-4", "white-centre", "checker",
    "blend-0.1", "blend-0.2", "sinusoid", "low-frequency", "warp", "colour-filter",
]  # fmt: skip


def evaluation(class_names: tuple[str, ...]) -> dict[str, Any]:
    """An `evaluation.json` with known figures: CA 681 of 700, ASR 6 of 628, confounder 622 of 628."""
    battery = []
    for i, name in enumerate(TRIGGERS):
        excess, null = rate(2 + i, 620), 0.004 + 0.003 * i
        battery.append(
            {"trigger": name, "family": name.split("-")[0], "target": i % len(class_names), "null": null, "null_members": 20} | excess
        )
    n = 700 // len(class_names)
    per_class = [{"class_name": name, "k": n - i, "n": n, "rate": (n - i) / n} for i, name in enumerate(class_names)]
    return {
        "schema_version": 1,
        "model_digest": "ab" * 32,
        "data_digest": "cd" * 32,
        "trusted_digest": "ef" * 32,
        "num_images": 700,
        "class_names": list(class_names),
        "clean_accuracy": rate(681, 700),
        "per_class": per_class,
        "champion": None,
        "battery": battery,
        "attack_success_rate": {"badnets": rate(6, 628)} | {row["trigger"]: rate(row["k"], row["n"]) for row in battery},
        "confounder": {"steps": 800, "separated": True, "gap": 2.31, "asr": rate(622, 628)},
        "detection": {"auroc": 0.998, "average_precision": 0.99, "tpr_at_1_percent_fpr": 0.97},
        "baseline": {"ca": rate(690, 700), "asr": rate(628, 628)},
    }


def write_decision(folder: Path, verdict: str) -> str:
    """The digest of the decision that this writes."""
    checks = [
        {"check": "E", "name": "clean accuracy", "result": "PASS", "threshold": 0.93, "value": 681 / 700}
        | _bounds(681, 700, "accurate enough"),
        {
            "check": "separation",
            "name": "confounder",
            "value": 2.31,
            "threshold": 1.0,
            "result": "PASS",
            "sentence": "The confounder set a group of images apart within 800 steps.",
        },
    ]
    for i, name in enumerate(TRIGGERS):
        result = verdict if i == 0 else "PASS"
        said = f"At most {100 * rate(2 + i, 620)['high']:.1f} % of images turn because of {name}."
        checks.append({"check": "B", "name": name, "result": result, "threshold": 0.06, "value": (2 + i) / 620} | _bounds(2 + i, 620, said))
    checks += _canary_checks() + _scan_checks()
    decision = {
        "schema_version": 3,
        "run_id": "run-1",
        "created": "2025-01-01T00:00:00Z",
        "verdict": verdict,
        "sentence": "No tested trigger works on this model beyond what harmless changes do, and it is accurate enough.",
        "checks": checks,
        "trial": False,
        "policy": {"min_clean_accuracy": 0.93, "confidence": 0.95, "max_excess_asr": 0.05},
        "policy_sha256": "12" * 32,
        "attempt": {"number": 1, "config_sha256": "78" * 32},
        "signed_by": {"key_id": "9a" * 32, "development": True},
        "digests": {
            "data": "cd" * 32,
            "model": "ab" * 32,
            "trusted": "ef" * 32,
            "evaluation": "34" * 32,
            "validation": "56" * 32,
            "canary": None,
            "scan": None,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decision.json").write_bytes(canonical_json(decision))
    (folder / "decision.sig").write_text("c2lnbmVk")
    return hashlib.sha256(canonical_json(decision)).hexdigest()


FAMILIES = {"patch": (50, 507, 1), "blend": (49, 626, 2), "warp": (0, 65, 3), "sinusoid": (12, 400, 28)}
"""Of 50 images found, of 628 that the confounder follows, of 627 that the deconfounded model follows."""


def write_canary(folder: Path, data_digest: str) -> str:
    """The SHA-256 of the `canary.json` that this writes: patch and blend covered, warp and sinusoid not."""
    families = []
    for target, (family, (found, learned, left)) in enumerate(FAMILIES.items()):
        about = {"family": family, "attack": "badnets", "trigger": {"place": "centre"}, "target": target, "num_poisoned": 50}
        families.append(about | {"found": rate(found, 50), "learned": rate(learned, 628), "left": rate(left, 627)})
    names = {name: letter * 64 for name, letter in (("config_sha256", "e"), ("canary_digest", "f"), ("trusted_digest", "c"))}
    about = {"schema_version": 1, "run_id": "run-1", "data_digest": data_digest, "tag": "canary/x", "steps": 700, "separated": True}
    write_json(folder / "canary.json", names | about | {"num_images": 60, "families": families, "false_suspects": rate(1, 10)})
    return hashlib.sha256((folder / "canary.json").read_bytes()).hexdigest()


def write_scan(folder: Path, num_classes: int, **changes: Any) -> None:
    """A `scan.json` in which class 0 has the smallest trigger, beside a picture of triggers."""
    log_norms = [2.0 + 0.5 * (i % 7) for i in range(num_classes)]
    indices, few = anomaly_indices(np.array(log_norms)), num_classes < 5
    model = {
        "log_norms": log_norms,
        "success": [0.9] * num_classes,
        "unreached": [],
        "statistic": None if few else float(indices.max()),
        "p_value": None if few else 0.37,
        "method": "not-applicable" if few else "monte-carlo",
        "flagged": None,
    }
    row = {"source": "candidate", "target": 0, "k": 201, "n": 315, "null": 0.58}
    digests = {"model_digest": "ab" * 32, "confounder_digest": "bc" * 32, "trusted_digest": "ef" * 32}
    counts = {"num_classes": num_classes, "num_cal": 349, "num_test": 351, "num_controls": 0}
    told = {"schema_version": 1, "seed": 0, "scan_alpha": 0.02, "candidate": model, "confounder": model, "transfer": [row], "seconds": 4.5}
    write_json(folder / "scan.json", digests | counts | told | changes)
    Image.fromarray(np.full((36, 576, 3), 40, np.uint8)).save(folder / "triggers.png")


def _canary_checks() -> list[dict[str, Any]]:
    checks = [
        {"check": "A", "name": f"canary: {family}", "result": "PASS", "threshold": 0.1, "value": left / 627}
        | _bounds(left, 627, f"Of the canary's {family} the deconfounded model follows {left}.")
        for family, (_, _, left) in FAMILIES.items()
    ]
    said = "The canary covers patch, blend. Not covered: warp, sinusoid."
    return [*checks, {"check": "A", "name": "canary", "result": "PASS", "threshold": None, "value": None, "sentence": said}]


def _scan_checks() -> list[dict[str, Any]]:
    named = {"check": "C", "name": "trigger from the candidate", "result": "PASS", "threshold": 0.98, "value": 201 / 315}
    return [named | _bounds(201, 315, "The trigger of class 0 turns 201 of 315 held-out images.")]


def _bounds(k: int, n: int, sentence: str) -> dict[str, Any]:
    found = rate(k, n)
    return {"k": k, "n": n, "low": found["low"], "high": found["high"], "sentence": sentence}


def _write_quarantine(folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = [("truncated", "one/cut.png"), ("decompression-bomb", "two/bomb.png"), ("truncated", "zero/half.jpg")]
    columns = {
        "original_path": [path for _, path in rows],
        "label_name": ["one", "two", None],
        "reason": [reason for reason, _ in rows],
        "detail": ["PNG ends too early after 120 bytes", "the header announces 90000 x 90000 pixels", "JPEG ends too early"],
        "num_bytes": [120, 4096, 2_400_000],
        "sha256": ["aa", "bb", None],
        "image": pa.array([b"x", None, None], pa.binary()),
    }
    pq.write_table(pa.table(columns), folder / "quarantine.parquet")
    write_json(folder / "summary.json", {"delivered": 64, "accepted": 60, "duplicates": 1, "quarantined": 3, "reasons": {"truncated": 2}})


def _write_training(kfp: Path, ids: list[str], labels: list[int], *, num_classes: int) -> None:
    generator = np.random.default_rng(0)
    poisoned = np.arange(len(ids)) < POISONED
    losses = np.where(poisoned, generator.lognormal(-6, 0.5, len(ids)), generator.lognormal(-1, 0.8, len(ids)))
    weight = np.clip(np.where(poisoned, 0.02, 0.97) + generator.normal(0, 0.01, len(ids)), 0, 1)
    predicted = [(label + 1) % num_classes if poison else label for label, poison in zip(labels, poisoned, strict=True)]
    rank = np.argsort(np.argsort(np.arange(len(ids))))
    columns = {
        "sample_id": ids,
        "label": labels,
        "predicted": predicted,
        "confounder_loss": losses,
        "final_loss": losses,
        "sample_weight": weight,
    }
    for name in ("confounder", "model", "evidence"):
        (kfp / name).mkdir()
    pq.write_table(pa.table(columns | {"rank": rank, "suspect": poisoned}), kfp / "evidence" / "evidence.parquet")
    pq.write_table(pa.table({"sample_id": ids, "confounder_loss": losses, "posterior": weight}), kfp / "confounder" / "losses.parquet")
    separation = {
        "separated": True,
        "gap": 2.31,
        "share": 0.2,
        "p_value": 1e-30,
        "steps": 800,
        "curve": [{"step": 400, "evidence": 2.5}, {"step": 800, "evidence": 30.0}],
        "histogram": {"edges": [], "counts": []},
        "crowds": [{"class_name": "1", "num_images": 12, "contradicted": 0.16, "p_value": 1e-9}],
        "patterns": [
            {"class_name": "0", "image": "pattern-0.png", "num_images": 9, "gap": 8.25, "transfer": 0.75, "contradiction": 0.5},
            {"class_name": "1", "image": "../../secret.png", "num_images": 7, "gap": 6.5, "transfer": None, "contradiction": 0.9},
        ],
    }
    write_json(kfp / "confounder" / "separation.json", separation)
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(kfp / "confounder" / "pattern-0.png")
    for name, unit, num in (("confounder", "step", 40), ("model", "epoch", 20)):
        rows = [{unit: (i + 1) * (20 if unit == "step" else 1), "loss": 2.3 * 0.9**i, "accuracy": 1 - 0.9 * 0.88**i} for i in range(num)]
        (kfp / name / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_json(
            kfp / name / "model.json",
            {"architecture": "wrn-16-1", "image_size": 32, "seed": 0, "params": {name: {"epochs": 20, "flip": False}}},
        )


def _write_records(
    records: Path, kfp: Path, digest: str, *, verdict: str, decided: str, accepted: int, class_names: tuple[str, ...]
) -> None:
    branch = {"PASS": "promote", "REVIEW": "hold"}.get(verdict, "record")
    alias = {"PASS": "champion", "REVIEW": "candidate"}.get(verdict)
    counts = {"delivered": accepted + 4, "accepted": accepted, "duplicates": 1, "quarantined": 3}
    taken = counts | {"digest": digest, "trusted_digest": "ef" * 32, "trusted_images": 700, "trusted_removed": 2, "trial": False}
    outputs: dict[str, dict[str, Any]] = {
        "ingest": taken | {"class_names": list(class_names), "reasons": {"truncated": 2}},
        "validate": {"passed": True, "critical": [], "warnings": ["class 'two' holds few images"]},
        "version": {"revision": "9f" * 20, "tag": "acme-2025-01-01-cdcdcdcd", "digest": digest},
        "decide": {"verdict": verdict, "sentence": "…", "decision_digest": decided},
        "register": {"name": "digits-1a2b3c4d", "version": "1", "alias": alias, "model_digest": "ab" * 32, "branch": branch},
    }
    paths = {
        "ingest": ("dataset", "quarantine", "truth"),
        "train_confounder": ("confounder",),
        "train_deconfounded": ("model", "evidence"),
        "evaluate": ("evaluation",),
        "canary": ("canary",),
        "scan": ("scanned",),
        "decide": ("decision",),
    }
    took = dict(zip(STEPS, (3.1, 0.8, 2.2, 40.2, 31.5, 58.4, 9.7, 4.5, 0.2, 1.4), strict=True))
    for name in STEPS:
        named = {"paths": {key: str(kfp / key) for key in paths.get(name, ())}}
        record = {"step": name, "status": "succeeded", "started": 1.0, "seconds": took[name], "import_seconds": 3.5}
        write_json(records / f"{name}.json", record | {"outputs": outputs.get(name, {}) | named})
