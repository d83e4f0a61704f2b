"""What starting costs, by what is imported: times depend on the machine, imports do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
from start_up import measure

from sparse_vlm.errors import UserError

HOSTS = {"transformers", "timm", "open_clip", "peft", "torchvision"}
HEAVY = HOSTS | {"torch", "numpy", "PIL", "safetensors", "matplotlib", "huggingface_hub", "importlib.metadata"}


def imported(code: str) -> set[str]:
    """Which of `HEAVY` a fresh interpreter has imported after some code, whether or not that ends the process."""
    ask = f"import atexit, sys; atexit.register(lambda: print(*[n for n in {sorted(HEAVY)} if n in sys.modules], file=sys.stderr))\n"
    done = subprocess.run([sys.executable, "-c", ask + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["bench", "--help"], ["eval", "--help"], ["train", "--help"]])
def test_help_imports_nothing_that_computes(words: list[str]) -> None:
    code = f"import sys; sys.argv = ['sparse-vlm', *{words}]\nfrom sparse_vlm.cli import main\nmain()"
    assert imported(code) - {"importlib.metadata"} == set()


def test_the_package_imports_nothing_until_something_of_it_is_used() -> None:
    assert imported("import sparse_vlm") == set()
    assert imported("from sparse_vlm import UserError") == set()


def test_the_tower_imports_torch_and_no_host() -> None:
    found = imported("from sparse_vlm import SparseFormer, SparseFormerConfig")
    assert "torch" in found and found & (HOSTS | {"PIL", "safetensors", "matplotlib", "huggingface_hub"}) == set()


def test_seconds_are_of_the_processes_that_were_begun() -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    lines = {"nothing": [sys.executable, "-c", "pass"], "waits": [sys.executable, "-c", "import time; time.sleep(0.5)"]}
    found = measure({**lines, "computes": [sys.executable, "-c", burn]}, rounds=2)
    assert 0 < found["nothing"] < 0.3 and found["waits"] < 0.3 and 0.45 < found["computes"] < 1.5
    with pytest.raises(UserError, match="broken: does not run here"):
        measure({"broken": [sys.executable, "-c", "1 / 0"]}, rounds=1)
