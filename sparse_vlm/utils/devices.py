"""What the machine at hand multiplies in, how its CPUs are used, and which of several processes this one is."""

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
    """bfloat16 where the device multiplies in it, else float32: a CPU without such instructions emulates them, many times slower."""
    native = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def set_cpu_threads(threads: int | None = None, keep_memory: bool = True) -> None:
    """Set up the CPUs for long work: how many threads compute, and that freed memory is kept.

    Args:
        threads: as torch decides unless given.
        keep_memory: whether to `keep_freed_memory`.
    """
    if threads:
        torch.set_num_threads(threads)
    if keep_memory:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor, where it is the C library; elsewhere nothing happens.

    By itself it gives each tensor above 32 MB back to the system, which clears every page anew when it is asked for the next one
    (docs/speed.md says what that costs). The process stays as large as it was at its largest, until it is told to `give_back_if_scarce`.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_if_scarce(share: float = 0.15) -> bool:
    """Return freed memory to the system, where it was kept and less than a share of the machine's memory is left to others.

    Returns:
        Whether it was returned. Where the machine does not say what is left (/proc/meminfo), nothing is.
    """
    found = _memory()
    scarce = bool(found) and found["MemAvailable"] < share * found["MemTotal"]
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if scarce else None
    return trim is not None and bool(trim(0))


def _memory() -> dict[str, int]:
    """What the machine says of its memory, in kB; empty where it does not."""
    try:
        with open("/proc/meminfo") as stream:
            found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in stream)}
    except (OSError, ValueError, IndexError):
        return {}
    return found if {"MemAvailable", "MemTotal"} <= found.keys() else {}


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has free; None where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = _memory()
    return 1024 * found["MemAvailable"] if found else None


def few_tokens(device: torch.device) -> AbstractContextManager[Any]:
    """What a tower that learns runs its SDPA in: on a CPU plain attention is faster than the fused kernel, at its few tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # not in the torch of old LLaVA environments, which import this module

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Where something that `--compile` asked for runs for the first time.

    Raises:
        UserError: torch's compiler failed, as where there is no C++ compiler.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        why = str(error).strip().splitlines()[0]
        raise UserError(f"--compile: torch could not compile {what} ({why}); leave --compile away") from error


def own_device() -> torch.device:
    """The GPU that is this process's, where there are any; else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """This process's number among those that torchrun started; 0 where it did not."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", 1))
