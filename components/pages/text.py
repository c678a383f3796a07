"""Values as people read them. Every text of a supplier is hostile: what cannot be seen is spelled out."""

import unicodedata
from typing import Any

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories that are invisible or that reorder what is around them."""
THIN = "\u202f"
"""Narrow no-break space between a number and its unit."""
ABSENT = "–"


def visible(value: Any) -> Any:
    """`value` as text in which control, format and direction characters are spelled `⟨U+202E⟩`; markup stays as it is."""
    if hasattr(value, "__html__"):
        return value
    return "".join(f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in HIDDEN else c for c in str(value))


def clip(value: Any, length: int = 120) -> str:
    """`value` as text of at most `length` characters; the middle of a longer one is left out."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length * 2 // 3]} … {text[-length // 4 :]}"


def percent(rate: Any) -> str:
    """A fraction in [0, 1] as percent."""
    if rate is None:
        return ABSENT
    value = 100 * float(rate)
    return f"{value:.{2 if 0 < value < 0.1 else 1}f}{THIN}%"


def bounds(low: Any, high: Any) -> str:
    """The two one-sided bounds of a rate."""
    return ABSENT if low is None or high is None else f"{percent(low)} to {percent(high)}"


def of(k: Any, n: Any) -> str:
    """`k of n`."""
    return ABSENT if k is None or n is None else f"{count(k)} of {count(n)}"


def count(value: Any) -> str:
    """A whole number with groups of three digits."""
    return ABSENT if value is None else f"{int(value):,}".replace(",", THIN)


def number(value: Any) -> str:
    """A number with three significant digits; anything else as it stands."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else clip(value)


def seconds(value: Any) -> str:
    """A time in seconds, or minutes from two minutes on."""
    if value is None:
        return ABSENT
    value = float(value)
    return f"{int(value // 60)}{THIN}min {value % 60:02.0f}{THIN}s" if value >= 120 else f"{value:.1f}{THIN}s"


def size(num_bytes: Any) -> str:
    """A size in bytes, kB or MB."""
    if num_bytes is None:
        return ABSENT
    value = float(num_bytes)
    if value < 1000:
        return f"{value:.0f}{THIN}B"
    return f"{value / 1e3:.1f}{THIN}kB" if value < 1e6 else f"{value / 1e6:.1f}{THIN}MB"
