"""Teachers of timm: its `VisionTransformer` (AugReg, SigLIP, DINOv2), alone or as the trunk of an open_clip model.

Shape legend: B batch, N tokens, G x G patch grid, d width, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.teachers.base import KINDS, Inventory, Teacher, TeacherError, teacher_spec

ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}


def read(name: str, model: nn.Module, preprocess: dict[str, Any], licence: str = "") -> Teacher:
    """A `VisionTransformer` of timm with its own head.

    Raises:
        TeacherError: a part of it is not supported.
    """

    def encode(vit: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = vit.forward_features(pixels)
        return vit.forward_head(tokens), tokens[:, vit.num_prefix_tokens :]

    return _read(name, model, model, "", [f"head.{kind}" for kind in KINDS], preprocess, licence, encode)


def read_trunk(name: str, visual: nn.Module, preprocess: dict[str, Any], licence: str = "") -> Teacher:
    """An open_clip `TimmModel`: a trunk of timm, with a linear projection or none.

    Raises:
        TeacherError: the trunk is not a plain ViT, or a part of it is not supported.
    """
    trunk = visual.trunk
    if type(trunk).__name__ != "VisionTransformer":
        raise TeacherError(f"teacher {name}: its trunk is a {type(trunk).__name__}; only timm's VisionTransformer can be inherited from")
    unknown = [key for key, _ in visual.head.named_children() if key not in ("drop", "proj")]
    if unknown:
        raise TeacherError(f"teacher {name}: its head holds {', '.join(unknown)}; only a linear projection can be inherited")
    projection = [f"head.proj.{kind}" for kind in KINDS]
    head = projection if hasattr(visual.head, "proj") else [f"trunk.head.{kind}" for kind in KINDS]

    def encode(both: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = both.trunk.forward_features(pixels)
        return both.head(both.trunk.forward_head(tokens)), tokens[:, both.trunk.num_prefix_tokens :]

    return _read(name, visual, trunk, "trunk.", head, preprocess, licence, encode)


def _read(
    name: str, model: nn.Module, vit: nn.Module, prefix: str, head: Any, preprocess: dict[str, Any], licence: str, encode: Any
) -> Teacher:
    first = vit.blocks[0]
    if problem := _problem(vit):
        raise TeacherError(f"teacher {name}: {problem}")
    has_cls = vit.cls_token is not None
    own = Inventory(name, model.state_dict())
    for i in range(len(vit.blocks)):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            for kind in KINDS:
                own.put(f"blocks.{i}.{part}.{kind}", f"{prefix}blocks.{i}.{part}.{kind}")
        own.fold_layer_scale(i, f"{prefix}blocks.{i}.ls1.gamma", f"{prefix}blocks.{i}.ls2.gamma")
    own.put("patch_embed.weight", f"{prefix}patch_embed.proj.weight")
    if has_cls:
        own.put("cls_token", f"{prefix}cls_token", how=torch.flatten)
    unplaced = has_cls and vit.no_embed_class  # a CLS token without a position of its own
    own.put(
        "pos_embed",
        f"{prefix}pos_embed",
        how=lambda tensor: F.pad(tensor[0], (0, 0, int(unplaced), 0)),
        note="with none for the CLS token" if unplaced else "",
    )
    own.fold_patch_bias(f"{prefix}patch_embed.proj.bias", int(has_cls))
    for kind in KINDS:
        if f"{prefix}norm_pre.{kind}" in own:
            own.put(f"norm_pre.{kind}", f"{prefix}norm_pre.{kind}")
        own.put(f"norm.{kind}", f"{prefix}norm.{kind}")
    if vit.attn_pool is not None:
        pool = f"{prefix}attn_pool."
        own.put("pool.probe", f"{pool}latent", how=torch.flatten)
        for kind in KINDS:
            own.put(f"pool.attn.qkv.{kind}", f"{pool}q.{kind}", f"{pool}kv.{kind}", note="q, k and v joined")
            for part, theirs in (("attn.proj", "proj"), ("norm", "norm"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
                own.put(f"pool.{part}.{kind}", f"{pool}{theirs}.{kind}")
    for source in head:
        if source in own:
            own.put(f"head.{source.rsplit('.', 1)[1]}", source)
    spec = teacher_spec(
        own,
        type(first.mlp.act).__name__,
        ACTIVATIONS,
        preprocess,
        num_blocks=len(vit.blocks),
        num_heads=first.attn.num_heads,
        patch_size=vit.patch_embed.patch_size[0],
        image_size=vit.patch_embed.img_size[0],
        ln_eps=first.norm1.eps,
        licence=licence,
    )
    return Teacher(spec, model, own, encode)


def _problem(vit: nn.Module) -> str:
    """Why a ViT cannot be inherited from; empty if it can."""
    attention = vit.blocks[0].attn
    if attention.qkv is None or attention.qkv.bias is None or not isinstance(attention.q_norm, nn.Identity):
        return "its attention has no biases, or normalizes queries and keys, which a SparseFormer does not support"
    if getattr(vit, "reg_token", None) is not None:
        return "register tokens are not supported"
    if not isinstance(vit.fc_norm, nn.Identity) or (vit.cls_token is None) != (vit.attn_pool is not None):
        return "its head must read the normalised CLS token, or all tokens through attention where there is none"
    if vit.cls_token is not None and vit.global_pool != "token":
        return f"its head pools by {vit.global_pool!r}; only the CLS token can be inherited"
    return ""
