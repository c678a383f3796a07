"""What a run came to, in one object: built from the records alone, None where nothing was measured."""

import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cbd.errors import CbdError
from cbd.files import sha256_file
from components import STEPS
from components.decision import read_decision

TRAINING = ("canary", "train_confounder", "train_deconfounded", "train_undefended", "evaluate", "scan")
VERDICTS = ("PASS", "REVIEW", "INCONCLUSIVE", "INVALID", "BLOCK")
BRANCHES = {"PASS": "promote", "REVIEW": "hold"}
ALIASES = {"PASS": "champion", "REVIEW": "candidate"}


@dataclass(frozen=True)
class Run:
    """The records of a run and the JSON artifacts that they name; what is missing or unreadable is an empty dict."""

    records: dict[str, dict[str, Any]]
    final_status: dict[str, Any] = field(default_factory=dict)
    workspace: Path | None = None
    """Where the key lies that must have signed the decision; None: the signature is not looked at."""

    def outputs(self, step: str) -> dict[str, Any]:
        """Outputs of a step that succeeded."""
        record = self.records.get(step, {})
        outputs = record.get("outputs") if record.get("status") == "succeeded" else None
        return outputs if isinstance(outputs, dict) else {}

    def path(self, step: str, key: str, file_name: str = "") -> Path | None:
        """Where an artifact of a step lies, or the file in it; None where the step names none."""
        paths = self.outputs(step).get("paths")
        named = paths.get(key) if isinstance(paths, dict) else None
        if not isinstance(named, str) or not named:
            return None
        return Path(named) / file_name if file_name and Path(named).is_dir() else Path(named)

    def artifact(self, step: str, key: str, file_name: str) -> dict[str, Any]:
        """A JSON object that a step wrote."""
        path = self.path(step, key, file_name)
        return read_object(path) if path else {}

    @cached_property
    def decision(self) -> dict[str, Any]:
        return self.artifact("decide", "decision", "decision.json")

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        return self.artifact("evaluate", "evaluation", "evaluation.json")

    @cached_property
    def baseline(self) -> dict[str, Any] | None:
        """CA and ASR without defence: from the evaluation, or from the record of the undefended training; None if it was not asked for."""
        told = self.evaluation.get("baseline") or self.outputs("train_undefended").get("baseline") or self.outputs("train_undefended")
        return {"ca": told.get("ca"), "asr": told.get("asr")} if isinstance(told, dict) and "ca" in told else None

    @cached_property
    def separation(self) -> dict[str, Any]:
        return self.artifact("train_confounder", "confounder", "separation.json")

    def check(self, letter: str, name: str) -> dict[str, Any]:
        """The check of that letter and name in the decision; empty if there is none."""
        checks = self.decision.get("checks")
        found = [_object(each) for each in checks] if isinstance(checks, list) else []
        return next((each for each in found if (each.get("check"), each.get("name")) == (letter, name)), {})

    @property
    def verdict(self) -> str | None:
        """The decision's verdict if it is a known one and the step that decided says the same."""
        verdict = self.outputs("decide").get("verdict")
        return verdict if verdict in VERDICTS and self.decision.get("verdict") == verdict else None

    @property
    def nothing_new(self) -> dict[str, Any] | None:
        """Run id and verdict of the run that was decided on the same data before; None if there was something new."""
        return _object(self.outputs("ingest").get("nothing_new")) or None

    @property
    def trial(self) -> bool:
        """Poisoned on purpose: never promotable."""
        return bool(self.outputs("ingest").get("trial") or self.decision.get("trial"))

    @property
    def stopped(self) -> dict[str, str]:
        """Steps that did not end well and why, in order; the report itself is still running."""
        found = {name: _why(record) for name, record in self.records.items() if name != "report" and record.get("status") != "succeeded"}
        if not found and self.final_status.get("state", "SUCCEEDED") not in ("SUCCEEDED", "", None):
            found["pipeline"] = (
                f"{self.final_status['state']}: {self.final_status.get('error_message') or 'a step ended before it left a record'}"
            )
        return found


def read_run(records: str, *, final_status: dict[str, Any] | None = None, workspace: Path | None = None) -> Run:
    """All that the records say; a record that cannot be read counts as a step that did not end."""
    found = {path.stem: read_object(path) or {"status": "unreadable"} for path in Path(records).glob("*.json")}
    order = [*STEPS, *sorted(set(found) - set(STEPS))]
    return Run({name: found[name] for name in order if name in found}, final_status or {}, workspace)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when it is missing, malformed or no object. NaN becomes None, half a character `?`."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=lambda _: None)
        if "\\ud" in text.lower():
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def alarms(run: Run) -> list[str]:
    """Why what ran is not what the verdict demands, one sentence each; empty when it is."""
    if run.nothing_new:
        return [f"Nothing was new, yet {name} ran." for name in run.records if name not in ("ingest", "report")]
    passed = run.outputs("validate").get("passed")
    found = [f"Validation refused the data, yet {name} ran." for name in (*TRAINING, "register") if passed is False and name in run.records]
    found += _altered(run) + _decision_alarms(run)
    if run.verdict is None:
        if "register" in run.records:
            found.append("The step register ran without a valid verdict.")
        if not run.stopped and not found:
            found.append("No step failed, yet there is no verdict: a branch of the pipeline was skipped.")
    elif passed is True:
        found += [f"The verdict is {run.verdict}, yet {name} did not succeed." for name in TRAINING if name in _unended(run)]
        found += _branch_alarms(run)
    elif passed is not False:
        found.append(f"The verdict is {run.verdict}, yet validation never said whether the data passed.")
    elif run.verdict != "BLOCK":
        found.append(f"Validation refused the data: the verdict must be BLOCK, and it is {run.verdict}.")
    return found


