"""Model bundles on disk: `model.safetensors` and `model.json`. Reading one here needs no torch."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import sha256_file

WEIGHTS = "model.safetensors"
CARD = "model.json"
MAX_HEADER = 4 * 2**20
"""Bytes of a safetensors header; a network of ten thousand tensors needs one."""
Kind = Literal["deconfounded", "confounder", "undefended"]


class BundleCard(BaseModel):
    """`model.json`: everything about a model but its weights. No time stamps: same training, same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Kind
    """Only a deconfounded or undefended model may ever be deployed; a confounder is backdoored by design."""
    architecture: str
    class_names: tuple[str, ...]
    image_size: int
    """Input contract: uint8 RGB [N, 3, image_size, image_size]; the model normalises inside."""
    data_digest: str
    """Digest of the data set it was trained on."""
    params: dict[str, Any]
    """The sections it was trained with."""
    seed: int
    trial: bool
    """Trained on a copy that was poisoned on purpose: never promotable."""
    weights_sha256: str


def read_card(bundle: Path) -> BundleCard:
    """The bundle's card, after checking that the weights are the ones it names.

    Raises:
        DataError: the folder is no bundle, the card is malformed, or the weights differ from the card's digest.
    """
    for name in (WEIGHTS, CARD):
        if not (bundle / name).is_file() or (bundle / name).is_symlink():
            raise DataError(f"{bundle}: no model bundle: {name} is missing; give the folder that holds {WEIGHTS} and {CARD}")
    try:
        card = BundleCard.model_validate(json.loads((bundle / CARD).read_text()))
    except (ValidationError, ValueError, RecursionError) as error:
        raise DataError(f"{bundle / CARD}: malformed: {str(error).splitlines()[0]}") from None
    found = sha256_file(bundle / WEIGHTS)
    if found != card.weights_sha256:
        raise DataError(f"{bundle / WEIGHTS}: altered: SHA-256 is {found[:12]}, {CARD} says {card.weights_sha256[:12]}; restore the bundle")
    return card


def check_weights(bundle: Path) -> None:
    """Checks that the weights are a safetensors file whose header tells the whole of it.

    Raises:
        DataError: a pickle or anything else under that name, a header of more than `MAX_HEADER` bytes, or one that does not fit the file.
    """
    from safetensors import SafetensorError, deserialize  # unlike `safe_open` it needs no array library

    path = bundle / WEIGHTS
    with path.open("rb") as file:
        announced = int.from_bytes(file.read(8), "little")
    if announced > MAX_HEADER:
        raise DataError(f"{path}: no safetensors file: its header announces {announced} bytes, at most {MAX_HEADER} are read; restore it")
    try:
        deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: no safetensors file: {str(error).splitlines()[0][:200]}; restore the bundle") from None


def bundle_digest(bundle: Path) -> str:
    """SHA-256 (hex) over the canonical JSON of {file name: SHA-256} for the bundle's two files."""
    return digest_of_files({name: sha256_file(bundle / name) for name in (WEIGHTS, CARD)})


def digest_of_files(files: Mapping[str, str]) -> str:
    """The digest of a bundle whose files have these SHA-256."""
    return hashlib.sha256(canonical_json(dict(files))).hexdigest()
