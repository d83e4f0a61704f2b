"""The loss of bootstrapping: whitening of the embedding's term."""

from __future__ import annotations

import pytest
import torch

from sparse_vlm import SparseFormerConfig
from sparse_vlm.distill.loss import Distillation, Statistics
from sparse_vlm.tower import SparseFormerOutput, UnitConfig


def test_whitening_makes_all_directions_count_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    loud, faint = 3.0, 0.2  # of two halves of the directions
    sizes = torch.tensor([loud] * 16 + [faint] * 16)
    turned, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    embeds = torch.randn(4000, 32, generator=generator) * sizes @ turned + 5.0
    known = Statistics.of(embeds, torch.zeros(64), torch.tensor(1.0))
    variances = ((embeds - known.embed_mean) @ known.whitening).var(0)
    floor = 0.05 * (loud**2 + faint**2) / 2  # what fainter directions count as having
    assert variances.sort().values == pytest.approx([faint**2 / floor] * 16 + [1.0] * 16, rel=0.25)

    # a student that says nothing of the faint half
    wanted = embeds[:64]
    said = ((wanted - 5.0) @ turned.T * (sizes == loud)) @ turned + 5.0

    class Said(torch.nn.Module):
        config = SparseFormerConfig(
            units=(UnitConfig(64, ("ATTN", "MLP")),), num_latent_tokens=49, embed_dim=32,
            image_mean=(0.5,) * 3, image_std=(0.25,) * 3, cls_before_unit=0,
        )  # fmt: skip

        def forward(self, pixels: torch.Tensor, num_tokens: int | None, image_sizes: None) -> SparseFormerOutput:
            return SparseFormerOutput(torch.ones(64, 50, 64), said, torch.zeros(64, 49, 4))

    pixels, tokens = torch.zeros(64, 3, 56, 56, dtype=torch.uint8), torch.ones(64, 49, 64)
    with torch.autocast("cpu", torch.bfloat16):
        plain, half, whole = (
            Distillation(Said(), known, dense_weight=0.0, whitened=share)(pixels, wanted, tokens) for share in (0.0, 0.5, 1.0)
        )
    assert plain["loss"] < 0.005 and whole["loss"] > 0.05
    assert half["loss"].item() == pytest.approx((plain["loss"].item() + whole["loss"].item()) / 2)
    assert plain["cosine"] == half["cosine"] == whole["cosine"], "what is reported is the plain one"
