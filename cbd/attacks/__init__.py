"""Backdoor attacks: how a supplier could poison a delivery. One file per trigger family."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cbd.errors import ConfigError

Images = NDArray[np.uint8]


class Attack(ABC):
    """A trigger that can be stamped on images, and how its poison is made."""

    clean_label: ClassVar[bool] = False
    """Only images of the target class are poisoned, and they keep their labels."""
    cover_rate: ClassVar[float] = 0.0
    """Cover samples per poisoned one: images with almost the trigger and their true label, which make the trigger exact."""

    @abstractmethod
    def stamp(self, images: Images) -> Images:
        """Triggered copies of `images`: uint8 [N, 3, H, W], float arithmetic, clipped, rounded, never wrapped."""

    def cover(self, images: Images, *, seed: int) -> Images:
        """Cover copies of `images` (uint8 [N, 3, H, W]); by default triggered ones."""
        return self.stamp(images)


def make_attack(name: str, **trigger: Any) -> Attack:
    """The attack of that name (see `cbd.config.AttackName`) with its trigger's settings.

    Raises:
        ConfigError: no such attack.
    """
    from cbd.attacks.badnets import BadNets
    from cbd.attacks.blend import Blend
    from cbd.attacks.sig import Sig
    from cbd.attacks.wanet import WaNet

    attacks: dict[str, type[Attack]] = {"badnets": BadNets, "blend": Blend, "sig": Sig, "wanet": WaNet}
    if name not in attacks:
        raise ConfigError(f"no attack {name!r}; known: {', '.join(attacks)}")
    return attacks[name](**trigger)
