"""Teachers of open_clip: its native `VisionTransformer`, as OpenAI's, LAION's and DataComp's CLIPs are."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparse_vlm.teachers.base import KINDS, Inventory, Teacher, TeacherError, teacher_spec

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
        TeacherError: its head does not read the normalised CLS token, or a part of it is not supported.
    """
    blocks = visual.transformer.resblocks
    first = blocks[0]
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise TeacherError(f"teacher {name}: only towers whose head reads the normalised CLS token can be inherited from")
    own = Inventory(name, visual.state_dict())
    for i in range(len(blocks)):
        for theirs, ours in BLOCK.items():
            for kind in KINDS:
                source = f"{theirs}{kind}" if theirs.endswith("_") else f"{theirs}.{kind}"
                own.put(f"blocks.{i}.{ours}.{kind}", f"transformer.resblocks.{i}.{source}")
        own.fold_layer_scale(i, f"transformer.resblocks.{i}.ls_1.gamma", f"transformer.resblocks.{i}.ls_2.gamma")
    own.put("patch_embed.weight", "conv1.weight")
    own.put("cls_token", "class_embedding")
    own.put("pos_embed", "positional_embedding")
    for kind in KINDS:
        if f"ln_pre.{kind}" in own:
            own.put(f"norm_pre.{kind}", f"ln_pre.{kind}")
        own.put(f"norm.{kind}", f"ln_post.{kind}")
    if "proj" in own:
        own.put("head.weight", "proj", how=lambda tensor: tensor.mT, note="transposed")

    spec = teacher_spec(
        own,
        type(first.mlp.gelu).__name__,
        ACTIVATIONS,
        preprocess,
        num_blocks=len(blocks),
        num_heads=first.attn.num_heads,
        patch_size=_side(visual.patch_size),
        image_size=_side(visual.image_size),
        ln_eps=first.ln_1.eps,
        licence=licence,
    )
    visual.output_tokens = True
    return Teacher(spec, visual, own, encode=lambda model, pixels: model(pixels))


def _side(size: int | tuple[int, int]) -> int:
    return size if isinstance(size, int) else size[0]
