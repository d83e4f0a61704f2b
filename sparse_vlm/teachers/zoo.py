"""Teachers of the zoo: the image tower of an open_clip model, with int8 weights.

A folder holds `open_clip_config.json` (without a text side) and `model.safetensors`. Matrices are int8 with a scale for each row of the
first dimension, `NAME.scale`; other tensors are stored as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.hub.store import entries, locate
from sparse_vlm.hub.weights import check_shapes, read_tensors, write_tensors
from sparse_vlm.teachers import open_clip_vit
from sparse_vlm.teachers.base import Teacher, TeacherError
from sparse_vlm.utils.files import write_text
from sparse_vlm.utils.schema import read_json

SCALE = ".scale"
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}  # open_clip's CLIP needs a text side


def is_zoo_teacher(name: str) -> bool:
    """Whether the zoo has a teacher of this name."""
    entry = entries().get(name)
    return entry is not None and entry.kind == "teacher"


def load_zoo_teacher(name: str) -> Teacher:
    """A teacher of the zoo by name.

    Raises:
        UserError: no such teacher, or a damaged folder.
        TeacherError: open_clip is not installed.
    """
    folder = locate(name, kind="teacher")
    return open_clip_vit.read(name, *_load(folder), licence=entries()[name].license)


def _load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Image tower and preprocessing."""
    try:
        import open_clip
    except ImportError as error:
        raise TeacherError(f"loading a teacher needs open_clip: pip install 'sparse-vlm[train]' ({error})") from None
    config = read_json(folder / "open_clip_config.json", "fetch the model again")
    try:
        model = open_clip.CLIP(**config["model_cfg"], text_cfg=_NO_TEXT)
        preprocess = dict(config["preprocess_cfg"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder / 'open_clip_config.json'}: not the configuration of a teacher ({error})") from error
    path = folder / "model.safetensors"
    weights = dequantize(read_tensors(path))
    own = model.visual.state_dict()
    check_shapes(path, {name: tuple(t.shape) for name, t in own.items()}, {name: tuple(t.shape) for name, t in weights.items()})
    model.visual.load_state_dict(weights)
    return model.visual.eval().requires_grad_(False), preprocess


def save_zoo_teacher(visual: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Write the folder of a teacher.

    Args:
        visual: a `VisionTransformer` of open_clip.
        config: the content of its `open_clip_config.json`; its text side is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = {name: value for name, value in config["model_cfg"].items() if name in ("embed_dim", "quick_gelu", "vision_cfg")}
    write_text(
        folder / "open_clip_config.json", json.dumps({"model_cfg": model, "preprocess_cfg": config["preprocess_cfg"]}, indent=1) + "\n"
    )
    write_tensors(quantize(visual.state_dict()), folder / "model.safetensors")


def quantize(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as int8 with a scale for each row: the largest error is half of a 127th of the row's largest value."""
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            stored[name] = tensor.float()
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127
        stored[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        stored[f"{name}{SCALE}"] = scale
    return stored


def dequantize(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 tensors of `quantize`."""
    state = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    for name, tensor in state.items():
        if (scale := stored.get(f"{name}{SCALE}")) is not None:
            state[name] = (tensor.flatten(1).float() * scale[:, None]).view(tensor.shape)
    return state
