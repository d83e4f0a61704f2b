"""Running `sparse-vlm` in one process or two, forked from one that has imported what they need, which spares many seconds.

`ALONE` and `TWO` are how a user starts them, for tests that stop a run by a signal.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALONE = [str(Path(sys.executable).with_name("sparse-vlm"))]
TWO = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2", "--no-python", *ALONE]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["open_clip", "matplotlib.figure", "sparse_vlm.train.distillation", "sparse_vlm.train.vlm", "sparse_vlm.eval.report"]
)


def run_command(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run the command at the top of the checkout, and tell how it ended and what it said.

    Raises:
        subprocess.TimeoutExpired: it ran for more than `timeout` seconds, and was killed.
    """
    return _run_processes(arguments, [dict(env or os.environ)], timeout)


def free_port() -> str:
    """A port that nobody listens on, to meet at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_two(*arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """The same in two processes that find each other as torchrun lets them; what they said, one after the other.

    Raises:
        subprocess.TimeoutExpired: they ran for more than `timeout` seconds, and were killed.
    """
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    return _run_processes(arguments, [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"], timeout)


def run_apart(target: Callable[..., None], *arguments: str, timeout: float = 500) -> None:
    """Call a function in a process of its own, which may change what it likes.

    Raises:
        AssertionError: it ended with an error, which is on stderr, or did not end.
    """
    process = _FORKS.Process(target=target, args=arguments)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{target.__name__} ended with {process.exitcode}"


def _run_processes(arguments: tuple[str, ...], envs: list[dict[str, str]], timeout: float) -> subprocess.CompletedProcess[str]:
    """One process for each environment; the exit code is the first that is not 0."""
    until = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        said = [[Path(folder) / f"{name}{number}" for name in ("stdout", "stderr")] for number in range(len(envs))]
        processes = [_FORKS.Process(target=_run, args=(arguments, env, paths)) for env, paths in zip(envs, said, strict=True)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(until - time.monotonic(), 0))
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        streams = ["".join(path.read_text() for path in paths if path.exists()) for paths in zip(*said, strict=True)]
        if late:
            raise subprocess.TimeoutExpired(["sparse-vlm", *arguments], timeout, *streams)
        codes = [process.exitcode or 0 for process in processes]
        return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), *streams)


def finish(*arguments: str, start: list[str] = ALONE) -> str:
    """Run the command to an end without errors, in one process (`ALONE`) or in two (`TWO`); what it said."""
    done = run_command(*arguments) if start is ALONE else run_two(*arguments)
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
