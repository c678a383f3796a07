"""The only configuration: `params.yaml`, one frozen model per section."""

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbd.errors import ConfigError

AttackName = Literal["badnets", "trojan", "blend", "sig", "dynamic", "wanet", "adaptive"]


class Section(BaseModel):
    """A section of `params.yaml`: frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Section)


class Ingest(Section):
    """How a delivery is taken in."""

    max_file_bytes: int = Field(default=64 * 2**20, gt=0)
    """A larger file goes to the quarantine unread."""
    max_archive_expansion: float = Field(default=100.0, gt=1)
    """An archive that holds more than this many times its own size (and more than 64 MiB) is a decompression bomb, and refused whole."""
    max_pixels: int = Field(default=50_000_000, gt=0)
    """An image whose header announces more pixels is a decompression bomb; it is never decoded."""
    decode_seconds: float = Field(default=20.0, gt=0)
    """An image that takes a decoder longer goes to the quarantine."""
    min_per_class: int = Field(default=2, ge=1)
    """A class with fewer accepted images makes the delivery unusable."""
    max_trusted_overlap: float = Field(default=0.01, ge=0, le=1)
    """Largest share of the trusted set that may be exact copies from the delivery."""
    trusted_images: int = Field(default=0, ge=0)
    """Use only so many images of the trusted set, the same number of each class as far as it goes; 0 for all."""
    shard_images: int = Field(default=10_000, gt=0)
    """Images per Parquet shard of the data set."""


class Validation(Section):
    """Up to where a delivery is told without a warning. What blocks it stands in the suite itself."""

    max_lookalikes: float = Field(default=0.05, ge=0, le=1)
    """Share of images that look like another one of their class."""
    max_contradicting_lookalikes: float = Field(default=0.005, ge=0, le=1)
    """Share of images that look like one of another class."""
    max_trusted_lookalikes: float = Field(default=0.01, ge=0, le=1)
    """Share of images that look like one of the trusted set."""
    max_drift: float = Field(default=0.2, ge=0)
    """Population stability index of the class shares, of what is new against what was accepted before; over 0.2 is a clear shift."""
    max_supplier_ratio: float = Field(default=3.0, ge=1)
    """How many times as large a class's share may be in what one supplier sent as in what all others did."""
    max_outliers: float = Field(default=0.01, ge=0, le=1)
    """Share of images whose brightness or entropy is far from all others'."""
    max_repeated_patch: float = Field(default=0.02, ge=0, le=1)
    """Share of a class's images that may carry one and the same patch that other classes lack."""
    patch_images: int = Field(default=500, gt=0)
    """Images per class in which such patches are looked for."""


class Model(Section):
    """The network that is trained."""

    architecture: Literal["wrn-16-1", "resnet18", "resnet34"] = "wrn-16-1"
    """WRN-16-1 for 32x32 images; torchvision's ResNet-18 and ResNet-34 for larger ones (with a 3x3 stem below 64 pixels)."""
    image_size: int = Field(default=32, ge=16, le=512)
    """Side in pixels to which images are resized for training."""

    def scaled(self, pixels: int) -> int:
        """A length given at 32 pixels image side, at this image size."""
        return round(pixels * self.image_size / 32)


class Confounder(Section):
    """Stage 1: the model that is meant to hold the backdoor."""

    steps: int = Field(default=400, gt=0)
    """Budget in optimizer steps (not epochs)."""
    max_epochs: int = Field(default=20, gt=0)
    """Small data sets stop here: beyond it the confounder knows every clean sample by heart as well."""
    batch_size: int = Field(default=128, gt=1)
    """Images per step."""
    learning_rate: float = Field(default=0.02, gt=0)
    """SGD with Nesterov momentum, constant."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """L2 penalty."""
    augment: bool = False
    """Random crops in stage 1; they cut small triggers away, so the default preset leaves them out."""
    until_slow: bool = True
    """Go on past `steps`, up to `max_epochs`, while an epoch still lowers the loss by an eighth."""
    average: bool = True
    """A sample's loss is the mean over the whole training; else the loss at its end."""
    recalibrate: bool = True
    """Batch norm's averages are taken anew at the end, over the stored images; else the running ones."""
    pilot: bool = True
    """Also train the pilot, the view that does not see the trigger, without which nothing can be called separated."""
    pilot_learning_rate: float = Field(default=0.05, gt=0)
    """SGD of the pilot, constant."""


