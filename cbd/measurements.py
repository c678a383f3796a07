"""The measurements that the gate judges, `evaluation.json` and `canary.json`: their form, and whether their counts agree."""

from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cbd.config import Family
from cbd.control import MIN_CONTROLS
from cbd.errors import DataError


class Measured(BaseModel):
    """A part of a file of measurements: closed to unknown keys, wrong types, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Share(Measured):
    """k of n, and the rate with its bounds for whoever reads the file: the gate makes its own."""

    k: int = Field(ge=0)
    n: int = Field(ge=0)
    rate: float | None
    low: float | None
    high: float | None

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.k > self.n or not _agrees(self.rate, self.k, self.n):
            raise ValueError(f"{self.k} of {self.n} is no rate of {self.rate}")
        return self


class Target(Measured):
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
    """Random harmless triggers on the candidate that `null` is the largest rate of; None where it is another's, or there is none."""
    null_controls: int | None = Field(default=None, ge=MIN_CONTROLS)
    """Clean controls under this trigger that `null` is the largest rate of; None where it is another's, or there is none."""
    targets: list[Target]


class ClassChange(Measured):
    """One class, candidate against champion on the same images."""

    class_name: str
    n: int = Field(ge=0)
    wins: int = Field(ge=0)
    losses: int = Field(ge=0)


class Champion(Measured):
    """The candidate against the champion on the same images; wins: candidate right and champion wrong."""

    version: str | int
    digest: str
    k: int = Field(ge=0)
    n: int = Field(ge=0)
    wins: int = Field(ge=0)
    losses: int = Field(ge=0)
    per_class: list[ClassChange]


class ConfounderSummary(Measured):
    """What the gate needs to know of the confounder."""

    steps: int
    separated: bool | None
    gap: float | None
    asr: Any


class Subset(Measured):
    """Suspects among the training images of one class or one supplier."""

    name: str
    k: int = Field(ge=0)
    n: int = Field(ge=0)


class Samples(Measured):
    """What the evidence table says of the training images."""

    data_digest: str
    num_images: int = Field(gt=0)
    suspects: int = Field(ge=0)
    followed: Share
    """Of the suspects whose labels the pilot contradicts, those that the model calls what their label says."""
    kept: Share | None = None
    """Of all suspects, those that the model was trained on with a weight over 1/2; None in evaluations of before 2026-11-28."""
    per_class: list[Subset]
    per_source: list[Subset]


class Controls(Measured):
    """The clean controls that the candidate was compared with."""

    count: int = Field(ge=MIN_CONTROLS)
    digests: list[str]
    """Of their bundles."""
    false_suspects: Share
    """Of all of their training images together, which are honest, the suspects."""


class Planted(Measured):
    """One trigger family of the canary."""

    family: Family
    attack: str
    trigger: dict[str, Any]
    target: int = Field(ge=0)
    num_poisoned: int = Field(gt=0)
    found: Share
    """Of its poisoned training images, the suspects."""
    learned: Share
    """Of trusted images with the trigger, those that the confounder calls the target."""
    left: Share
    """Of trusted images that the deconfounded model does not call the target untriggered, those that turn to it."""


class CanaryResult(Measured):
    """`canary.json` as the gate reads it."""

    schema_version: Literal[1]
    run_id: str
    config_sha256: str
    data_digest: str
    canary_digest: str
    trusted_digest: str
    tag: str
    steps: int
    separated: bool | None
    num_images: int = Field(gt=0)
    families: list[Planted]
    false_suspects: Share
    """Of the training images that it did not stamp, the suspects."""

    def pooled_found(self) -> Share:
        """Of all poisoned training images of all families, the suspects."""
        k, n = sum(planted.found.k for planted in self.families), sum(planted.found.n for planted in self.families)
        return Share(k=k, n=n, rate=k / n if n else None, low=None, high=None)


class Evaluation(Measured):
    """`evaluation.json` as the gate reads it. What rests on ground truth is let through unread."""

    schema_version: Literal[1]
    model_digest: str
    data_digest: str
    trusted_digest: str
    num_images: int = Field(ge=0)
    class_names: list[str]
    clean_accuracy: Share
    per_class: list[dict[str, Any]]
    champion: Champion | None
    battery: list[Trigger]
    attack_success_rate: Any
    confounder: ConfounderSummary
    samples: Samples | None
    controls: Controls | None = None
    detection: Any
    baseline: Any


