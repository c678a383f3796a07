"""Clean controls: models of honest data, with which a candidate of the same configuration is compared. Reading one here needs no torch."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbd.bundle import CARD, BundleCard, read_card
from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import sha256_file

MIN_CONTROLS = 5
"""Fewer than this compare nothing: the largest rate among few harmless models says too little of harmless models."""
SECTIONS = ("model", "confounder", "deconfounded")
"""What two models must share to be compared."""
TRAINED_ON = "trained-on.txt"
"""File in a control's folder: the pixel digest of each of its training images, one a line."""
RECORD = "control"
"""Key in the parameters on the control's card, beside the sections."""


class ControlRecord(BaseModel):
    """What a control's card adds to any model's. Being in the card, the registry's digest covers it, and by it the list of images."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    trained_on_sha256: str
    """SHA-256 of `trained-on.txt`."""
    false_suspects: int = Field(ge=0)
    """Of its own training images, which are honest, those that became suspects."""
    num_images: int = Field(gt=0)
    """How many images it was trained on."""


def config_digest(params: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the sections that a model was trained with; a section that is missing counts as empty."""
    return hashlib.sha256(canonical_json({name: params.get(name, {}) for name in SECTIONS})).hexdigest()


def record_of(card: BundleCard) -> ControlRecord | None:
    """What the card says of the control's training; None of a model that `cbd controls build` did not make.

    Raises:
        DataError: what it says is malformed.
    """
    if RECORD not in card.params:
        return None
    try:
        return ControlRecord.model_validate(card.params[RECORD])
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{CARD}: {RECORD}: {first['loc']}: {first['msg'].lower()}; build the control again") from None


def trained_on(control: Path) -> frozenset[str]:
    """Pixel digests of the images that a control was trained on; none for a model that does not know.

    Raises:
        DataError: the list is missing or altered.
    """
    record = record_of(read_card(control))
    if record is None:
        return frozenset()
    path = control / TRAINED_ON
    if path.is_symlink() or not path.is_file():
        raise DataError(f"{path}: missing: nothing tells what the control was trained on; build the control again")
    if (found := sha256_file(path)) != record.trained_on_sha256:
        raise DataError(f"{path}: altered: SHA-256 is {found[:12]}, {CARD} says {record.trained_on_sha256[:12]}; build the control again")
    return frozenset(path.read_text().split())
