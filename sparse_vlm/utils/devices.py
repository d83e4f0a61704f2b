"""Devices, dtypes, memory and processes of this machine."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from sparse_vlm.errors import UserError

# numbers of glibc's mallopt (malloc.h)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 if the device has instructions for it, else float32: a CPU without them emulates bfloat16, many times slower."""
    native = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def set_cpu_threads(threads: int | None = None, keep_memory: bool = True) -> None:
    """Set up the CPUs for long work: how many threads compute, and that freed memory is kept.

    Args:
        threads: torch's default if None.
        keep_memory: call `keep_freed_memory`.
    """
    if threads:
        torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor; without glibc nothing happens.

    By default glibc returns each tensor above 32 MB to the system, which zeroes every page again for the next one (cost: lab/speed.md).
    The process keeps its peak size until `trim_memory_if_scarce`.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def trim_memory_if_scarce(share: float = 0.15) -> bool:
    """Return freed memory to the system if less than a share of the machine's memory is available.

    Returns:
        Whether memory was returned; False without /proc/meminfo.
    """
    found = _memory()
    scarce = bool(found) and found["MemAvailable"] < share * found["MemTotal"]
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if scarce else None
    return trim is not None and bool(trim(0))


def _memory() -> dict[str, int]:
    """/proc/meminfo in kB; empty if it cannot be read."""
    try:
        with open("/proc/meminfo") as stream:
            found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in stream)}
    except (OSError, ValueError, IndexError):
        return {}
    return found if {"MemAvailable", "MemTotal"} <= found.keys() else {}


def free_memory(device: torch.device) -> int | None:
    """Free bytes of a device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = _memory()
    return 1024 * found["MemAvailable"] if found else None


def training_attention(device: torch.device) -> AbstractContextManager[Any]:
    """The SDPA backend for training a tower: on a CPU plain attention is faster than the fused kernel at its few tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # not in the torch of old LLaVA environments, which import this module

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Translate compiler errors; for the block in which compiled code runs first.

    Raises:
        UserError: torch's compiler failed, for example without a C++ compiler.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = str(error).strip().splitlines()[0]
        raise UserError(f"--compile: torch could not compile {what} ({why}); leave --compile away") from error


def own_device() -> torch.device:
    """This process's GPU, or the CPU if there is none."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """This process's rank under torchrun; 0 without."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes under torchrun; 1 without."""
    return int(os.environ.get("WORLD_SIZE", 1))
