"""Backdoor attacks: how a supplier could poison a delivery. One file per trigger family."""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from cbd.config import wrong_value
from cbd.errors import ConfigError

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


class Attack(ABC):
    """A trigger that can be stamped on images, and how its poison is made. A frozen dataclass: its fields are the trigger's settings."""

    trained: ClassVar[bool] = False
    """Its trigger is made with a network that is trained on the images to be poisoned (`craft`)."""
    clean_label: ClassVar[bool] = False
    """Only images of the target class are poisoned, and they keep their labels."""
    cover_rate: ClassVar[float] = 0.0
    """Cover samples per poisoned one: images with almost the trigger and their true label, which make the trigger exact."""

    @classmethod
    def craft(cls, images: Images, labels: Labels, *, target_label: int, seed: int) -> Self:
        """The attack made for these images (uint8 [N, 3, 32, 32]) and labels (int64 [N]); all but the `trained` ones look at neither."""
        return cls()

    @abstractmethod
    def stamp(self, images: Images) -> Images:
        """Triggered copies of `images`: uint8 [N, 3, H, W], float arithmetic, clipped, rounded, never wrapped."""

    def poison(self, images: Images, *, target_label: int) -> Images:
        """What is put into the training data: by default triggered copies of `images` (uint8 [N, 3, H, W])."""
        return self.stamp(images)

    def cover(self, images: Images, *, seed: int) -> Images:
        """Cover copies of `images` (uint8 [N, 3, H, W]); by default triggered ones."""
        return self.stamp(images)

    def settings(self) -> dict[str, Any]:
        """What makes the trigger again, as JSON can hold it."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]


def attack_class(name: str) -> type[Attack]:
    """The attack of that name (see `cbd.config.AttackName`).

    Raises:
        ConfigError: no such attack.
    """
    from cbd.attacks.adaptive import Adaptive
    from cbd.attacks.badnets import BadNets
    from cbd.attacks.blend import Blend
    from cbd.attacks.dynamic import Dynamic
    from cbd.attacks.sig import Sig
    from cbd.attacks.trojan import Trojan
    from cbd.attacks.wanet import WaNet

    attacks: dict[str, type[Attack]] = {
        "badnets": BadNets,
        "trojan": Trojan,
        "blend": Blend,
        "sig": Sig,
        "dynamic": Dynamic,
        "wanet": WaNet,
        "adaptive": Adaptive,
    }
    if name not in attacks:
        raise ConfigError(f"no attack {name!r}; known: {', '.join(attacks)}")
    return attacks[name]


def configure(name: str, settings: dict[str, Any]) -> Attack:
    """The attack of that name with settings from outside, checked against its fields.

    Raises:
        ConfigError: no such attack or setting, a value of the wrong type or range, or settings for an attack that makes its own trigger.
    """
    kind = attack_class(name)
    if kind.trained and settings:
        raise ConfigError(f"poison.trigger: {name} makes its trigger itself, but found {', '.join(settings)}; leave them out")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"poison.trigger: {name} has no setting {setting!r}; known: {', '.join(known) or 'none'}")
    try:
        return TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise ConfigError(f"poison.trigger: {wrong_value(error)}") from None


def make_attack(name: str, **trigger: Any) -> Attack:
    """The attack of that name with its trigger's settings; raises ConfigError if there is none of that name."""
    return attack_class(name)(**trigger)
