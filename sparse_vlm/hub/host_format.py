"""Folders in transformers' format that hold a tower: a tower by itself, or a LLaVA with the tower inside.

Such folders are written by `sparse-vlm export --format transformers`, and by any trainer that saves the exported model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "sparseformer"
CODE = "modeling_sparse_vlm"  # module in exported folders that `auto_map` names; it imports sparse_vlm, and only transformers runs it
# Possible prefixes of a part's tensor names: as a state dict has them, as transformers writes LLaVA, a tower by itself, our own format.
TOWER_PREFIXES = ("model.vision_tower.tower.", "vision_tower.tower.", "tower.", "")
PROJECTOR_PREFIXES = ("model.multi_modal_projector.", "multi_modal_projector.")


def tower_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The tower's configuration inside a transformers configuration (of a tower or of a LLaVA with one); None if there is none."""
    if is_llava(config):
        config = config["vision_config"]
    tower = config.get("tower") if config.get("model_type") == MODEL_TYPE else None
    return tower if isinstance(tower, Mapping) else None


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a transformers configuration is that of a LLaVA with a tower inside."""
    vision = config.get("vision_config")
    return config.get("model_type") == "llava" and isinstance(vision, Mapping) and vision.get("model_type") == MODEL_TYPE
