"""`evaluation.json`, the measurements that the gate judges: its form, and whether its counts agree with each other."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbd.errors import DataError


class _Measured(BaseModel):
    """A part of `evaluation.json`: closed to unknown keys, wrong types, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Accuracy(_Measured):
    """Clean accuracy, k of n."""

    k: int = Field(ge=0)
    n: int = Field(ge=0)
    rate: float | None
    low: float | None
    high: float | None


class Target(_Measured):
    """How many images one trigger turns to one class beyond those called so anyway."""

    target: int = Field(ge=0)
    k: int = Field(ge=0)
    n: int = Field(ge=0)


class Trigger(Target):
    """One known trigger of the battery; k, n and rate are those of its worst target."""

    trigger: str
    family: str
    rate: float | None
    low: float | None
    high: float | None
    null: float | None = Field(ge=0, le=1)
    null_members: int | None = Field(ge=0)
    targets: list[Target]


class ClassChange(_Measured):
    """One class, candidate against champion on the same images."""

    class_name: str
    n: int = Field(ge=0)
    wins: int = Field(ge=0)
    losses: int = Field(ge=0)


class Champion(_Measured):
    """The candidate against the champion on the same images; wins: candidate right and champion wrong."""

    version: str | int
    digest: str
    k: int = Field(ge=0)
    n: int = Field(ge=0)
    wins: int = Field(ge=0)
    losses: int = Field(ge=0)
    per_class: list[ClassChange]


class ConfounderSummary(_Measured):
    """What the gate needs to know of the confounder."""

    steps: int
    separated: bool | None
    gap: float | None
    asr: Any


class Evaluation(_Measured):
    """`evaluation.json` as the gate reads it. What rests on ground truth is let through unread."""

    schema_version: Literal[1]
    model_digest: str
    data_digest: str
    trusted_digest: str
    num_images: int = Field(ge=0)
    class_names: list[str]
    clean_accuracy: Accuracy
    per_class: list[dict[str, Any]]
    champion: Champion | None
    battery: list[Trigger]
    attack_success_rate: Any
    confounder: ConfounderSummary
    detection: Any
    baseline: Any


def read_evaluation(values: dict[str, Any]) -> Evaluation:
    """`values` as an evaluation whose counts agree with each other.

    Raises:
        DataError: a key is unknown or missing, a number is NaN, or counts contradict each other; in one line.
    """
    try:
        measured = Evaluation.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"evaluation.json: {where!r}: {first['msg'].lower()}; evaluate the model again") from None
    for fault in _contradictions(measured):
        raise DataError(f"evaluation.json: {fault}; evaluate the model again")
    return measured


def _contradictions(measured: Evaluation) -> list[str]:
    """What in the evaluation cannot be true at once."""
    faults: list[str] = []
    classes = len(measured.class_names)
    if classes < 2 or len(set(measured.class_names)) != classes:
        faults.append("class_names needs at least two names, all different")
    accuracy = measured.clean_accuracy
    if accuracy.n != measured.num_images or accuracy.k > accuracy.n or not _agrees(accuracy.rate, accuracy.k, accuracy.n):
        faults.append(f"clean_accuracy is {accuracy.k} of {accuracy.n} ({accuracy.rate}) over {measured.num_images} images")
    if len({trigger.trigger for trigger in measured.battery}) != len(measured.battery):
        faults.append("battery names a trigger twice")
    for trigger in measured.battery:
        name = f"battery: {trigger.trigger!r}"
        counts = {count.target: (count.k, count.n) for count in trigger.targets}
        if len(trigger.targets) != classes or set(counts) != set(range(classes)):
            faults.append(f"{name} has {len(trigger.targets)} targets, expected one for each of {classes} classes")
        elif any(k > n or n > measured.num_images for k, n in counts.values()):
            faults.append(f"{name} counts more images than there are")
        elif counts.get(trigger.target) != (trigger.k, trigger.n) or not _agrees(trigger.rate, trigger.k, trigger.n):
            faults.append(f"{name} says {trigger.k} of {trigger.n} ({trigger.rate}) for target {trigger.target}, its targets say otherwise")
    if measured.champion is not None:
        faults += _champion_contradictions(measured.champion, measured)
    return faults


def _champion_contradictions(champion: Champion, measured: Evaluation) -> list[str]:
    parts = champion.per_class
    if [part.class_name for part in parts] != measured.class_names:
        return ["champion.per_class names other classes than class_names"]
    if any(part.wins + part.losses > part.n for part in parts):
        return ["champion.per_class counts more images than there are"]
    if (sum(p.n for p in parts), sum(p.wins for p in parts), sum(p.losses for p in parts)) != (champion.n, champion.wins, champion.losses):
        return ["champion.per_class does not add up to the champion's counts"]
    if champion.n != measured.num_images or champion.k + champion.wins - champion.losses != measured.clean_accuracy.k:
        return [
            f"champion: {champion.k} right, {champion.wins} wins and {champion.losses} losses do not give {measured.clean_accuracy.k} right"
        ]
    return []


def _agrees(value: float | None, k: int, n: int) -> bool:
    return value is None if n == 0 else value is not None and abs(value - k / n) < 1e-6
