"""`python tools/start_up.py`: what starting costs before anything is computed.

Notable: seconds of processor time (user and system) of processes of their own, the least of several in turn: they say what starting needs
on a machine that does other things as well, where the time on the clock does not.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from experiments import as_program

from sparse_vlm.errors import UserError

COMMAND = str(Path(sys.executable).with_name("sparse-vlm"))
STARTS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import sparse_vlm": [sys.executable, "-c", "import sparse_vlm"],
    "sparse-vlm --version": [COMMAND, "--version"],
    "sparse-vlm --help": [COMMAND, "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import torch, sparse_vlm.tower": [sys.executable, "-c", "import torch, sparse_vlm.tower"],
}


def measure(starts: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Seconds of processor time that each line takes, the least of `rounds` processes.

    Raises:
        UserError: a line that does not run.
    """
    least = dict.fromkeys(starts, float("inf"))
    for _ in range(rounds):
        for name, line in starts.items():
            before = _spent()
            try:
                subprocess.run(line, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(f"{name}: does not run here ({error})") from error
            least[name] = min(least[name], _spent() - before)
    return least


def _spent() -> float:
    """Seconds that processes begun by this one, and ended, have taken."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(rounds: Annotated[int, typer.Option(help="Processes of each line, of which the least counts.", min=1)] = 7) -> None:
    """What starting costs."""
    print("| | seconds of a core |\n|---|---:|")
    for name, seconds in measure(STARTS, rounds).items():
        print(f"| `{name}` | {seconds:.2f} |")


if __name__ == "__main__":
    as_program(main, "start_up")
