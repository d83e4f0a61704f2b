"""Records of large json files, read where they stand: a list of a gigabyte is gone through once, piece by piece, and never held.

Notable: Python's own parser does the work. What is cut off at the end of a piece looks to it like a mistake, so it is tried again with
the next piece, and believed where the mistake lies too far back for that.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from sparse_vlm.errors import UserError
from sparse_vlm.utils.documents import DECODER, ERRORS, LFS, NOT_FETCHED, json_problem, parse_json

LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINES)
_PIECE = 1 << 22  # bytes
_LONGEST = 1 << 24  # characters that one string may have
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        number: its place in the list, from 0; of json lines its line, from 1.
        offset, size: where it stands, in bytes.
        value: the parsed record; None if it cannot be parsed.
        error: why it cannot be read, else empty.
    """

    number: int
    offset: int
    size: int
    value: Any
    error: str = ""


def scan(path: Path, on_bytes: Callable[[int], None] = lambda size: None) -> Iterator[Record]:
    """All records of a json list, or of json lines where the suffix says so.

    Args:
        on_bytes: called with the number of bytes just read.

    Raises:
        UserError: no such file, or a list that is none or breaks off; a line that cannot be read is a record with an `error`.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file")
        with open(path, "rb") as stream:
            if stream.read(len(LFS)) == LFS:
                raise UserError(f"{path}: {NOT_FETCHED}")
            stream.seek(0)
            if stream.read(len(_BOM)) != _BOM:
                stream.seek(0)
            yield from (_lines if path.suffix.lower() in LINES else _list)(path, stream, on_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_at(path: Path, offset: int, size: int) -> Any:
    """The value of a record that `scan` found.

    Raises:
        UserError: the file was changed since.
    """
    try:
        # opened anew each time: a file that forked workers share has one position for all of them
        with open(path, "rb") as stream:
            stream.seek(offset)
            return parse_json(stream.read(size), str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: was changed while it is in use (at byte {offset}); start again") from error


def _lines(path: Path, stream: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Record]:
    offset = stream.tell()
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                value, why = DECODER.decode(line.decode()), ""
            except ERRORS as error:
                value, why = None, f"not a line of json ({json_problem(error)})"
            yield Record(number, offset, len(line), value, why)
        offset += len(line)
        on_bytes(len(line))


def _list(path: Path, stream: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[Record]:
    window = _Window(path, stream, on_bytes)
    if window.next() != "[":
        raise window.mistake("not a list of samples; json lines need the suffix .jsonl")
    window.skip()
    number = 0
    while window.next() != "]":
        if number:
            if window.next() != ",":
                raise window.mistake("no comma between two samples" if window.next() else "the list breaks off")
            window.skip()
            window.next()
        yield window.record(number)
        number += 1
    window.skip()
    if window.next():
        raise window.mistake("something follows the list")


class _Window:
    """A piece of a text file; `at` is where in it the next character stands, `offset` where that is in the file, in bytes."""

    def __init__(self, path: Path, stream: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self.path, self.stream, self.on_bytes = path, stream, on_bytes
        self.text, self.at, self.offset, self.ended = "", 0, stream.tell(), False
        self.utf8 = codecs.getincrementaldecoder("utf-8")()

    def more(self) -> None:
        """Drop what was read and read on."""
        block = self.stream.read(_PIECE)
        self.on_bytes(len(block))
        self.ended = not block
        try:
            self.text = self.text[self.at :] + self.utf8.decode(block, final=self.ended)
        except UnicodeDecodeError as error:
            raise self.mistake(f"not UTF-8 ({error.reason})") from error
        self.at = 0

    def next(self) -> str:
        """Peek at the next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.skip()
            if self.ended:
                return ""
            self.more()

    def skip(self) -> None:
        """Leave the next character, which is of ASCII, behind."""
        self.at += 1
        self.offset += 1

    def record(self, number: int) -> Record:
        """The value that begins at the next character."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:  # else a number may go on in the next piece
                    break
            except json.JSONDecodeError as error:
                if self.ended or error.pos < len(self.text) - _LONGEST:
                    self.offset += len(self.text[self.at : error.pos].encode())
                    raise self.mistake(f"{error.msg}, in sample {number}") from error
            except ERRORS as error:
                raise self.mistake(f"{json_problem(error)}, in sample {number}") from None
            self.more()
        size = len(self.text[self.at : end].encode())
        record = Record(number, self.offset, size, value)
        self.at, self.offset = end, self.offset + size
        return record

    def mistake(self, what: str) -> UserError:
        """An error that says where in the file the next character stands."""
        self.stream.seek(0)
        before = self.stream.read(self.offset)
        line, column = before.count(b"\n") + 1, self.offset - before.rfind(b"\n")
        return UserError(f"{self.path}, line {line}, byte {column}: not a LLaVA json ({what})")
