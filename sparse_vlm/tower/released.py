"""Reading released checkpoints: their json to our configuration, and their state dict, strictly.

Our modules carry the released names, so loading is a comparison of names and shapes, not a translation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_vlm.tower.config import SparseFormerConfig, UnitConfig

_CONV_HEADS = {1: 64, 2: None}
_TOP = {
    "conv_dim", "num_latent_tokens", "num_sampling_points", "same_token_embedding", "cls_token_insert_layer", "width_configs",
    "repeats", "head_op", "ops_list", "compatible_config", "proj_dim", "proj_bias", "normalization_factor", "drop_path_rate",
}  # fmt: skip
_COMPATIBLE = {
    "pg_inner_dim", "grid_sample_config", "type_num_attn_heads", "type_op_adjust", "restrict_grad_norm", "transition_ln",
    "mixing_bias", "ln_eps", "use_stage_embedding", "clip_quick_gelu",
}  # fmt: skip


def config_from_released(data: Mapping[str, Any]) -> SparseFormerConfig:
    """The released json as a `SparseFormerConfig`; unknown fields and values raise ValueError."""
    compatible = data.get("compatible_config", {})
    unknown = (set(data) - _TOP) | (set(compatible) - _COMPATIBLE)
    missing = (_TOP - {"drop_path_rate", "cls_token_insert_layer"} - set(data)) | (_COMPATIBLE - set(compatible))
    if unknown or missing:
        raise ValueError(f"released configuration: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
    sampling = compatible["grid_sample_config"]
    if sampling["mode"] != "bilinear" or sampling["align_corners"]:
        raise ValueError(f"released configuration: grid_sample_config {sampling} is not bilinear with half-pixel centres")
    if not len(data["width_configs"]) == len(data["repeats"]) == len(data["ops_list"]):
        raise ValueError("released configuration: width_configs, repeats and ops_list differ in length")
    units = tuple(
        # QuickGELU belongs to the teacher's blocks, and only the cortex is made of those
        UnitConfig(
            width,
            tuple(ops),
            repeats,
            activation="quick_gelu" if compatible["clip_quick_gelu"] and tuple(ops) == ("ATTN", "MLP") else "gelu",
        )
        for width, repeats, ops in zip(data["width_configs"], data["repeats"], data["ops_list"], strict=True)
    )
    return SparseFormerConfig(
        units=units,
        num_latent_tokens=data["num_latent_tokens"],
        embed_dim=data["proj_dim"],
        image_mean=tuple(data["normalization_factor"][0]),
        image_std=tuple(data["normalization_factor"][1]),
        conv_dim=data["conv_dim"],
        num_points=data["num_sampling_points"],
        cls_before_unit=data.get("cls_token_insert_layer") if data["head_op"] == "cls" else None,
        head=data["head_op"],
        head_bias=data["proj_bias"],
        token_init="shared" if data["same_token_embedding"] else "each",
        rois_init="released",
        num_heads=_CONV_HEADS[compatible["type_num_attn_heads"]],
        generator_dim=compatible["pg_inner_dim"],
        mixing_bias=compatible["mixing_bias"],
        transition_norm=compatible["transition_ln"],
        stage_embedding=compatible["use_stage_embedding"],
        adjust_hidden=compatible["type_op_adjust"] == 2,
        padding=sampling["padding_mode"],
        clamp_coordinate_grad=compatible["restrict_grad_norm"],
        ln_eps=compatible["ln_eps"],
    )


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a module that has exactly these tensors.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor; the module is left as it was.
    """
    check_names(module, {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, source)
    module.load_state_dict(dict(state_dict))


def check_names(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Make sure that tensors of these names and shapes are exactly a module's.

    Raises:
        ValueError: naming every missing, unexpected and misshapen tensor.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"missing tensor {name}" for name in own if name not in shapes]
    problems += [f"unexpected tensor {name}" for name in shapes if name not in own]
    problems += [
        f"tensor {name} has shape {shapes[name]}, expected {own[name]}" for name in own if own[name] != shapes.get(name, own[name])
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise ValueError(f"{source}: {'; '.join(problems[:8])}{more}")
