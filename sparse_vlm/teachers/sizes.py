"""Check that an open_clip configuration matches the size of the weights beside it, before memory of its size is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparse_vlm.errors import UserError, first_line
from sparse_vlm.hub.pretrained import LAYERS, without_prompts
from sparse_vlm.tower.limits import whole, within
from sparse_vlm.utils.documents import parse_json

WEIGHTS = (".safetensors", ".bin", ".pth")  # of open_clip's weights
STAGES = 8  # longest list: a ResNet has four stages, an image two sides

# Several times the values of any published model. Limits matter even on the meta device: an attention mask has the context length squared,
# and positions may be computed with numpy.
_MOST = {
    "embed_dim": 2**15,
    "width": 2**15,
    "layers": LAYERS,
    "heads": 2**10,
    "head_width": 2**12,
    "dim_head": 2**12,
    "patch_size": 2**10,
    "image_size": 2**13,
    "context_length": 2**12,
    "vocab_size": 2**23,
    "n_queries": 2**12,
    "attn_pooler_queries": 2**12,
    "attn_pooler_heads": 2**10,
}
_RATIO = 64.0  # largest mlp_ratio


def check_size(folder: Path) -> None:
    """Check that an open_clip configuration matches the size of the weights beside it.

    Raises:
        UserError: no weights; a number beyond any model's (named); a model that open_clip cannot create, or one with more parameters than
            the weights have bytes.
    """
    config = folder / "open_clip_config.json"
    described = parse_json(config.read_bytes(), str(config))
    model = described.get("model_cfg") if isinstance(described, dict) else None
    if not isinstance(model, dict):
        raise UserError(f"{config}: holds no object model_cfg; fetch the model again")
    held = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS and path.is_file())
    if not held:
        raise UserError(f"{folder}: holds no weights ({', '.join(f'*{suffix}' for suffix in WEIGHTS)}); fetch the model again")
    try:
        _check_numbers("model_cfg", model)
        for name, side in model.items():
            if isinstance(side, dict):
                _check_numbers(f"model_cfg.{name}", side)
    except ValueError as error:
        raise UserError(f"{config}: {error}; fetch the model again") from None
    _compare(config, "positions of the image", _positions(model.get("vision_cfg")), held)
    try:
        with without_prompts(), torch.device("meta"):
            ghost = _ghost(folder, model)
    except Exception as error:
        raise UserError(f"{config}: open_clip cannot create this model ({first_line(error)}); fetch the model again") from error
    _compare(config, "parameters", sum(parameter.numel() for parameter in ghost.parameters()), held)


def _ghost(folder: Path, model: dict[str, Any]) -> torch.nn.Module:
    """The model on the meta device. A text tower of transformers cannot be made there; a small one takes its place."""
    import open_clip

    text = model.get("text_cfg")
    if not isinstance(text, dict) or not text.get("hf_model_name"):
        return open_clip.create_model(f"local-dir:{folder}", load_weights=False, device="meta")
    small = {"context_length": 2, "vocab_size": 2, "width": 2, "heads": 1, "layers": 1}
    return open_clip.CustomTextCLIP(model["embed_dim"], model["vision_cfg"], small, quick_gelu=bool(model.get("quick_gelu")))


def _check_numbers(where: str, described: dict[str, Any]) -> None:
    """Check numbers against `_MOST`.

    Raises:
        ValueError: names the number.
    """
    for name, most in _MOST.items():
        found = described.get(name)
        each = found[:STAGES] if isinstance(found, list) and 0 < len(found) <= STAGES else [found]
        for number in each if found is not None else ():
            whole(f"{where}.{name}", number, 1, most)
    if described.get("mlp_ratio") is not None:
        within(f"{where}.mlp_ratio", described["mlp_ratio"], 0.0, _RATIO)


def _positions(vision: Any) -> int:
    """Size of the position embeddings of open_clip's own ViT; 0 for other models."""
    if not isinstance(vision, dict) or not isinstance(vision.get("layers", 12), int) or vision.get("timm_model_name"):
        return 0
    image, patch, width = vision.get("image_size", 224), vision.get("patch_size", 16), vision.get("width", 768)
    high, wide = image[:2] if isinstance(image, list) and len(image) > 1 else (image, image)
    numbers = (high, wide, patch, width)
    return (high // patch) * (wide // patch) * width if all(isinstance(number, int) for number in numbers) else 0


def _compare(config: Path, what: str, count: int, size: int) -> None:
    """Each number takes at least one byte."""
    if count > size:
        raise UserError(f"{config}: says {count:,} {what}, the weights beside it are {size:,} bytes; they are of two models")
