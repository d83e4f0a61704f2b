"""Compiling and loading the C++ kernels.

Notable: `cpp/` is compiled by the machine's own compiler at the first use, which takes about ten seconds. The library is cached where
torch caches its extensions (`$TORCH_EXTENSIONS_DIR`), under a hash of the sources, the compiler and the CPU. Without a compiler, torch
computes the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from sparse_vlm.utils import files

FOLDER = Path(__file__).with_name("cpp")
# no -ffast-math: linked into a library, it would make the whole process round its smallest numbers to zero
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-strict-aliasing", "-fno-math-errno",
         "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math")  # fmt: skip
TIMEOUT_S = 180  # of the compiler, on a busy machine
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# argument types of the C++ functions: address, long, int, float; the number of threads is the last argument
ARGUMENTS = {
    "linear": "aaafaaafiiiiaa",
    "attention_core": "aaiiiiia",
    "attention_block": "aaafaaaaaiiiiiaa",
    "mlp_block": "aaafaaiaafiiiaa",
    "convolve": "aaafiiiia",
    "points": "alaaafiiiia",
    "positions": "aaaaflial",
    "adjust_rois": "alaaiiia",
    "sample_and_mix": "aaiaiaaiiiiiiiial",
    "crop_rois": "aaaiiiiiia",
    "average_positions": "aaiiiia",
    "focus": "aaafiiiiiiiia",
    "place_cells": "aafiiiiia",
}
_KINDS = {"a": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled library; None where the sources cannot be compiled, or the library cannot be cached or loaded."""
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None or platform.system() != "Linux":
        return None
    # torch's own OpenMP first, so that both share one thread pool
    runtime = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    command = [compiler, *FLAGS, *map(str, [*sorted(FOLDER.glob("*.cpp")), *runtime])]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT_S).stdout
        parts = b"\0".join([*(path.read_bytes() for path in sorted(FOLDER.iterdir())), version, " ".join(command).encode(), _cpu_model()])
        path = _folder() / f"towers-{hashlib.sha256(parts).hexdigest()[:16]}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.atomic_path(path) as part:
                subprocess.run([*command, "-o", str(part)], capture_output=True, check=True, timeout=TIMEOUT_S)
        return _declare(ctypes.CDLL(str(path)))
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, letters in ARGUMENTS.items():
        for kind in TYPES.values():
            function = getattr(library, f"{name}_{kind}", None)
            if function is None:  # for other CPUs
                continue
            function.argtypes, function.restype = [*(_KINDS[letter] for letter in letters), ctypes.c_int], None
    return library


def _folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser() / "sparse_vlm"


def _cpu_model() -> bytes:
    """Model and instruction sets of this CPU: machines may share a home directory."""
    lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    return b"\n".join(sorted({line for line in lines if line.startswith((b"model name", b"flags", b"Features", b"CPU part"))}))


def call(name: str, dtype: torch.dtype, *given: Tensor | float | None) -> None:
    """Call a C++ function for a dtype, with torch's number of threads as its last argument."""
    function = getattr(load(), f"{name}_{TYPES[dtype]}")
    # `given` keeps the tensors alive until the call returns
    function(*(each.data_ptr() if isinstance(each, Tensor) else each for each in given), torch.get_num_threads())
