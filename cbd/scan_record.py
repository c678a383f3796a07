"""`scan.json`, what the scan for unknown triggers found: its form, and whether its numbers agree with each other."""

import math
from typing import Any, Literal

import numpy as np
from pydantic import Field

from cbd.anomaly import anomaly_indices, enough_controls
from cbd.errors import DataError
from cbd.measurements import Measured, checked

Source = Literal["candidate", "confounder"]


class ScannedModel(Measured):
    """The inversion on one model."""

    log_norms: list[float]
    """Per class: natural logarithm of its smallest trigger's norm in pixels, of the full image where none was found."""
    success: list[float]
    """Per class, in [0, 1]: running share of calibration images that the trigger turned."""
    unreached: list[int]
    """Classes for which no trigger was found."""
    statistic: float | None
    """Largest anomaly index; None where the method is `not-applicable`."""
    p_value: float | None = Field(gt=0, le=1)
    method: Literal["monte-carlo", "controls", "not-applicable"]
    flagged: int | None = Field(ge=0)
    """The class with the smallest trigger, where the p-value is at most `scan_alpha`."""


class Transfer(Measured):
    """What a trigger does to held-out images on the candidate: its own smallest one, and a flagged one of the confounder."""

    source: Source
    """The model it was inverted on."""
    target: int = Field(ge=0)
    k: int = Field(ge=0)
    n: int = Field(ge=0)
    """Of the n images that are neither of the class nor called so untriggered, k turn to it."""
    null: float = Field(ge=0, le=1)
    """Largest such rate of the other classes' triggers of at most the same norm, and of the same trigger on controls."""


class Scan(Measured):
    """`scan.json`."""

    schema_version: Literal[1]
    model_digest: str
    confounder_digest: str | None
    trusted_digest: str
    seed: int = Field(ge=0)
    num_classes: int = Field(ge=2)
    num_cal: int = Field(ge=0)
    """Images that the inversion saw."""
    num_test: int = Field(ge=0)
    """Other images, on which the triggers were stamped."""
    num_controls: int = Field(ge=0)
    scan_alpha: float = Field(gt=0, lt=1)
    candidate: ScannedModel
    confounder: ScannedModel | None
    transfer: list[Transfer]
    seconds: float = Field(ge=0)


def read_scan(values: dict[str, Any]) -> Scan:
    """`values` as a scan whose numbers agree with each other.

    Raises:
        DataError: a key is unknown or missing, a number is NaN, or numbers contradict each other; in one line.
    """
    scan = checked(Scan, values, name="scan.json", fix="scan the model again")
    for fault in _contradictions(scan):
        raise DataError(f"scan.json: {fault}; scan the model again")
    return scan


def _contradictions(scan: Scan) -> list[str]:
    """What in the scan cannot be true at once."""
    faults = []
    if (scan.confounder is None) != (scan.confounder_digest is None):
        faults.append("confounder and confounder_digest: one is there without the other")
    models = {"candidate": scan.candidate, **({"confounder": scan.confounder} if scan.confounder else {})}
    for name, model in models.items():
        faults += [f"{name}: {fault}" for fault in _model_contradictions(model, scan)]
    expected = {("candidate", smallest(scan.candidate.log_norms))}
    if scan.confounder and scan.confounder.flagged is not None:
        expected.add(("confounder", scan.confounder.flagged))
    rows = [(row.source, row.target) for row in scan.transfer]
    if len(rows) != len(expected) or set(rows) != expected:
        faults.append(f"transfer tells of {rows or 'nothing'}, expected {sorted(expected)}")
    for row in scan.transfer:
        if row.k > row.n or row.n > scan.num_test:
            faults.append(f"transfer from the {row.source}: {row.k} of {row.n} with {scan.num_test} held-out images")
    return faults


def _model_contradictions(model: ScannedModel, scan: Scan) -> list[str]:
    if len(model.log_norms) != scan.num_classes or len(model.success) != scan.num_classes:
        return [f"{len(model.log_norms)} norms and {len(model.success)} shares of {scan.num_classes} classes"]
    if not all(0 <= share <= 1 for share in model.success) or not set(model.unreached) <= set(range(scan.num_classes)):
        return ["a share outside [0, 1] or an unreached class that there is not"]
    if (model.statistic is None, model.p_value is None) != (model.method == "not-applicable",) * 2:
        return [f"method {model.method!r} with statistic {model.statistic} and p-value {model.p_value}"]
    if model.method == "controls" and not enough_controls(scan.num_controls, scan.scan_alpha):
        return [f"ranked among {scan.num_controls} controls, too few for a p-value of {scan.scan_alpha}"]
    largest = float(anomaly_indices(np.array(model.log_norms, np.float64)).max())
    if model.statistic is not None and not math.isclose(model.statistic, largest, rel_tol=1e-6, abs_tol=1e-9):
        return [f"statistic is {model.statistic}, its norms give {largest}"]
    stands_out = model.p_value is not None and model.p_value <= scan.scan_alpha
    if model.flagged != (smallest(model.log_norms) if stands_out else None):
        return [f"class {model.flagged} is flagged; the smallest trigger is of {smallest(model.log_norms)}, its p-value {model.p_value}"]
    return []


def smallest(log_norms: list[float]) -> int:
    """The class with the smallest trigger; the first of equals."""
    return log_norms.index(min(log_norms))
