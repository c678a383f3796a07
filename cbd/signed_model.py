"""A model on disk with everything that speaks for it: signature, digests, and the signed decision about exactly it. Needs no torch."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from cbd.bundle import bundle_digest, check_weights, read_card
from cbd.decision import SignedDecision, find_key, open_decision
from cbd.errors import DataError
from cbd.keys import PublicKey
from cbd.model_signature import MODEL_SIGNATURE, SIGNED_FILES, verify_model

DEMANDED = {"champion": "PASS", "candidate": "REVIEW"}
"""The verdict that the model behind an alias must have, unless a person's override that has not expired says otherwise."""


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


def check_verdict(signed: SignedDecision, alias: str, *, told: str, worst: str | None = None) -> None:
    """Raises DataError unless the decision is one that the alias demands: PASS for `champion`, REVIEW for `candidate`, and no trial.

    `worst` is the verdict that a person's override allows all the same.
    """
    content = signed.content
    if content["trial"] or content["verdict"] not in (DEMANDED.get(alias), worst):
        what = "a trial" if content["trial"] else f"verdict {content['verdict']}"
        raise DataError(f"{told}: behind the alias {alias} stands {what}; expected {DEMANDED.get(alias)}, run the pipeline to set it again")
