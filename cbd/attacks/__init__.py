"""Backdoor attacks: how a supplier could poison a delivery. One file per trigger family."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cbd.errors import ConfigError

Images = NDArray[np.uint8]


class Attack(Protocol):
    """A trigger that can be stamped on images."""

    def stamp(self, images: Images) -> Images:
        """Triggered copies of `images`: uint8 [N, 3, H, W], float arithmetic, clipped, rounded, never wrapped."""
        ...


def make_attack(name: str, **trigger: Any) -> Attack:
    """The attack of that name with its trigger's settings.

    Raises:
        ConfigError: no such attack.
    """
    from cbd.attacks.badnets import BadNets
    from cbd.attacks.blend import Blend

    attacks: dict[str, type[Attack]] = {"badnets": BadNets, "blend": Blend}
    if name not in attacks:
        raise ConfigError(f"no attack {name!r}; known: {', '.join(attacks)}")
    return attacks[name](**trigger)
