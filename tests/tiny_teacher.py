"""A real open_clip ViT of toy size to learn from; where open_clip is not installed, nothing here can be asked for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_teacher(folder: Path, **vision: object) -> str:
    """An open_clip folder with a ViT of two blocks and random weights; its name."""
    import open_clip

    vision_cfg = {"image_size": 56, "layers": 2, "width": 64, "head_width": 64, "patch_size": 14, **vision}
    text_cfg = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": vision_cfg, "text_cfg": text_cfg},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
