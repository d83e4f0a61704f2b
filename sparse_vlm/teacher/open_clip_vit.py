"""Teachers of open_clip: its native `VisionTransformer`, as OpenAI's, LAION's and DataComp's CLIPs are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.teacher.base import Inventory, Teacher, TeacherError, TeacherSpec

ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def read(name: str, visual: nn.Module, preprocess: dict[str, Any], licence: str = "") -> Teacher:
    """A `VisionTransformer` of open_clip.

    Raises:
        TeacherError: its head reads something else than the normalised CLS token, or a part of it is of no kind that we know.
    """
    blocks = visual.transformer.resblocks
    first = blocks[0]
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise TeacherError(f"teacher {name}: only towers whose head reads the normalised CLS token can be inherited from")
    activation = type(first.mlp.gelu).__name__
    if activation not in ACTIVATIONS:
        raise TeacherError(f"teacher {name}: activation {activation} is not supported; known are {', '.join(ACTIVATIONS)}")

    own = Inventory(name, visual.state_dict())
    for i in range(len(blocks)):
        for theirs, ours in BLOCK.items():
            for kind in ("weight", "bias"):
                source = f"{theirs}{kind}" if theirs.endswith("_") else f"{theirs}.{kind}"
                own.put(f"blocks.{i}.{ours}.{kind}", f"transformer.resblocks.{i}.{source}")
        fold_layer_scale(own, i, f"transformer.resblocks.{i}.ls_1.gamma", f"transformer.resblocks.{i}.ls_2.gamma")
    own.put("patch_embed.weight", "conv1.weight")
    own.put("cls_token", "class_embedding")
    own.put("pos_embed", "positional_embedding")
    for kind in ("weight", "bias"):
        if f"ln_pre.{kind}" in own:
            own.put(f"norm_pre.{kind}", f"ln_pre.{kind}")
        own.put(f"norm.{kind}", f"ln_post.{kind}")
    if "proj" in own:
        own.put("head.weight", "proj", how=lambda tensor: tensor.mT, note="transposed")

    width = own.tensors["cls_token"].shape[-1]
    spec = TeacherSpec(
        name=name,
        width=width,
        num_blocks=len(blocks),
        num_heads=first.attn.num_heads,
        embed_dim=own.tensors["head.weight"].shape[0] if "head.weight" in own.tensors else width,
        patch_size=_side(visual.patch_size),
        image_size=_side(visual.image_size),
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
        activation=ACTIVATIONS[activation],
        norm_pre="norm_pre.weight" in own.tensors,
        ln_eps=first.ln_1.eps,
        licence=licence,
    )
    visual.output_tokens = True
    return Teacher(spec, visual, own, ask=lambda model, pixels: model(pixels))


def fold_layer_scale(own: Inventory, block: int, after_attention: str, after_mlp: str) -> None:
    """Fold LayerScale, where a block has it, into the linear layers that it scales: gamma * (W x + b) = (gamma W) x + gamma b."""
    for source, linear in ((after_attention, "attn.proj"), (after_mlp, "mlp.fc2")):
        if source in own:
            note = f"times {source.rsplit('.', 2)[-2]}"
            own.fold(f"blocks.{block}.{linear}.weight", source, _scale_rows, note)
            own.fold(f"blocks.{block}.{linear}.bias", source, torch.mul, note)


def _scale_rows(weight: Tensor, gamma: Tensor) -> Tensor:
    return weight * gamma.unsqueeze(-1)


def _side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]
