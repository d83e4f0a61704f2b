"""Check JSON documents against a schema written in Python.

A schema is a type (`str`, `bool`, `int`, `float` for any finite number, None), `Number(least)`, a tuple of alternatives, a list with the
schema of its items, or a dict: of schemas by key, where a key that ends in `?` is optional, or with the one key `str` for an object with
any keys. Keys without a schema are ignored: a later version may add some.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError, printable

LARGEST = 1e24  # absolute value of a number; products of several such stay finite
_WORDS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", None: "null"}


@dataclass(frozen=True)
class Number:
    """A finite number of at least `least`; greater than it if `above`."""

    least: float = 0.0
    above: bool = False
    whole: bool = False


COUNT = Number(0, whole=True)
SIZE = Number(0, above=True)
SOME = Number(1, whole=True)


def read_json(path: Path, what: str = "name another file") -> Any:
    """Read a JSON document, with control characters in its strings escaped.

    Args:
        what: advice for the message.

    Raises:
        UserError: no such file, not JSON (NaN and Infinity are not), or nested too deep.
    """
    try:
        return _printable(json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; {what}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deep; {what}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {what}") from None


def check(found: Any, wanted: Any, where: str, what: str = "make it again") -> None:
    """Check a document, or a part of one, against a schema.

    Args:
        where: the file, and the path to the part in it.
        what: advice for the message.

    Raises:
        UserError: names the first part that does not match.
    """
    if (wrong := _problem(found, wanted, "")) is not None:
        at, problem = wrong
        raise UserError(f"{where}: {at.lstrip('.') + ' ' if at else ''}{problem}; {what}")


def _problem(found: Any, wanted: Any, at: str) -> tuple[str, str] | None:
    """The path to the first mismatch, and what is wrong there."""
    if isinstance(wanted, tuple):
        problems = [_problem(found, each, at) for each in wanted]
        # the alternative that matched furthest explains best
        return None if None in problems else max(problems, key=lambda problem: len(problem[0]))  # type: ignore[index, arg-type]
    if isinstance(wanted, list):
        if not isinstance(found, list):
            return at, f"is {_shown(found)}, and must be a list"
        return next((p for i, item in enumerate(found) if (p := _problem(item, wanted[0], f"{at}[{i}]")) is not None), None)
    if isinstance(wanted, Mapping):
        if not isinstance(found, dict):
            return at, f"is {_shown(found)}, and must be an object"
        if set(wanted) == {str}:
            return next((p for key, item in found.items() if (p := _problem(item, wanted[str], f"{at}.{key}")) is not None), None)
        for key, each in wanted.items():
            name = key.removesuffix("?")
            if name not in found:
                if key == name:
                    return at, f"holds no {name}"
            elif (problem := _problem(found[name], each, f"{at}.{name}")) is not None:
                return problem
        return None
    if isinstance(wanted, Number):
        fine = _is_number(found) and (found > wanted.least if wanted.above else found >= wanted.least)
        if fine and (not wanted.whole or float(found).is_integer()):
            return None
        kind = "a whole number" if wanted.whole else "a number"
        return at, f"is {_shown(found)}, and must be {kind} {'above' if wanted.above else 'of at least'} {wanted.least:g}"
    fine = {
        str: lambda: isinstance(found, str),
        bool: lambda: isinstance(found, bool),
        int: lambda: _is_number(found) and float(found).is_integer(),
        float: lambda: _is_number(found),
        None: lambda: found is None,
    }[wanted]()
    return None if fine else (at, f"is {_shown(found)}, and must be {_WORDS[wanted]}")


def _is_number(found: Any) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and -LARGEST <= found <= LARGEST and math.isfinite(found)


def _shown(found: Any) -> str:
    text = json.dumps(found) if not isinstance(found, (dict, list)) else {dict: "an object", list: "a list"}[type(found)]
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON number")


def _printable(found: Any) -> Any:
    if isinstance(found, str):
        return printable(found)
    if isinstance(found, list):
        return [_printable(each) for each in found]
    if isinstance(found, dict):
        return {printable(key): _printable(each) for key, each in found.items()}
    return found