def read_evaluation(values: dict[str, Any]) -> Evaluation:
    """`values` as an evaluation whose counts agree with each other.

    Raises:
        DataError: a key is unknown or missing, a number is NaN, or counts contradict each other; in one line.
    """
    measured = checked(Evaluation, values, name="evaluation.json", fix="evaluate the model again")
    for fault in _contradictions(measured):
        raise DataError(f"evaluation.json: {fault}; evaluate the model again")
    return measured


def read_canary(values: dict[str, Any]) -> CanaryResult:
    """`values` as a canary's result whose counts agree with each other.

    Raises:
        DataError: a key is unknown or missing, a number is NaN, or counts contradict each other; in one line.
    """
    told = checked(CanaryResult, values, name="canary.json", fix="run the pipeline again")
    names = [planted.family for planted in told.families]
    if len(set(names)) != len(names):
        raise DataError("canary.json: names a family twice; run the pipeline again")
    for planted in told.families:
        if planted.found.n != planted.num_poisoned or planted.num_poisoned > told.num_images:
            raise DataError(f"canary.json: {planted.family} counts other images than it poisoned; run the pipeline again")
    return told


M = TypeVar("M", bound=Measured)


def checked(model: type[M], values: dict[str, Any], *, name: str, fix: str) -> M:
    """`values` as a `model`, or a DataError in one line that names the file and the fix."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{name}: {where!r}: {first['msg'].lower()}; {fix}") from None


def _contradictions(measured: Evaluation) -> list[str]:
    """What in the evaluation cannot be true at once."""
    faults: list[str] = []
    classes = len(measured.class_names)
    if classes < 2 or len(set(measured.class_names)) != classes:
        faults.append("class_names needs at least two names, all different")
    accuracy = measured.clean_accuracy
    if accuracy.n != measured.num_images:
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
        else:
            faults += [f"{name} {fault}" for fault in _null_contradictions(trigger, measured.controls)]
    if measured.controls is not None and len(set(measured.controls.digests)) != measured.controls.count:
        faults.append(f"controls: {measured.controls.count} of them, but {len(set(measured.controls.digests))} digests")
    if measured.samples is not None:
        faults += _sample_contradictions(measured.samples, measured)
    if measured.champion is not None:
        faults += _champion_contradictions(measured.champion, measured)
    return faults


def _null_contradictions(trigger: Trigger, controls: Controls | None) -> list[str]:
    """What cannot be true of where the null came from: random triggers or controls, never both, and nothing else."""
    if trigger.null_controls is not None and (controls is None or trigger.null_controls != controls.count):
        return [f"was compared with {trigger.null_controls} controls, there are {controls.count if controls else 'none'}"]
    sources = sum(source is not None for source in (trigger.null_members, trigger.null_controls))
    if trigger.null is not None and sources != 1:
        return [f"has a null of {sources} sources, expected one: random triggers or controls"]
    if trigger.null is None and trigger.null_controls is not None:
        return [f"was compared with {trigger.null_controls} controls, but has no null"]
    return []


def _sample_contradictions(samples: Samples, measured: Evaluation) -> list[str]:
    if samples.data_digest != measured.data_digest:
        return ["samples are of another data set"]
    if [part.name for part in samples.per_class] != measured.class_names:
        return ["samples.per_class names other classes than class_names"]
    for name, parts in (("per_class", samples.per_class), ("per_source", samples.per_source)):
        if (sum(part.k for part in parts), sum(part.n for part in parts)) != (samples.suspects, samples.num_images):
            return [f"samples.{name} does not add up to {samples.suspects} suspects of {samples.num_images} images"]
    if samples.kept is not None and samples.kept.n != samples.suspects:
        return [f"samples.kept counts {samples.kept.n} suspects, there are {samples.suspects}"]
    return ["samples.followed counts more suspects than there are"] if samples.followed.n > samples.suspects else []


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
