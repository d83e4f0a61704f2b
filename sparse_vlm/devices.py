"""What the machine at hand multiplies in, and which of several processes this one is."""

from __future__ import annotations

import os

import torch


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32: a processor without such instructions emulates them, many times slower."""
    native = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def own_device() -> torch.device:
    """The GPU that is this process's, where there are any; else the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")


def rank() -> int:
    """This process's number among those that torchrun started; 0 where it did not."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes torchrun started; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", 1))
