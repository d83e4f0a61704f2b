"""What a number, a word and a list of a configuration must be; a boolean is no number, and NaN is within nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Make sure that it is a whole number from `low` to `high`.

    Raises:
        ValueError: naming it, as all of these do.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {_shown(value)}, expected a whole number from {low} to {high}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """Make sure that it is a number from `low` to `high`."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} is {_shown(value)}, expected a number from {low:g} to {high:g}")


def triple(name: str, values: Any, low: float, high: float) -> None:
    """Make sure that it is such a number for each of three colours."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 3:
        raise ValueError(f"{name} is {_shown(values)}, expected three numbers")
    for value in values:
        within(f"a number of {name}", value, low, high)


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Make sure that it is one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {_shown(value)}; known are {', '.join(known)}")


def truth(name: str, value: Any) -> None:
    """Make sure that it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {_shown(value)}, expected true or false")


def product(name: str, most: int, *factors: int) -> None:
    """Make sure that what takes memory does not take too much of it."""
    if (found := math.prod(factors)) > most:
        raise ValueError(f"{name}: {found:,}, and no tower has more than {most:,}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of so many digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."
