"""What the tests share: nothing asks the model hub, models are fetched into a folder of the test, the command runs as a user runs it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import commands
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# looks are compiled once for all tests, and not into the user's folder
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).resolve().parents[1] / "build" / "extensions"))
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; before torch is imported, for it and for the commands that tests run
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # as in the background of a shell: the commands that tests interrupt would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder where models are kept, instead of the user's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SPARSE_VLM_HOME", str(folder))
    yield folder


@pytest.fixture(scope="module")
def teacher_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of toy size, as `--teacher` takes it."""
    from tiny_teacher import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher") / "vit")


@pytest.fixture(scope="module")
def teacher(teacher_name: str) -> Any:
    """The same, loaded."""
    from sparse_vlm.teachers import load_teacher

    return load_teacher(teacher_name)


@pytest.fixture
def command() -> Callable[..., CompletedProcess[str]]:
    """Runs `sparse-vlm` with the given arguments in a process of its own."""
    return commands.run_command
