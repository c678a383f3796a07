"""Re-tries: which attempt on the same data and trusted set a decision is, counted from the signed log, which outlives every run folder."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from cbd.bundle import read_card
from cbd.config import Gate, canonical_json, section_digest
from cbd.files import sha256_file
from cbd.heads import read_log

PACKAGES = ("cbd", "components")


def number_attempt(workspace: Path, model: Path, digests: dict[str, str | None], policy: Gate) -> dict[str, Any]:
    """`number`, from 1 on, and `config_sha256`: what was tried, by the digest of its parameters, policy and code.

    The same again is no new attempt and keeps its number.

    Raises:
        DataError: the log was altered, or the bundle is none.
    """
    card = read_card(model)
    about = {"params": card.params, "seed": card.seed, "kind": card.kind, "policy": section_digest(policy), "code": code_digest()}
    config = hashlib.sha256(canonical_json(about)).hexdigest()
    tried: list[str] = []
    for told in (entry["data"] for entry in read_log(workspace) if entry["event"] == "decision"):
        same = all(told["digests"][name] == digests[name] for name in ("data", "trusted"))
        if same and (earlier := (told.get("attempt") or {}).get("config_sha256")) and earlier not in tried:
            tried.append(earlier)
    return {"number": tried.index(config) + 1 if config in tried else len(tried) + 1, "config_sha256": config}


@cache
def code_digest() -> str:
    """SHA-256 (hex) over the source files of the method and the components."""
    root = Path(__file__).resolve().parent.parent
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return hashlib.sha256(canonical_json({str(path.relative_to(root)): sha256_file(path) for path in files})).hexdigest()
