"""`sparse-vlm` in a process forked from one that has imported what it needs: apart as a user's, without the seconds that imports take."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["open_clip", "matplotlib.pyplot", "sparse_vlm.train.bootstrap", "sparse_vlm.train.vlm", "sparse_vlm.eval"])


def sparse_vlm(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
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


def _run(arguments: tuple[str, ...], env: dict[str, str], said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    from sparse_vlm.cli import main

    sys.argv = ["sparse-vlm", *arguments]
    main()
