"""The seven published configurations, and reading released checkpoints: their json to a `SparseFormerConfig`, their state dict strictly.

Modules have the released parameter names, so loading compares names and shapes and translates nothing.
Sources: SparseFormer (arXiv 2304.03768, table 1) and Bootstrapping SparseFormers (arXiv 2312.01987, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_vlm.tower.config import CLIP_MEAN, CLIP_STD, HALF, IMAGENET_MEAN, IMAGENET_STD, SparseFormerConfig, UnitConfig

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
        # QuickGELU is that of the teacher's blocks, which are those of ATTN and MLP alone
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
    """Load a state dict into a module that must have exactly these tensors.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, by name; the module is not changed.
    """
    check_names(module, {name: tuple(tensor.shape) for name, tensor in state_dict.items()}, source)
    module.load_state_dict(dict(state_dict))


def check_names(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that names and shapes of tensors are exactly those of a module.

    Raises:
        ValueError: missing, unexpected or misshapen tensors, by name.
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


def _v1(tokens: int, focus: int, width: int, blocks: int) -> SparseFormerConfig:
    ops = ("ATTN", "ROI_ADJ", "SAMPLING_M", "MLP")
    cortex = [UnitConfig(width, ops), *[UnitConfig(width, ("ATTN", "MLP"))] * blocks]
    return SparseFormerConfig(
        units=(UnitConfig(focus, ops, repeats=4), *cortex),
        num_latent_tokens=tokens,
        embed_dim=1000,
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        conv_dim=96,
        num_points=36,
        head="avg",
        head_bias=True,
        token_init="each",
        rois_init="released",
        num_heads=64,
        generator_dim=0.25,
        mixing_bias=True,
        transition_norm=True,
        stage_embedding=False,
        adjust_hidden=False,
        padding="zeros",
        ln_eps=1e-6,
    )


def _bootstrapped(tokens: int, focus: int, width: int, blocks: int, embed_dim: int, clip: bool) -> SparseFormerConfig:
    cortex = [UnitConfig(width, ("ATTN", "MLP"), activation="quick_gelu" if clip else "gelu")] * blocks
    return SparseFormerConfig(
        units=(
            UnitConfig(focus, ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ"), repeats=4),
            UnitConfig(width, ("SAMPLING_M", "PE_INJECT")),
            *cortex,
        ),
        num_latent_tokens=tokens - 1,
        embed_dim=embed_dim,
        image_mean=CLIP_MEAN if clip else HALF,
        image_std=CLIP_STD if clip else HALF,
        cls_before_unit=2,
        head_bias=not clip,
        rois_init="released",
    )


PUBLISHED: dict[str, SparseFormerConfig] = {
    "sparseformer_v1_tiny": _v1(49, 256, 512, 7),
    "sparseformer_v1_small": _v1(64, 320, 640, 7),
    "sparseformer_v1_base": _v1(81, 384, 768, 9),
    "sparseformer_btsp_augreg_base": _bootstrapped(49, 384, 768, 8, 1000, clip=False),
    "sparseformer_btsp_augreg_large": _bootstrapped(49, 512, 1024, 16, 1000, clip=False),
    "sparseformer_btsp_openai_clip_base": _bootstrapped(49, 384, 768, 8, 512, clip=True),
    "sparseformer_btsp_openai_clip_large": _bootstrapped(64, 512, 1024, 16, 768, clip=True),
}
