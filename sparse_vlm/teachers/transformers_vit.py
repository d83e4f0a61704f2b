"""Teachers of transformers: the image sides of `CLIPModel` and `SiglipModel`, and `Dinov2Model`.

Shape legend: B batch, N tokens, d width, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.teachers.base import KINDS, Inventory, Teacher, TeacherError, TeacherSpec, teacher_spec

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
DINOV2_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("attention.query", "attention.key", "attention.value", "output.dense"),
)


class ImageSide(nn.Module):
    """A model's `vision_model` and `visual_projection`, without its text side."""

    def __init__(self, vision_model: nn.Module, visual_projection: nn.Module | None = None) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = vision_model, visual_projection


def read_clip(name: str, model: nn.Module, preprocess: dict[str, Any], licence: str = "") -> Teacher:
    """`CLIPModel`, or `CLIPVisionModelWithProjection`.

    Raises:
        TeacherError: a part of it is not supported.
    """
    side = ImageSide(model.vision_model, model.visual_projection)
    own = Inventory(name, side.state_dict())
    config = side.vision_model.config
    _put_blocks(own, "vision_model.encoder.layers", config.num_hidden_layers)
    own.put("patch_embed.weight", "vision_model.embeddings.patch_embedding.weight")
    own.put("cls_token", "vision_model.embeddings.class_embedding")
    own.put("pos_embed", "vision_model.embeddings.position_embedding.weight")
    for kind in KINDS:
        own.put(f"norm_pre.{kind}", f"vision_model.pre_layrnorm.{kind}")
        own.put(f"norm.{kind}", f"vision_model.post_layernorm.{kind}")
    own.put("head.weight", "visual_projection.weight")

    def encode(side: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = side.vision_model(pixels)
        return side.visual_projection(out.pooler_output), side.vision_model.post_layernorm(out.last_hidden_state[:, 1:])

    return Teacher(_spec(own, config, preprocess, licence), side, own, encode)


def read_siglip(name: str, model: nn.Module, preprocess: dict[str, Any], licence: str = "") -> Teacher:
    """`SiglipModel`, or `SiglipVisionModel`.

    Raises:
        TeacherError: a part of it is not supported.
    """
    side = ImageSide(model.vision_model if hasattr(model, "vision_model") else model)
    own = Inventory(name, side.state_dict())
    config = side.vision_model.config
    _put_blocks(own, "vision_model.encoder.layers", config.num_hidden_layers)
    own.put("patch_embed.weight", "vision_model.embeddings.patch_embedding.weight")
    own.put("pos_embed", "vision_model.embeddings.position_embedding.weight")
    own.fold_patch_bias("vision_model.embeddings.patch_embedding.bias", 0)
    head = "vision_model.head."
    own.put("pool.probe", f"{head}probe", how=torch.flatten)
    for kind in KINDS:
        own.put(f"norm.{kind}", f"vision_model.post_layernorm.{kind}")
        own.put(f"pool.attn.qkv.{kind}", f"{head}attention.in_proj_{kind}")
        own.put(f"pool.attn.proj.{kind}", f"{head}attention.out_proj.{kind}")
        own.put(f"pool.norm.{kind}", f"{head}layernorm.{kind}")
        for part in ("fc1", "fc2"):
            own.put(f"pool.mlp.{part}.{kind}", f"{head}mlp.{part}.{kind}")

    def encode(side: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = side.vision_model(pixels)
        return out.pooler_output, out.last_hidden_state

    return Teacher(_spec(own, config, preprocess, licence), side, own, encode)


def read_dinov2(name: str, model: nn.Module, preprocess: dict[str, Any], licence: str = "") -> Teacher:
    """`Dinov2Model`.

    Raises:
        TeacherError: a part of it is not supported, such as the giant's SwiGLU.
    """
    config = model.config
    if config.use_swiglu_ffn:
        raise TeacherError(f"teacher {name}: its blocks use SwiGLU, which a SparseFormer lacks; take a smaller DINOv2")
    own = Inventory(name, model.state_dict())
    # transformers 5 has had two sets of names for attention's linear layers
    names = next(names for names in DINOV2_ATTENTION if f"encoder.layer.0.attention.{names[0]}.weight" in own)
    for i in range(config.num_hidden_layers):
        theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
        for kind in KINDS:
            *parts, out = (f"{theirs}.attention.{part}.{kind}" for part in names)
            own.put(f"{ours}.attn.qkv.{kind}", *parts, note="q, k and v joined")
            own.put(f"{ours}.attn.proj.{kind}", out)
            for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                own.put(f"{ours}.{part}.{kind}", f"{theirs}.{part}.{kind}")
        own.fold_layer_scale(i, f"{theirs}.layer_scale1.lambda1", f"{theirs}.layer_scale2.lambda1")
    own.put("patch_embed.weight", "embeddings.patch_embeddings.projection.weight")
    own.put("cls_token", "embeddings.cls_token", how=torch.flatten)
    own.put("pos_embed", "embeddings.position_embeddings", how=lambda tensor: tensor[0])
    own.fold_patch_bias("embeddings.patch_embeddings.projection.bias", 1)
    for kind in KINDS:
        own.put(f"norm.{kind}", f"layernorm.{kind}")
    own.leave_out("embeddings.mask_token", "stands for hidden patches in pretraining only")

    def encode(vit: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
        out = vit(pixels)
        return out.pooler_output, out.last_hidden_state[:, 1:]

    return Teacher(_spec(own, config, preprocess, licence), model, own, encode)


def _put_blocks(own: Inventory, prefix: str, count: int) -> None:
    """The blocks of CLIP and SigLIP."""
    renames = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    for i in range(count):
        theirs = f"{prefix}.{i}"
        for kind in KINDS:
            parts = [f"{theirs}.self_attn.{part}_proj.{kind}" for part in ("q", "k", "v")]
            own.put(f"blocks.{i}.attn.qkv.{kind}", *parts, note="q, k and v joined")
            for source, target in renames.items():
                own.put(f"blocks.{i}.{target}.{kind}", f"{theirs}.{source}.{kind}")


def _spec(own: Inventory, config: Any, preprocess: dict[str, Any], licence: str) -> TeacherSpec:
    return teacher_spec(
        own,
        config.hidden_act,
        ACTIVATIONS,
        preprocess,
        num_blocks=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        patch_size=config.patch_size,
        image_size=config.image_size,
        ln_eps=config.layer_norm_eps,
        licence=licence,
    )
