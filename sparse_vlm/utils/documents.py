"""Json that others wrote, read in one place: what is wrong with it becomes one line that names the file, and the place in it.

Notable: stricter than `json.loads` where that passes over what was lost: a key that an object holds twice, NaN and Infinity, which are no
JSON, and bytes that are not UTF-8. A byte order mark is left out.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from sparse_vlm.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"  # how the text begins that git-lfs puts in a file's place
NOT_FETCHED = "a git-lfs pointer: the file itself was not fetched; git lfs pull brings it"


class _NotJson(ValueError):
    """What Python's parser reads and JSON does not know."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _NotJson(f"an object holds the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _constant(name: str) -> Any:
    raise _NotJson(f"{name} is not JSON; write null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def why_not(error: Exception) -> str:
    """What one of `ERRORS` says is wrong with a json."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, MemoryError):
        return "does not fit into memory"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, (json.JSONDecodeError, _NotJson)):
        return str(error)
    return "holds a number of too many digits"  # Python's limit of 4,300


ERRORS = (ValueError, RecursionError, MemoryError)  # of a decoder


def parse_json(data: bytes, where: str) -> Any:
    """The value that a json document in UTF-8 says.

    Args:
        where: the file, and the member or line of it, for messages.

    Raises:
        UserError: it is none; the line says what and where.
    """
    if data.startswith(LFS):
        raise UserError(f"{where}: {NOT_FETCHED}")
    try:
        return DECODER.decode(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except ERRORS as error:
        raise UserError(f"{where}: not a readable json file ({why_not(error)})") from None


def whole(text: str) -> bool:
    """Whether a text can be written as UTF-8: json may name half of a character of two (`\\ud83d`), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
