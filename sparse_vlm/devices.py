"""What the machine at hand multiplies in."""

from __future__ import annotations

import torch


def native_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32: a processor without such instructions emulates them, many times slower."""
    native = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32
