"""Tensors on disk: written aside and renamed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_vlm.utils.files import atomic_path


def write_tensors(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    with atomic_path(path) as part:
        save_file({k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in state.items()}, part, metadata={"format": "pt"})
