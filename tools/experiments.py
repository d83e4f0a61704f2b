"""What tables of runs share: where finished runs are kept, and rows' commands, carried out by the interpreter's own `sparse-vlm`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from filelock import FileLock

from sparse_vlm.errors import UserError
from sparse_vlm.utils.files import write_text


class FinishedRuns:
    """The numbers of finished runs, by name: one JSON file, `{"settings": ..., "runs": {name: {number's name: value}}}`.

    Args:
        path: of the file; it need not exist.
        settings: what runs must share to be compared, of JSON types.

    Raises:
        UserError: the file is of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.runs = self._read()

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.path.exists():
            return {}
        document = json.loads(self.path.read_text())
        if (settings := document.get("settings")) != self.settings:
            raise UserError(f"{self.path} is of {settings}, this is {self.settings}; choose another --out")
        return document["runs"]

    def add(self, name: str, run: dict[str, float]) -> None:
        """Keep a run, beside those that another process or thread may have kept since."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            self.runs = self._read() | {name: run}
            document = {"settings": self.settings, "runs": self.runs}
            write_text(self.path, json.dumps(document, indent=1, sort_keys=True) + "\n")


def carry_out(line: list[str], log: Path | None = None) -> None:
    """Run a command whose first word is `sparse-vlm`.

    Args:
        log: a file that takes what it prints, behind what it holds; stderr unless given, because stdout is the table's.

    Raises:
        typer.Exit: with the command's exit code, where that is not 0.
    """
    command = [str(Path(sys.executable).with_name(line[0])), *line[1:]]
    if log is None:
        done = subprocess.run(command, stdout=sys.stderr)
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as stream:
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        if log is not None:
            print(f"failed, with exit code {done.returncode}; {log} says why: {shlex.join(line)}", file=sys.stderr)
        raise typer.Exit(done.returncode)


def as_program(main: Callable[..., Any], name: str) -> None:
    """Run a module as a program; a user's mistake is one line and exit code 2."""
    try:
        typer.run(main)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
