"""What tables of runs share: a row's command is one of ours, carried out by the interpreter's own `sparse-vlm`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from sparse_vlm.errors import UserError


def carry_out(line: list[str]) -> None:
    """Run a command whose first word is `sparse-vlm`; what it prints goes to stderr, because stdout is the table's.

    Raises:
        typer.Exit: with the command's exit code, where that is not 0.
    """
    done = subprocess.run([str(Path(sys.executable).with_name(line[0])), *line[1:]], stdout=sys.stderr)
    if done.returncode:
        raise typer.Exit(done.returncode)


def as_program(main: Callable[..., Any], name: str) -> None:
    """Run a module as a program; a user's mistake is one line and exit code 2."""
    try:
        typer.run(main)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
