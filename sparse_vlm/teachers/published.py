"""Dimensions of published ViTs, to count or time them without weights."""

from __future__ import annotations

from sparse_vlm.teachers.base import TeacherSpec
from sparse_vlm.tower.config import CLIP_MEAN, CLIP_STD


def clip_vit(name: str, width: int, blocks: int, patch_size: int, embed_dim: int, image_size: int = 224) -> TeacherSpec:
    """A ViT of OpenAI's CLIP (arXiv 2103.00020, table 20)."""
    return TeacherSpec(
        name=name,
        width=width,
        num_blocks=blocks,
        num_heads=width // 64,
        embed_dim=embed_dim,
        patch_size=patch_size,
        image_size=image_size,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        activation="quick_gelu",
        ln_eps=1e-5,
        head="cls",
        norm_pre=True,
    )
