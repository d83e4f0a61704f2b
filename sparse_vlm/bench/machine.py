"""The machine at hand: what it is, what it can do at its best, and how much memory a piece of work takes there."""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

MATRIX_SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}  # by kind of device
COPIED_BYTES = 512 << 20  # beyond any cache but the largest
ROUNDS = 5
PACKAGES = ("torch", "transformers", "numpy", "pillow", "timm")


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, memory, accelerator, and how busy it is."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(torch.device("cpu")),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
        "accelerator": None,
        "load_average": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        described["accelerator"] = {"name": torch.cuda.get_device_name(device), "memory_bytes": memory_bytes(device)}
    return described


def versions() -> dict[str, str]:
    """Of ourselves and of what does the work."""
    from sparse_vlm import __version__

    found = {"sparse_vlm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """All memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(dtype: torch.dtype, device: torch.device, copied: int = COPIED_BYTES) -> dict[str, Any]:
    """What the device does at its best with the threads of this process: the fastest of some square matrix products, and of copies of a
    large buffer (bytes read and written).

    Args:
        copied: size of the buffer in bytes.
    """
    best = 0.0
    for side in MATRIX_SIDES[device.type]:
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = max(best, side**3 / _fastest(lambda left=left, right=right: left @ right, device))
    source = torch.ones(copied // dtype.itemsize, dtype=dtype, device=device)
    target = torch.zeros_like(source)
    moved = 2 * copied / _fastest(lambda: target.copy_(source), device)
    return {"dtype": str(dtype).removeprefix("torch."), "macs_per_second": round(best), "bytes_per_second": round(moved)}


def higher(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of both peaks, of two measurements: whatever else the machine did in one of them."""
    return {name: max(value, other[name]) if name.endswith("per_second") else value for name, value in one.items()}


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of `ROUNDS` calls after one that warms up."""
    seconds = []
    for _ in range(1 + ROUNDS):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that torch held at once during a call, beyond what it held before.

    On a CPU this is what its allocator was asked for, as the profiler records it: it does not depend on what else runs, and leaves out
    scratch memory that libraries take for themselves.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
