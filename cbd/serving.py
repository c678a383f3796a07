"""A model is given out only with everything that speaks for it: signature, digests, and a decision that demands an alias."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cbd.bundle import BundleCard, bundle_digest, check_weights, read_card
from cbd.decision import SignedDecision, find_key, open_decision
from cbd.errors import ConfigError, DataError
from cbd.keys import PublicKey, read_trusted_keys
from cbd.model_signature import MODEL_SIGNATURE, SIGNED_FILES, verify_model

if TYPE_CHECKING:
    from cbd.models import Network

TRUST = "CBD_TRUST"
"""Names what `load` trusts where it is not told: a public key, or a folder of them."""
DEMANDED = {"champion": "PASS", "candidate": "REVIEW"}
"""The verdict that the model behind an alias must have."""


def load(bundle: str | os.PathLike[str], *, trust: str | os.PathLike[str] | None = None) -> tuple["Network", BundleCard]:
    """The network of a champion in evaluation mode, and its card; nothing is returned unless everything about it holds.

    The folder holds `model.safetensors`, `model.json`, `decision.json`, `decision.sig` and `model.sig`: the folder `model` of what
    `cbd audit export` wrote, or what `models:/NAME@champion` was fetched to. The network maps images: uint8 RGB
    [N, 3, image_size, image_size] to (logits: float [N, num_classes], embedding). What is checked and what is loaded is one private copy.

    Args:
        bundle: the folder.
        trust: public key (P-256, PEM) that must have signed, or a folder of such `.pub` files; by default what `CBD_TRUST` names. It must
            not come from where the model came from.

    Raises:
        ConfigError: nothing is named that could be trusted.
        DataError: with the reason: no trusted signature, an altered file, a decision about another model, a verdict other than PASS, a
            trial, a confounder.
    """
    named = trust or os.environ.get(TRUST)
    if not named:
        raise ConfigError(f"no key to trust: expected the workspace's keys/signing.pub, found none; give trust=KEY or set {TRUST}")
    folder, keys = Path(bundle), read_trusted_keys(Path(named))
    with tempfile.TemporaryDirectory() as private:
        copied = copy_signed(folder, Path(private) / "model", told=str(folder))
        try:
            check_verdict(check_model(copied, keys), "champion", told=str(folder))
        except DataError as error:
            raise DataError(str(error).replace(str(copied), str(folder))) from None
        from cbd.models import load_model

        return load_model(copied)


def copy_signed(source: Path, out: Path, *, told: str) -> Path:
    """`out`, a folder with copies of exactly the files of a signed model; nobody else changes them between check and use.

    Raises:
        DataError: one is missing.
    """
    out.mkdir()
    for name in (*SIGNED_FILES, MODEL_SIGNATURE):
        if not (source / name).is_file() or (source / name).is_symlink():
            raise DataError(f"{told}: {name} is missing; only a model with its signed decision and its signature is used")
        shutil.copyfile(source / name, out / name)
    return out


def check_model(folder: Path, keys: Sequence[PublicKey]) -> SignedDecision:
    """The decision on the model in `folder`, after checking that one trusted key signed both, and that they belong together.

    Whether its verdict is good enough is another question, see `check_verdict`.

    Raises:
        DataError: unsigned, signed by another key, altered, a decision on another model, a confounder, or weights that are none.
    """
    signed = open_decision(folder, keys)
    card, digests = read_card(folder), signed.content["digests"]
    check_weights(folder)
    if card.kind == "confounder":
        raise DataError(f"{folder}: a confounder holds the backdoor by design and is never deployed; give the deconfounded model")
    for name, found in (("model", bundle_digest(folder)), ("data", card.data_digest)):
        if digests[name] != found:
            raise DataError(f"{folder}: altered: {name} {found[:12]}, its signed decision is about {str(digests[name])[:12]}; restore it")
    if card.trial and not signed.content["trial"]:
        raise DataError(f"{folder}: a model of purposely poisoned data, which its decision does not say; decide again")
    verify_model(folder, find_key(signed.content, keys, told=str(folder)))
    return signed


def check_verdict(signed: SignedDecision, alias: str, *, told: str) -> None:
    """Raises DataError unless the decision is one that the alias demands: PASS for `champion`, REVIEW for `candidate`, and no trial."""
    content = signed.content
    if content["trial"] or content["verdict"] != DEMANDED.get(alias):
        what = "a trial" if content["trial"] else f"verdict {content['verdict']}"
        raise DataError(f"{told}: behind the alias {alias} stands {what}; expected {DEMANDED.get(alias)}, run the pipeline to set it again")
