"""Checks of configuration values: integers, numbers, words, booleans. A boolean is not a number, and NaN is in no range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def whole(name: str, value: Any, low: int, high: int) -> None:
    """Check for an integer from `low` to `high`.

    Raises:
        ValueError: with the name of the value; so do all functions here.
    """
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {_shown(value)}, expected a whole number from {low} to {high}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """Check for a number from `low` to `high`."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} is {_shown(value)}, expected a number from {low:g} to {high:g}")


def triple(name: str, values: Any, low: float, high: float) -> None:
    """Check for three numbers from `low` to `high`, one a channel."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 3:
        raise ValueError(f"{name} is {_shown(values)}, expected three numbers")
    for value in values:
        within(f"a number of {name}", value, low, high)


def one_of(name: str, value: Any, known: Sequence[str]) -> None:
    """Check for one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {_shown(value)}; known are {', '.join(known)}")


def truth(name: str, value: Any) -> None:
    """Check for a boolean."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {_shown(value)}, expected true or false")


def product(name: str, most: int, *factors: int) -> None:
    """Check that a product of sizes is at most `most`."""
    if (size := math.prod(factors)) > most:
        raise ValueError(f"{name}: {size:,} is more than the limit of {most:,}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of this many digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:60]}..."
