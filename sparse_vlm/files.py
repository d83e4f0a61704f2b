"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written is flushed to disk and takes its name when all went well, and is gone when not.

    Several processes may write the same file at once: one of them wins, whole.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield part
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(where: str, document: Any) -> None:
    """Write a JSON document to a file, whole, or to stdout where its name is `-`."""
    text = json.dumps(document, indent=1) + "\n"
    if where == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(where), text)