def summary(records: str, run_dir: Path) -> dict[str, Any]:
    """The object that `--json` prints; with it the alarms, and the steps that did not end well."""
    return summarise(read_run(records), run_dir)


def summarise(run: Run, run_dir: Path) -> dict[str, Any]:
    """The same as `summary`, of a run that was read already."""
    evaluation, separation, ingest, register = (run.evaluation, run.separation, run.outputs("ingest"), run.outputs("register"))
    confounder = _object(evaluation.get("confounder"))
    found = alarms(run)
    return {
        "verdict": run.verdict,
        "sentence": run.decision.get("sentence") if run.verdict else _nothing_new(run),
        "nothing_new": run.nothing_new,
        "clean_accuracy": evaluation.get("clean_accuracy"),
        "attack_success_rate": evaluation.get("attack_success_rate"),
        "confounder": {
            "steps": confounder.get("steps", separation.get("steps")),
            "separated": confounder.get("separated", separation.get("separated")),
            "asr": confounder.get("asr"),
        },
        "canary": _canary(run),
        "baseline": run.baseline,
        "data": {key: ingest.get(key) for key in ("delivered", "accepted", "duplicates", "quarantined", "known", "num_images", "digest")}
        | {"revision": run.outputs("version").get("revision")},
        "model": {
            "name": register.get("name"),
            "digest": register.get("model_digest", evaluation.get("model_digest")),
            "version": register.get("version"),
            "alias": register.get("alias"),
        },
        "trial": run.trial,
        "consistent": not found,
        "alarms": found,
        "stopped": run.stopped,
        "run_dir": str(run_dir),
        "seconds": _seconds(run, "seconds"),
        "import_seconds": _seconds(run, "import_seconds"),
    }


def _canary(run: Run) -> str | None:
    """What the decision says of the canary as a whole; None where it says nothing."""
    told = run.check("A", "canary").get("sentence") if run.verdict else None
    return told if isinstance(told, str) else None


def _nothing_new(run: Run) -> str | None:
    if run.nothing_new is None:
        return None
    told = run.nothing_new
    return f"Nothing new: run {told.get('run_id')} was decided on the same images and the same trusted set, and said {told.get('verdict')}."


def _altered(run: Run) -> list[str]:
    """That a file which a step kept beside its record is gone or another one since; the first of each step."""
    found = []
    for name, record in run.records.items():
        for path, sha256 in _object(record.get("kept")).items():
            if not Path(path).is_file() or sha256_file(Path(path)) != sha256:
                found.append(f"{name} kept {Path(path).name} beside its record, and it is gone or was altered since.")
                break
    return found


def _decision_alarms(run: Run) -> list[str]:
    decided = run.outputs("decide")
    path = run.path("decide", "decision", "decision.json")
    if not decided:
        return []
    if not run.decision or path is None:
        return ["The step decide ended, yet its signed decision is missing or unreadable."]
    if run.verdict is None:
        return [f"The step decide said {decided.get('verdict')!r}, the decision on disk says {run.decision.get('verdict')!r}."]
    digest = decided.get("decision_digest")
    if digest is not None and digest != hashlib.sha256(path.read_bytes()).hexdigest():
        return ["The decision was altered after it was made: its digest is not the one that decide recorded."]
    fault = run.workspace and _signature_fault(path.parent, run.workspace)
    return [f"The decision cannot be trusted: {fault}."] if fault else []


def _signature_fault(folder: Path, workspace: Path) -> str | None:
    try:
        read_decision(folder, workspace)
    except (CbdError, OSError, ValueError, LookupError, TypeError) as error:
        return str(error)
    return None


def _branch_alarms(run: Run) -> list[str]:
    verdict = str(run.verdict)
    branch, alias = (BRANCHES.get(verdict, "record"), None if run.trial else ALIASES.get(verdict))
    demand = f"The verdict {verdict} demands that register takes the branch {branch!r}"
    register = run.records.get("register")
    if register is None:
        return [f"{demand}, and register never ran."]
    if register.get("status") != "succeeded":
        return [f"{demand}, and register did not succeed ({run.stopped['register']})."]
    taken = run.outputs("register")
    found = [] if taken.get("branch") == branch else [f"{demand}, and it took {taken.get('branch')!r}."]
    if taken.get("alias") != alias:
        found.append(f"The registry alias should be {alias or 'none'}, and register says {taken.get('alias') or 'none'}.")
    return found


def _unended(run: Run) -> set[str]:
    needed = {name for name in TRAINING if name != "train_undefended" or name in run.records}
    return {name for name in needed if run.records.get(name, {}).get("status") != "succeeded"}


def _why(record: dict[str, Any]) -> str:
    if record.get("status") == "running":
        return "killed: it started and never ended"
    error = _object(record.get("error"))
    return f"{error.get('type', 'error')}: {error.get('message', 'no message')}" if error else "its record cannot be read"


def _seconds(run: Run, key: str) -> dict[str, float]:
    found = {name: record.get(key) for name, record in run.records.items()}
    started = run.records.get("report", {}).get("started")
    if key == "seconds" and found.get("report") is None and isinstance(started, float):
        found["report"] = time.time() - started
    return {name: round(value, 3) for name, value in found.items() if isinstance(value, int | float)}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