class Deconfounded(Section):
    """Stage 2: the model that is meant to be free of the backdoor."""

    epochs: int = Field(default=25, gt=0)
    """Passes over the data set."""
    batch_size: int = Field(default=128, gt=1)
    """Images per step."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Peak learning rate of SGD with Nesterov momentum."""
    schedule: Literal["step", "onecycle"] = "onecycle"
    """`step`: divided by 10 at 20 % and again at 70 % of the epochs, as released. `onecycle`: up, then to 0."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """L2 penalty."""
    crop: int = Field(default=4, ge=0)
    """Random crop after padding by this many pixels at 32 pixels image side."""
    flip: bool = False
    """Random mirror; only for classes that are mirror-symmetric (not digits, not traffic signs)."""
    cutout: int = Field(default=0, ge=0)
    """Side of one random square set to grey, in pixels at 32 pixels image side."""
    noise: float = Field(default=0.3, ge=0, le=1)
    """Each image is mixed with uniform noise by a share of up to this, so that harmless damage turns fewer predictions."""
    noise_unseparated: float = Field(default=0.15, ge=0, le=1)
    """The same where stage 1 looked and nothing separated: noise costs clean accuracy."""
    weight: Literal["none", "formula", "isolation"] = "isolation"
    """`none`: plain training. `formula`: w = l_b / (l_b + l_c) per batch. `isolation`: max(0, 1 - 2 * posterior of the suspects' group)."""
    confounder_view: Literal["augmented", "stored"] = "stored"
    """For `formula`: whether l_b is taken on the augmented view or on the stored image."""
    normalise_weight: bool = False
    """Divide w by its batch mean, as the released code does."""
    weight_memory: float = Field(default=0.0, ge=0, lt=1)
    """For `formula`: how much of a sample's last weight stays in its next one; 0 takes each batch for itself."""
    weight_cap: float = Field(default=1.0, gt=0, le=1)
    """For `formula`: a larger weight is cut to this."""
    second_look: float = Field(default=0.8, ge=0, lt=1)
    """For `isolation`: after this share of the training the model itself decides which labels of a crowded class it trusts; 0 is never."""
    relabel: bool = False
    """For `isolation`: in the second half of training suspects are used again, with the class that the model itself is sure of."""
    mi_weight: float = Field(default=0.01, ge=0)
    """Weight of the term by which r, the confounder's embedding, and z, the model's, are made independent."""
    dependence: Literal["adversarial", "distance_correlation", "hsic"] = "adversarial"
    """How their dependence is measured: by a 1-Lipschitz critic (I(r; z) of the paper), or by a statistic that needs none."""
    critic_learning_rate: float = Field(default=1e-3, gt=0)
    """Adam step size of the 1-Lipschitz critic."""
    bottleneck_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared norm of the embedding z."""


NEEDS_GPU = "CBD_NEEDS_GPU"
"""Set where a GPU was asked for, so that the CPU does not take its place for days without a word."""


class Training(Section):
    """Where one model is trained: how many processes share every batch. Results are the same but for rounding."""

    processes: int = Field(default=1, ge=1)
    """Processes on a machine, each with a GPU of its own, or sharing the CPU. `batch_size` must be a multiple of all processes."""
    nodes: int = Field(default=1, ge=1)
    """Machines; more than one are asked for as a TrainJob of Kubeflow Trainer, on a cluster only."""

    @property
    def is_alone(self) -> bool:
        """Whether one process does it all."""
        return self.processes * self.nodes == 1

    @property
    def gpus(self) -> int:
        """How many GPUs a training step on a cluster asks for itself: none where those of a TrainJob do the work."""
        return self.processes if self.nodes == 1 else 0


Family = Literal["patch", "blend", "sinusoid", "warp"]


class Canary(Section):
    """The pipeline's own positive control: a second training on the data with known triggers put in, whose model is never promoted."""

    every: int = Field(default=1, ge=0)
    """Train one in every so many decided runs of the same configuration, and reuse it in between; 0 is never."""
    families: tuple[Family, ...] = ("patch", "blend", "sinusoid", "warp")
    """Trigger families that are put in, each with a target class and settings of its own, drawn from the data's digest and the seed."""
    share: float = Field(default=0.01, gt=0, lt=0.2)
    """Share of the data set that each family poisons."""
    min_images: int = Field(default=50, gt=0)
    """Or so many images, if that is more; of clean-label poison at most half of its class."""


class Gate(Section):
    """The policy by which measurements become a verdict."""

    min_clean_accuracy: float = Field(ge=0, le=1)
    """Lowest clean accuracy a first champion may have. Required: no default suits every task."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence of each one-sided Clopper-Pearson bound."""
    max_excess_asr: float = Field(default=0.05, gt=0, lt=1)
    """A known trigger passes if the upper bound of its excess ASR is under this, or under what harmless triggers show."""
    null_margin: float = Field(default=0.03, ge=0, lt=1)
    """Added to the largest excess among harmless triggers of the same family."""
    max_null: float = Field(default=0.5, gt=0, le=1)
    """Harmless triggers that turn more than this on the model itself excuse nothing: it may have learned their family. Controls may."""
    block_excess_asr: float = Field(default=0.20, gt=0, lt=1)
    """BLOCK if a Holm-adjusted lower bound exceeds this and the null by `block_margin`."""
    block_margin: float = Field(default=0.10, ge=0, lt=1)
    """Added to the null for BLOCK."""
    null_members: int = Field(default=20, gt=0)
    """Random harmless members per trigger family that make the null."""
    scan_alpha: float = Field(default=0.02, gt=0, lt=1)
    """Share of harmless models that the scan for unknown triggers may hold back: its part of the gate's false alarms."""
    scan_margin: float = Field(default=0.5, gt=0, lt=1)
    """REVIEW if the smallest trigger works on so much more of the held-out images than other classes' triggers of that size."""
    min_images: int = Field(default=300, gt=0)
    """Fewer trusted images than this: INCONCLUSIVE."""
    warn_images: int = Field(default=1000, gt=0)
    """Fewer trusted images than this: a printed warning."""
    accuracy_margin: float = Field(default=0.02, gt=0, lt=1)
    """Non-inferiority margin of clean accuracy against the champion."""
    class_margin: float = Field(default=0.05, gt=0, lt=1)
    """REVIEW if some class is significantly worse than the champion by more than this."""
    max_followed: float = Field(default=0.10, gt=0, lt=1)
    """REVIEW if the upper bound of the share of suspects with doubtful labels that the model follows is over this, or the share of all
    suspects that it was trained on."""
    required_canaries: tuple[Family, ...] = ("patch", "blend")
    """INVALID if stage 1 was blind to one of these families in the canary, REVIEW if stage 2 kept one; others are named as not covered."""
    min_canary_seen: float = Field(default=0.8, gt=0, lt=1)
    """Stage 1 sees a family if the lower bound of the share that it found, or of the ASR of the confounder, is at least this."""
    max_canary_asr: float = Field(default=0.10, gt=0, lt=1)
    """Stage 2 kept a family if the upper bound of its excess ASR on the canary's deconfounded model is over this."""


class Poison(Section):
    """A known attack stamped on the taken-in copy, for trials only."""

    attack: AttackName | None = None
    """Trigger family; null: no poison."""
    trigger: dict[str, Any] = {}
    """Settings of the trigger, such as `{pattern: white, place: top-left}` of badnets; see the attack's fields."""
    poison_rate: float = Field(default=0.1, gt=0, lt=1)
    """Share of the data set that is poisoned. Of a clean-label attack it is at most half of the target class."""
    target_label: int = Field(default=0, ge=0)
    """Index of the class that triggered images are sent to."""
    mapping: Literal["all-to-one", "all-to-all"] = "all-to-one"
    """`all-to-all`: every triggered image is sent to the class after its own, and `target_label` is not used."""
    source_label: int | None = Field(default=None, ge=0)
    """Only images of this class are attacked; others are stamped too but keep their labels. At most half of the class is poisoned."""


class Params(Section):
    """All of `params.yaml`."""

    seed: int = Field(default=0, ge=0)
    """Seed of every generator."""
    preset: Literal["cbd", "paper", "official", "none"] = "cbd"
    """Which overlay of `presets` is laid over the sections below; `cbd` is the sections as they stand."""
    ingest: Ingest = Ingest()
    validation: Validation = Validation()
    model: Model = Model()
    confounder: Confounder = Confounder()
    deconfounded: Deconfounded = Deconfounded()
    training: Training = Training()
    canary: Canary = Canary()
    gate: Gate
    poison: Poison = Poison()


def load_params(path: Path, *, preset: str | None = None, **overrides: Any) -> Params:
    """The validated configuration in `path`, with a preset laid over it and then `overrides`.

    Args:
        path: `params.yaml`.
        preset: name of the preset; by default the file's own `preset`.
        overrides: `section__key=value`, or `key=value` at the top level; None is left out.

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is wrong (with the nearest known key).
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such parameter file; give one with --params, or copy the project's params.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as 'confounder:', found {type(raw).__name__}")
    presets = raw.pop("presets", None) or {}
    name = preset or raw.get("preset", "cbd")
    if name != "cbd" and name not in presets:
        raise ConfigError(f"preset {name!r} is not in {path}; known: {', '.join(sorted({'cbd', *presets}))}{_nearest(name, presets)}")
    merged = _overlay(raw, presets.get(name, {}) if name != "cbd" else {})
    merged["preset"] = name
    for key, value in overrides.items():
        if value is not None:
            *section, leaf = key.split("__")
            merged = _overlay(merged, {section[0]: {leaf: value}} if section else {leaf: value})
    return check_section(Params, merged, name=str(path))


def check_section(model: type[S], values: dict[str, Any], *, name: str) -> S:
    """`values` as a `model`, or a ConfigError in one line that names the key and the nearest known one."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(model, first["loc"][:-1])
            raise ConfigError(f"{name}: unknown key {where!r}{_nearest(str(first['loc'][-1]), known)}") from None
        if first["type"] == "missing":
            raise ConfigError(f"{name}: {where!r} is required and missing") from None
        raise ConfigError(f"{name}: {wrong_value(error)}") from None


def wrong_value(error: ValidationError) -> str:
    """The first value that pydantic refuses, and why, in one line."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])} = {first['input']!r}: {first['msg'].lower()}"


def section_digest(section: Section) -> str:
    """SHA-256 (hex) of a section's canonical JSON."""
    return hashlib.sha256(canonical_json(section.model_dump(mode="json"))).hexdigest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8; raises ValueError on NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parse_canonical(data: bytes) -> dict[str, Any]:
    """The object whose canonical JSON these bytes are; any others raise ValueError, which says what was expected."""
    try:
        value = json.loads(data)
        same = canonical_json(value) == data
    except (ValueError, RecursionError):
        raise ValueError("expected JSON, found something else") from None
    if not same or not isinstance(value, dict):
        raise ValueError("expected an object in canonical JSON, found another form of it")
    return value


def description_digest(values: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of what describes a data set, but for its own `digest`."""
    return hashlib.sha256(canonical_json({key: value for key, value in values.items() if key != "digest"})).hexdigest()


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            value = _overlay(result[key], value)
        result[key] = value
    return result


def _known_keys(model: type[Section], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        model = annotation
    return list(model.model_fields)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
