"""A tower of toy size with random weights."""

from __future__ import annotations

import torch

from sparse_vlm.tower import RoIPatchConfig, SparseFormer, SparseFormerConfig, UnitConfig


def elastic(looks: bool = False, **changes: object) -> SparseFormer:
    """A warm-start tower for 4 to 25 tokens."""
    first = ("SAMPLING_M", "ATTN", "MLP", "ROI_ADJ") if looks else ("ATTN", "MLP")
    values = {
        "units": (UnitConfig(64, first), UnitConfig(64, ("ATTN", "MLP"))),
        "num_latent_tokens": 16, "embed_dim": 32, "image_size": 56, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "conv_dim": 16,
        "cls_before_unit": 0, "token_init": "glance", "glance": RoIPatchConfig(14, 4, 1, norm_pre=True, kind="crop"), "budgets": (4, 25),
    }  # fmt: skip
    torch.manual_seed(0)
    tower = SparseFormer(SparseFormerConfig(**{**values, **changes})).eval()
    torch.nn.init.normal_(tower.glance.pos_embed)
    return tower
