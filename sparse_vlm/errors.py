"""The one error that a person sees as a line instead of a traceback, and the place where what others raise becomes such a line.

Notable: only errors that come from outside are translated (the system, files that are no such files, memory that is not there); a mistake
of ours stays a traceback. Needs the standard library alone: errors of libraries are known by their names, so that none is imported for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator

# By module (its first part) and name of the class: files that are not what they should be.
_OF_FILES = {
    ("safetensors", "SafetensorError"),
    ("tarfile", "TarError"),
    ("zipfile", "BadZipFile"),
    ("zipfile", "LargeZipFile"),
    ("json", "JSONDecodeError"),
    ("PIL", "DecompressionBombError"),
    ("lzma", "LZMAError"),
    ("_lzma", "LZMAError"),
    ("zlib", "error"),
}
# How torch says, as a RuntimeError, that a file could not be written or read, and that there is no memory.
_TORCH_FILE = re.compile(r"PytorchStream(?:Writer|Reader)|inline_container\.cc|unexpected pos \d+")
_TORCH_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory")
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LONGEST = 600  # characters that a translated message has at most


class UserError(ValueError):
    """Something is wrong with what the user gave us. The message is one line: what, where, and what to do.

    The command line prints it and exits with code 2. Names and texts in it that hold line breaks or control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text as one line that a terminal shows and does not obey: control characters, surrogates and marks of direction as escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


def as_user_error(error: BaseException, what: str | os.PathLike[str] | None = None) -> UserError | None:
    """What an error from outside says, as one line; None for an error that may be a mistake of ours.

    Args:
        what: the file, folder or option that it was about, where the error does not name a file.
    """
    if isinstance(error, UserError):
        return error
    name = None if what is None else os.fspath(what)
    if isinstance(error, OSError) and error.strerror is not None:
        files = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, (str, bytes, os.PathLike))]
        return UserError(": ".join([*(files or ([name] if name else [])), _one_line(error.strerror)]))
    if isinstance(error, MemoryError) or _named(error, {("torch", "OutOfMemoryError")}) or _told(error, _TORCH_MEMORY):
        return UserError(": ".join([*([name] if name else []), "not enough memory"]))
    if isinstance(error, (OSError, EOFError)) or _named(error, _OF_FILES) or _told(error, _TORCH_FILE):
        return UserError(": ".join([*([name] if name else []), _one_line(error)]))
    return None


@contextlib.contextmanager
def about(what: str | os.PathLike[str], *also: type[Exception]) -> Iterator[None]:
    """Errors from outside, raised within, become a `UserError` that names what they were about.

    Args:
        what: a file, folder or option.
        also: classes that come from what the user gave as well, here.

    Raises:
        UserError: in place of the error; errors that may be ours go through as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = as_user_error(error, what)
        if found is None and isinstance(error, also):
            found = UserError(f"{os.fspath(what)}: {_one_line(error)}")
        if found is None:
            raise
        raise found from error


@contextlib.contextmanager
def naming(what: str | os.PathLike[str]) -> Iterator[None]:
    """A `UserError` that is raised within names `what` as well, where it does not yet."""
    try:
        yield
    except UserError as error:
        if printable(os.fspath(what)) in str(error):
            raise
        raise type(error)(f"{os.fspath(what)}: {error}") from error


def _named(error: BaseException, known: set[tuple[str, str]]) -> bool:
    return any((kind.__module__.partition(".")[0], kind.__name__) in known for kind in type(error).__mro__)


def _told(error: BaseException, how: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and bool(how.search(str(error)))


def _one_line(error: BaseException | str) -> str:
    """What an error says, in one line of bounded length; the name of its class where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[: LONGEST - 3]}..."
