"""The method: train image classifiers on data nobody vouches for. Knows nothing of the platform around it."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cbd.bundle import BundleCard
    from cbd.models import Network


def load(bundle: str | os.PathLike[str], *, trust: str | os.PathLike[str] | None = None) -> tuple["Network", "BundleCard"]:
    """The champion in the folder `bundle` and its card, only after everything that speaks for it was verified: see `cbd.serving.load`."""
    from cbd import serving

    return serving.load(bundle, trust=trust)
