"""The one error that a person sees as a line instead of a traceback."""

from __future__ import annotations

import unicodedata

_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class UserError(ValueError):
    """Something is wrong with what the user gave us. The message is one line: what, where, and what to do.

    The command line prints it and exits with code 2.
    """


def printable(text: str) -> str:
    """A text as one line that a terminal shows and does not obey: control characters, surrogates and marks of direction as escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )
