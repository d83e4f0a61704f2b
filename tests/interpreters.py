"""Other interpreters: one that lacks some distributions, and one that runs a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Makes distributions look as if they were not installed, to an import as well as to who asks before importing.
BLOCK = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {absent} else found(name, package)
"""
IMPORT_NAMES = {
    "pillow-heif": "pillow_heif",
    "pillow": "PIL",
    "open_clip_torch": "open_clip",
    "scikit-learn": "sklearn",
    "huggingface-hub": "huggingface_hub",
    "flash-attn": "flash_attn",
    "prometheus-client": "prometheus_client",
    "lmms-eval": "lmms_eval",
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
