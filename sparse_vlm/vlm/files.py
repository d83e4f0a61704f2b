"""Tensors on disk: written aside and renamed, read strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_vlm.errors import UserError
from sparse_vlm.files import aside


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def check_tensors(path: Path, expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() ^ found.keys()):
        raise UserError(f"{path}: tensor {name} is {'missing' if name in expected else 'not one of the model'}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise UserError(f"{path}: tensor {name} is {tuple(found[name].shape)}, the model needs {shape}")


def write_tensors(state: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    with aside(path) as part:
        save_file({k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in state.items()}, part, metadata={"format": "pt"})
