"""Where everything came from: digests, versions, parameters, and the time that each step took."""

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

from components import STEPS
from components.charts import bar
from components.pages import View
from components.pages.text import clip, number, seconds
from components.summary import Run, alarms

PACKAGES = ("kfp", "torch", "torchvision", "mlflow", "dvc", "great-expectations", "numpy", "pyarrow", "pillow", "scikit-learn")


def identities(run: Run) -> View:
    """Digests and versions by which every part of this run can be found again; only those that are known."""
    ingest, version, register, decision = (run.outputs("ingest"), run.outputs("version"), run.outputs("register"), run.decision)
    digests = decision.get("digests") or {}
    found = {
        "Data set digest": ingest.get("digest"),
        "Data set revision (DVC)": version.get("revision"),
        "Data set tag (DVC)": version.get("tag"),
        "Trusted set digest": ingest.get("trusted_digest") or digests.get("trusted"),
        "Model digest": register.get("model_digest") or digests.get("model"),
        "Registered model": register.get("name"),
        "Model version": register.get("version"),
        "Registry alias": (register.get("alias") or "none") if register else None,
        "Evaluation digest": digests.get("evaluation"),
        "Validation digest": digests.get("validation"),
        "Decision digest": run.outputs("decide").get("decision_digest"),
        "Decision signature": "verified with the workspace's key" if run.verdict and run.workspace and not alarms(run) else None,
        "Signing key": _signer(decision.get("signed_by")),
        "Policy digest": decision.get("policy_sha256"),
        "Decided": decision.get("created"),
    }
    return {"rows": [{"name": name, "value": clip(value, 160)} for name, value in found.items() if value is not None]}


def _signer(told: Any) -> str | None:
    if not isinstance(told, dict):
        return None
    kind = "a development key: made by cbd, it lies beside what it signs" if told.get("development") else "a key of your own"
    return f"{told.get('key_id')}, {kind}"


def packages(run: Run) -> View:
    """Versions of the interpreter and the packages in the environment that wrote this page."""
    rows = [{"name": "Python", "value": platform.python_version()}]
    for name in PACKAGES:
        try:
            rows.append({"name": name, "value": importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"rows": rows}


def parameters(run: Run) -> View:
    """The sections with which the models were trained and the policy that judged them, flattened."""
    found: dict[str, Any] = {}
    for step, key in (("train_confounder", "confounder"), ("train_deconfounded", "model")):
        card = run.artifact(step, key, "model.json")
        found |= dict(_flat(card.get("params") or {}))
        found |= {name: card[name] for name in ("architecture", "image_size", "seed") if name in card}
    policy = run.decision.get("policy")
    found |= dict(_flat({"gate": policy})) if isinstance(policy, dict) else {}
    return {"rows": [{"name": clip(name, 80), "value": number(value)} for name, value in sorted(found.items())]}


def timings(run: Run) -> View:
    """How long each step took, start-up and imports apart from its work, and how it ended."""
    own = {"report", *STEPS}
    records = {name: record for name, record in run.records.items() if name in own}
    spent = {name: (_time(record.get("import_seconds")), _time(record.get("seconds"))) for name, record in records.items()}
    longest = max((sum(value or 0.0 for value in pair) for pair in spent.values()), default=0.0) or 1.0
    rows = []
    for name, (imports, work) in spent.items():
        drawn = bar([("imports", imports or 0.0), ("work", work or 0.0)], total=longest)
        ended = "writing this page" if name == "report" and work is None else run.stopped.get(name, "succeeded")
        bad = name in run.stopped
        rows.append({"name": name, "svg": drawn, "imports": seconds(imports), "work": seconds(work), "ended": clip(ended, 200), "bad": bad})
    total = {
        "work": seconds(sum(work or 0.0 for _, work in spent.values())),
        "imports": seconds(sum(imports or 0.0 for imports, _ in spent.values())),
    }
    return {
        "rows": rows,
        "total": total,
        "missing_steps": [name for name in STEPS if name not in run.records and name not in ("report", "train_undefended")],
    }


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _time(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
