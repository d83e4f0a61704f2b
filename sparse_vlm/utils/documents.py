"""Parse JSON strictly, with errors that name the file and the place in it.

Notable: refuses what `json.loads` accepts although data is lost: duplicate keys, NaN and Infinity (not JSON), and bytes that are not UTF-8.
A byte order mark is skipped.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from sparse_vlm.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"  # begin of the pointer that git-lfs puts in a file's place
NOT_FETCHED = "a git-lfs pointer: the file itself was not fetched; run git lfs pull"


class _NotJson(ValueError):
    """Python's parser accepts it, JSON does not."""


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _NotJson(f"an object holds the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _constant(name: str) -> Any:
    raise _NotJson(f"{name} is not JSON; write null")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def json_problem(error: Exception) -> str:
    """What is wrong with a JSON text, by the one of `ERRORS` that it caused."""
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
    """Parse a JSON document in UTF-8.

    Args:
        where: the file and the member or line in it, for messages.

    Raises:
        UserError: not JSON; the message says what is wrong and where.
    """
    if data.startswith(LFS):
        raise UserError(f"{where}: {NOT_FETCHED}")
    try:
        return DECODER.decode(data.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except ERRORS as error:
        raise UserError(f"{where}: not a readable json file ({json_problem(error)})") from None


def is_encodable(text: str) -> bool:
    """Whether a text can be encoded as UTF-8: JSON may hold a surrogate alone (`\\ud83d`), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
