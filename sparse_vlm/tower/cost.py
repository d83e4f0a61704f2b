"""What a tower costs, counted: multiply-accumulates by part, for one picture.

Shape legend: N tokens, n latent tokens, P sampling points, O points after mixing, C channels, d width, g generator, G x G patch grid.
Counted as in the papers: convolutions, linear layers, attention products and mixing; norms, activations and sampling are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_vlm.tower.config import SparseFormerConfig


@dataclass(frozen=True)
class Macs:
    """MACs of one picture, by part."""

    map: int
    glance: int
    looking: int
    blocks: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.map + self.glance + self.looking + self.blocks + self.head


def count_macs(config: SparseFormerConfig, height: int | None = None, width: int | None = None) -> Macs:
    """MACs of a tower for a picture of the given size in pixels (the configuration's `image_size` by default)."""
    height, width = height or config.image_size, width or config.image_size
    n, points, out_points, channels = config.num_latent_tokens, config.num_points, config.mixing_out_points, config.conv_dim
    looks = any("SAMPLING_M" in unit.ops for unit in config.units)
    feature_map = 49 * 3 * channels * -(-height // 2) * -(-width // 2) if looks else 0
    first = config.units[0].width
    glance = 0
    if config.glance is not None:
        positions = config.glance.grid**2
        patches = n if config.glance.kind == "crop" else positions
        glance = patches * 3 * config.glance.patch_size**2 * first + n * positions * first
    looking = blocks = 0
    tokens, previous = n, first
    for index, unit in enumerate(config.units):
        d = unit.width
        if d != previous:
            blocks += tokens * previous * d
            previous = d
        if index == config.cls_before_unit:
            tokens += 1
        generated = channels**2 + points * out_points
        g = config.generator_width(d)
        per_op = {
            "SAMPLING_M": n
            * (d * points * 2 + d * g + g * generated + points * channels**2 + out_points * points * channels + out_points * channels * d),
            "PE_INJECT": n * d * d,
            "ROI_ADJ": n * ((d * d if config.adjust_hidden else 0) + 4 * d),
            "ATTN": tokens * 4 * d * d + 2 * tokens * tokens * d,
            "MLP": tokens * 8 * d * d,
        }
        for op in unit.ops:
            if op in ("ATTN", "MLP"):
                blocks += unit.repeats * per_op[op]
            else:
                looking += unit.repeats * per_op[op]
    head = config.width * config.embed_dim
    if config.head == "map":
        head += tokens * (2 * config.width**2 + 2 * config.width) + 10 * config.width**2
    return Macs(feature_map, glance, looking, blocks, head)


def block_macs(tokens: int, width: int) -> int:
    """MACs of a transformer block with an MLP four times as wide."""
    return tokens * 12 * width**2 + 2 * tokens**2 * width


def vit_macs(spec: Any) -> int:
    """MACs of a plain ViT for one picture of its own size.

    Args:
        spec: anything with `width`, `num_blocks`, `patch_size`, `grid`, `embed_dim` and `has_cls`, such as a `TeacherSpec`.
    """
    d, patches = spec.width, spec.grid**2
    blocks = spec.num_blocks * block_macs(patches + spec.has_cls, d)
    return patches * 3 * spec.patch_size**2 * d + blocks + d * spec.embed_dim
