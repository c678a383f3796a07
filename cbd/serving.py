"""A model is given out only with everything that speaks for it: signature, digests, and a decision that a champion needs."""

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cbd.bundle import BundleCard
from cbd.errors import ConfigError, naming
from cbd.keys import read_trusted_keys
from cbd.signed_model import check_model, check_verdict, copy_signed

if TYPE_CHECKING:
    from cbd.models import Network

TRUST = "CBD_TRUST"
"""Names what `load` trusts where it is not told: a public key, or a folder of them."""


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
        with naming({copied: str(folder)}):
            check_verdict(check_model(copied, keys), "champion", told=str(folder))
        from cbd.models import load_model

        return load_model(copied)
