"""`UserError`, which the command line prints as one line without a traceback, and the translation of other errors to it.

Notable: only errors with an outside cause are translated (the system, damaged files, no memory); a bug of ours keeps its traceback. Needs
only the standard library: errors of libraries are recognized by name, without importing them.
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator

# Damaged files: (first part of the module, class name).
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
# Messages of torch's RuntimeErrors: a file could not be written or read, and no memory.
_TORCH_FILE = re.compile(r"PytorchStream(?:Writer|Reader)|inline_container\.cc|unexpected pos \d+")
_TORCH_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|Cannot allocate memory")
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
LONGEST = 600  # characters of a translated message, at most


class UserError(ValueError):
    """The user's input is wrong. The message is one line: what is wrong, where, and what to do.

    The command line prints it and exits with code 2. Line breaks and control characters in it are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """A text as one line without terminal commands: control characters, surrogates and direction marks are escaped."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


def as_user_error(error: BaseException, what: str | os.PathLike[str] | None = None) -> UserError | None:
    """An error with an outside cause as one line; None for an error that may be a bug of ours.

    Args:
        what: the file, folder or option it was about, for errors that name no file.
    """
    if isinstance(error, UserError):
        return error
    name = None if what is None else os.fspath(what)
    if isinstance(error, OSError) and error.strerror is not None:
        files = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, (str, bytes, os.PathLike))]
        return UserError(": ".join([*(files or ([name] if name else [])), _one_line(error.strerror)]))
    if isinstance(error, MemoryError) or _named(error, {("torch", "OutOfMemoryError")}) or _matches(error, _TORCH_MEMORY):
        return UserError(": ".join([*([name] if name else []), "not enough memory"]))
    if isinstance(error, (OSError, EOFError)) or _named(error, _OF_FILES) or _matches(error, _TORCH_FILE):
        return UserError(": ".join([*([name] if name else []), _one_line(error)]))
    return None


@contextlib.contextmanager
def about(what: str | os.PathLike[str], *also: type[Exception]) -> Iterator[None]:
    """Raise errors with an outside cause as a `UserError` that names `what`.

    Args:
        what: a file, folder or option.
        also: further classes that the user's input can cause here.

    Raises:
        UserError: in place of the error; errors that may be bugs of ours are raised as they are.
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
    """Prefix a `UserError` with `what` unless its message contains it."""
    try:
        yield
    except UserError as error:
        if printable(os.fspath(what)) in str(error):
            raise
        raise type(error)(f"{os.fspath(what)}: {error}") from error


def _named(error: BaseException, known: set[tuple[str, str]]) -> bool:
    return any((kind.__module__.partition(".")[0], kind.__name__) in known for kind in type(error).__mro__)


def _matches(error: BaseException, how: re.Pattern[str]) -> bool:
    return isinstance(error, RuntimeError) and bool(how.search(str(error)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty; the name of its class without one."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _one_line(error: BaseException | str) -> str:
    """A whole message as one line of bounded length; the name of the error's class without one."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 3]}..."
