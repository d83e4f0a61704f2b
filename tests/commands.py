"""Running `sparse-vlm`: forked from a process that has imported what it needs, which spares seconds; or as torchrun starts two."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALONE = [str(Path(sys.executable).with_name("sparse-vlm"))]
TWO = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "--no-python", *ALONE]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["open_clip", "matplotlib.pyplot", "sparse_vlm.train.bootstrap", "sparse_vlm.train.vlm", "sparse_vlm.eval"])


def run_command(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command at the top of the checkout, and tell how it ended and what it said.

    Raises:
        subprocess.TimeoutExpired: it ran for more than `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _FORKS.Process(target=_run, args=(arguments, dict(env or os.environ), said))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["sparse-vlm", *arguments], timeout, *(path.read_text() for path in said))
        return subprocess.CompletedProcess(arguments, process.exitcode, *(path.read_text() for path in said))


def finish(*arguments: str, start: list[str] = ALONE) -> str:
    """Run the command, as `ALONE` or `TWO` start it, to an end without errors; what it said."""
    line = [*start, *arguments]
    done = run_command(*arguments) if start is ALONE else subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _run(arguments: tuple[str, ...], env: dict[str, str], said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    from sparse_vlm.cli import main

    sys.argv = ["sparse-vlm", *arguments]
    main()
