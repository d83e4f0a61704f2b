"""Analytic cost of a tower for one image: multiply-accumulates (MACs) and memory traffic, by part.

Shape legend: N tokens, n latent tokens, P sampling points, O points after mixing, C channels, d width, g generator, G x G patch grid.

MACs are counted as in the papers: convolutions, linear layers, attention products and mixing; norms, activations and sampling are left out.
Memory traffic is the least possible: each weight once a use, whatever the batch, and the inputs and outputs of these operations. Attention
reads queries, keys and values and writes its output, not the scores; sampling reads four neighbours of each point. Norms, activations and
additions are left out as well, because they can be fused with the operation before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparse_vlm.tower.config import FOCUS_MAP, FOCUS_SCALES, FocusConfig, SparseFormerConfig, UnitConfig


@dataclass(frozen=True)
class Macs:
    """MACs of one image, by part."""

    map: int
    focus: int
    glance: int
    looking: int
    blocks: int
    head: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.map + self.focus + self.glance + self.looking + self.blocks + self.head


@dataclass(frozen=True)
class Work:
    """Cost of one or more operations.

    Attributes:
        macs: multiply-accumulates for one image.
        weights: numbers read once, however many images are in the batch.
        activations: numbers read and written for one image.
    """

    macs: int = 0
    weights: int = 0
    activations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.macs + other.macs, self.weights + other.weights, self.activations + other.activations)

    def __mul__(self, times: int) -> Work:
        return Work(self.macs * times, self.weights * times, self.activations * times)

    def bytes(self, batch: int, itemsize: int) -> int:
        """Bytes moved for a batch of images.

        Args:
            itemsize: bytes of a number: 4 of float32, 2 of bfloat16.
        """
        return itemsize * (self.weights + batch * self.activations)


def linear(rows: int, inner: int, outer: int) -> Work:
    """A linear layer, or a convolution as one, from `inner` to `outer` features on `rows` rows."""
    return Work(rows * inner * outer, inner * outer, rows * (inner + outer))


def product(rows: int, inner: int, outer: int) -> Work:
    """A matrix product of two activations."""
    return Work(rows * inner * outer, 0, rows * inner + inner * outer + rows * outer)


def attention(queries: int, keys: int, width: int, key_width: int | None = None, pairs: int | None = None) -> Work:
    """Both products of attention.

    Args:
        width: of queries and output, over all heads.
        key_width: of keys and of values; that of queries unless heads share them.
        pairs: of a query and a key that it attends to, as for causal attention; all by default.
    """
    pairs = queries * keys if pairs is None else pairs
    return Work(2 * pairs * width, 0, 2 * queries * width + 2 * keys * (key_width or width))


# the part of `Macs` of each operation; all others are part of `looking`
GROUPS = {
    "early convolution": "map", "focus": "focus", "glance": "glance", "transition": "blocks", "attention": "blocks", "MLP": "blocks",
    "head": "head",
}  # fmt: skip


def count_operations(config: SparseFormerConfig, height: int | None = None, width: int | None = None) -> dict[str, Work]:
    """Cost by operation for an image of the given size in pixels; `image_size` by default."""
    height, width = height or config.image_size, width or config.image_size
    n, first = config.num_latent_tokens, config.units[0].width
    work: dict[str, Work] = {}

    def add(operation: str, cost: Work) -> None:
        work[operation] = work.get(operation, Work()) + cost

    if any("SAMPLING_M" in unit.ops for unit in config.units):
        add("early convolution", linear(-(-height // 2) * -(-width // 2), 49 * 3, config.conv_dim))
    if config.focus is not None:
        add("focus", _focusing(config.focus))
    if config.glance is not None:
        positions = config.glance.grid**2
        patches = n if config.glance.kind == "crop" else positions
        add("glance", linear(patches, 3 * config.glance.patch_size**2, first) + product(n, positions, first))
    tokens, previous = n, first
    for index, unit in enumerate(config.units):
        if unit.width != previous:
            add("transition", linear(tokens, previous, unit.width))
            previous = unit.width
        if index == config.cls_before_unit:
            tokens += 1
        for operation, cost in _unit(config, unit, tokens):
            add(operation, cost * unit.repeats)
    add("head", linear(1, config.width, config.embed_dim))
    if config.head == "map":
        d = config.width
        add("head", linear(1, d, d) + linear(tokens, d, 2 * d) + attention(1, tokens, d) + linear(1, d, d) + _mlp(1, d))
    return work


def count_work(config: SparseFormerConfig, height: int | None = None, width: int | None = None) -> dict[str, Work]:
    """`count_operations`, summed by the parts of `Macs`."""
    work = dict.fromkeys(("map", "focus", "glance", "looking", "blocks", "head"), Work())
    for operation, cost in count_operations(config, height, width).items():
        work[GROUPS.get(operation, "looking")] += cost
    return work


def _unit(config: SparseFormerConfig, unit: UnitConfig, tokens: int) -> Iterator[tuple[str, Work]]:
    """(operation, cost of one repeat) of a unit."""
    n, d, points, out_points, channels = config.num_latent_tokens, unit.width, config.num_points, config.mixing_out_points, config.conv_dim
    g = config.generator_width(d)
    for op in unit.ops:
        if op == "ATTN":
            yield "attention", _attending(tokens, d)
        elif op == "MLP":
            yield "MLP", _mlp(tokens, d)
        elif op == "PE_INJECT":
            yield "position injection", linear(n, d, d)
        elif op == "ROI_ADJ":
            yield "RoI adjusting", (linear(n, d, d) if config.adjust_hidden else Work()) + linear(n, d, 4)
        else:
            yield "points", linear(n, d, points * 2)
            yield "sampling", Work(activations=n * points * channels * (4 + 1))
            yield "parameter generation", linear(n, d, g) + linear(n, g, channels**2 + points * out_points)
            yield "mixing", (product(points, channels, channels) + product(out_points, points, channels)) * n
            yield "output projection", linear(n, out_points * channels, d)


def count_macs(config: SparseFormerConfig, height: int | None = None, width: int | None = None) -> Macs:
    """MACs of a tower for an image of the given size in pixels; `image_size` by default."""
    return Macs(**{part: work.macs for part, work in count_work(config, height, width).items()})


def _attending(tokens: int, width: int) -> Work:
    return linear(tokens, width, 3 * width) + attention(tokens, tokens, width) + linear(tokens, width, width)


def _focusing(config: FocusConfig) -> Work:
    first, second, third, width = config.channels
    work, side = Work(), config.size
    for inner, outer in ((3, first), (first, second), (second, third)):
        side = -(-side // 2)
        work += linear(side**2, 9 * inner, outer)
    for inner in (third, width, width):
        work += linear(FOCUS_MAP**2, 9 * inner, width)
    return work + linear(1, width, width) + linear(FOCUS_MAP**2, width, len(FOCUS_SCALES))


def _mlp(tokens: int, width: int) -> Work:
    return linear(tokens, width, 4 * width) + linear(tokens, 4 * width, width)


def block_macs(tokens: int, width: int) -> int:
    """MACs of a transformer block with an MLP four times as wide."""
    return (_attending(tokens, width) + _mlp(tokens, width)).macs


def vit_work(spec: Any) -> Work:
    """Cost of a plain ViT for one image of its own size, up to its last block.

    Args:
        spec: anything with `width`, `num_blocks`, `patch_size`, `grid`, `embed_dim` and `has_cls`, such as a `TeacherSpec`.
    """
    d, tokens = spec.width, spec.grid**2 + spec.has_cls
    return linear(spec.grid**2, 3 * spec.patch_size**2, d) + (_attending(tokens, d) + _mlp(tokens, d)) * spec.num_blocks


def vit_macs(spec: Any) -> int:
    """MACs of a plain ViT and its head for one image of its own size; as `vit_work`."""
    return vit_work(spec).macs + spec.width * spec.embed_dim
