"""What the tests share: nothing asks the model hub, models are fetched into a folder of the test, the command runs as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder where models are kept, instead of the user's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("SPARSE_VLM_HOME", str(folder))
    yield folder


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `sparse-vlm` with the given arguments in a process of its own."""

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from sparse_vlm.cli import main; main()", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT, **options)

    return run
