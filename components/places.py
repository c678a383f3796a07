"""What may lie in the data registry, and where: each kind has a folder and tags of its own.

So no supplier's name makes a delivery look like anything else.
"""

import hashlib
import re
from typing import NamedTuple

DELIVERY, TRUSTED, POISONED, CANARY, CONTROL = "delivery", "trusted set", "poisoned copy", "canary", "clean control"
SUSPECTS = "list of suspects"
FOLDERS = {DELIVERY: "datasets", TRUSTED: "trusted", POISONED: "poisoned", CANARY: "canaries", CONTROL: "controls", SUSPECTS: "suspects"}
_PREFIXES = {"trusted/": TRUSTED, "poison@": POISONED, "canary/": CANARY, "control/": CONTROL, "suspects/": SUSPECTS}


class Place(NamedTuple):
    """Where in the registry something belongs."""

    path: str
    """In the repository, without an ending."""
    tag: str
    """Before the first 12 digits of the digest."""


def of_delivery(supplier: str, date: str) -> Place:
    """The place of data sets from a supplier: what was taken in, for training."""
    return Place(f"{FOLDERS[DELIVERY]}/{slug(supplier)}", f"{date}/{slug(supplier)}")


def of_trusted_set(date: str) -> Place:
    """The place of trusted sets."""
    return Place(f"{FOLDERS[TRUSTED]}/set", f"trusted/{date}")


def of_poisoned_copy(attacks: str, date: str) -> Place:
    """The place of copies that were poisoned on purpose, each with its truth."""
    return Place(f"{FOLDERS[POISONED]}/{slug(attacks)}", f"poison@{slug(attacks)}/{date}")


def of_canary(date: str) -> Place:
    """The place of copies with known triggers that show what a test can see, each with its truths."""
    return Place(f"{FOLDERS[CANARY]}/set", f"canary/{date}")


def of_control(digest: str, date: str) -> Place:
    """The place of a model of honest data; there are several at a time."""
    return Place(f"{FOLDERS[CONTROL]}/{digest[:12]}", f"control/{date}")


def of_suspects(date: str) -> Place:
    """The place of lists of suspects, one for each run that has any."""
    return Place(f"{FOLDERS[SUSPECTS]}/list", f"suspects/{date}")


def kind_of(tag: str) -> str:
    """What lies under a tag."""
    return next((kind for prefix, kind in _PREFIXES.items() if tag.startswith(prefix)), DELIVERY)


def path_of(tag: str) -> str | None:
    """Where in the repository lies what has this tag; None for a tag of no such form."""
    kind, parts = kind_of(tag), tag.split("/")
    if len(parts) != 3:
        return None
    name = {DELIVERY: parts[1], POISONED: parts[0].partition("@")[2], CONTROL: parts[2], SUSPECTS: "list"}.get(kind, "set")
    return f"{FOLDERS[kind]}/{name}"


def slug(supplier: str) -> str:
    """The supplier's name as a safe part of paths and tags: lower-case letters, digits and dashes.

    A name that lost something gets 8 hex digits of its SHA-256, and so does a name that ends like that: two suppliers never share one.
    """
    safe = re.sub(r"[^a-z0-9]+", "-", supplier.lower()).strip("-")[:40].strip("-")
    if safe and safe == supplier and not re.search(r"-[0-9a-f]{8}$", safe):
        return safe
    return f"{safe or 'supplier'}-{hashlib.sha256(supplier.encode(errors='surrogatepass')).hexdigest()[:8]}"
