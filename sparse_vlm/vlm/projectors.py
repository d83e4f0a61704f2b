"""Projectors from a tower's tokens to an LLM's embeddings, with or without token reduction. A new kind is one entry in `PROJECTORS`.

Shape legend: B images, M = G x G tokens of the tower, N tokens for the LLM, d width of the tower, D width of the LLM.

Notable: `mlp` is LLaVA's own and the default. The others are baselines that reduce the tokens of a complete ViT. All end in the same MLP,
so that they differ in the reduction alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.errors import UserError

HEAD_SIZE = 64


class Projector(nn.Module):
    """A token reduction from M to N, then LLaVA's MLP (arXiv 2310.03744, section 3.3).

    Args:
        width, llm_width: d and D.
        tokens_in: M, a square number.
        tokens: N, a square number.

    Raises:
        UserError: M or N is not a square number, or N > M.
    """

    factor: ClassVar[int] = 1  # width of a reduced token, in multiples of d

    def __init__(self, width: int, llm_width: int, tokens_in: int, tokens: int) -> None:
        super().__init__()
        self.grid, self.side = math.isqrt(tokens_in), math.isqrt(tokens)
        if self.grid**2 != tokens_in or self.side**2 != tokens:
            raise UserError(f"a projector from {tokens_in} tokens to {tokens}: both must be squares, because tokens lie in a grid")
        if tokens > tokens_in:
            raise UserError(f"a projector to {tokens} tokens: the tower has {tokens_in}")
        self.linear_1 = nn.Linear(self.factor * width, llm_width)
        self.linear_2 = nn.Linear(llm_width, llm_width)

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, factor * d)."""
        raise NotImplementedError

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, D)."""
        return self.linear_2(F.gelu(self.linear_1(self.reduce(tokens))))

    def as_map(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, d, G, G)."""
        return tokens.mT.unflatten(2, (self.grid, self.grid))


class AveragePool(Projector):
    """The mean of the tokens in each cell of a coarser grid."""

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, d)."""
        return F.adaptive_avg_pool2d(self.as_map(tokens), self.side).flatten(2).mT


class Stride(Projector):
    """The token nearest to the middle of each cell of a coarser grid."""

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, d)."""
        middle = ((torch.arange(self.side, device=tokens.device) + 0.5) * self.grid / self.side).long()
        return self.as_map(tokens)[:, :, middle[:, None], middle].flatten(2).mT


class RandomChoice(Projector):
    """Tokens at random positions, the same for every image."""

    def __init__(self, width: int, llm_width: int, tokens_in: int, tokens: int) -> None:
        super().__init__(width, llm_width, tokens_in, tokens)
        chosen = torch.randperm(tokens_in, generator=torch.Generator().manual_seed(0))[:tokens].sort().values
        self.register_buffer("chosen", chosen, persistent=False)

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, d)."""
        return tokens[:, self.chosen]


class PixelShuffle(Projector):
    """Each 2 x 2 tokens concatenated (InternVL 1.5, arXiv 2404.16821, section 3.1), after interpolation to a grid of twice N's side."""

    factor = 4

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, 4 * d)."""
        grid = self.as_map(tokens)
        if self.grid != 2 * self.side:
            # torch has no bfloat16 kernel for this on CPUs
            scaled = F.interpolate(grid.float(), size=(2 * self.side, 2 * self.side), mode="bilinear", antialias=True)
            grid = scaled.to(tokens.dtype)
        return F.pixel_unshuffle(grid, 2).flatten(2).mT


class Resampler(Projector):
    """One cross-attention layer of N learned queries with 2-D positions (Qwen-VL, arXiv 2308.12966, section 2.1)."""

    def __init__(self, width: int, llm_width: int, tokens_in: int, tokens: int) -> None:
        super().__init__(width, llm_width, tokens_in, tokens)
        self.heads = max(1, width // HEAD_SIZE)
        self.queries = nn.Parameter(torch.empty(tokens, width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.norm_tokens, self.norm_queries, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.register_buffer("positions_in", _sines(self.grid, width), persistent=False)
        self.register_buffer("positions", _sines(self.side, width), persistent=False)

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, d)."""
        tokens = self.norm_tokens(tokens)
        queries = (self.norm_queries(self.queries) + self.positions.to(tokens.dtype)).expand(len(tokens), -1, -1)
        key, value = self.kv(tokens).chunk(2, dim=-1)
        key = key + self.positions_in.to(tokens.dtype)
        q, k, v = (projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in (self.q(queries), key, value))
        return self.norm(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)))


class Abstractor(Projector):
    """Three convolution blocks, average pooling, three more (C-Abstractor, arXiv 2312.06742, section 3.2), in the tower's width."""

    def __init__(self, width: int, llm_width: int, tokens_in: int, tokens: int) -> None:
        from timm.layers import LayerNorm2d
        from timm.models.regnet import RegStage

        super().__init__(width, llm_width, tokens_in, tokens)
        stage = {"stride": 1, "dilation": 1, "act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
        self.positions = nn.Parameter(torch.empty(1, tokens_in, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.before = RegStage(depth=3, in_chs=width, out_chs=width, **stage)
        self.after = RegStage(depth=3, in_chs=width, out_chs=width, **stage)

    def reduce(self, tokens: Tensor) -> Tensor:
        """(B, M, d) to (B, N, d)."""
        pooled = F.adaptive_avg_pool2d(self.before(self.as_map(tokens + self.positions)), self.side)
        return self.after(pooled).flatten(2).mT


def _sines(side: int, width: int) -> Tensor:
    """2-D sine-cosine positions, (side * side, width): half of the width for rows, half for columns (arXiv 2104.02057, section 4)."""
    quarter = width // 4
    rates = 1 / 10000 ** (torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * rates  # (side, quarter)
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


PROJECTORS: dict[str, Callable[[int, int, int, int], Projector]] = {
    "pool": AveragePool,
    "stride": Stride,
    "random": RandomChoice,
    "shuffle": PixelShuffle,
    "resampler": Resampler,
    "abstractor": Abstractor,
}
MLP = "mlp"  # LLaVA's own, without token reduction
DEFAULT_TOKENS = 49  # N of the others


def make_projector(kind: str, width: int, llm_width: int, tokens_in: int, tokens: int) -> Projector:
    """A new token-reducing projector.

    Raises:
        UserError: no such kind, or unsupported numbers of tokens.
    """
    if kind not in PROJECTORS:
        raise UserError(f"projector {kind}: no such kind; known are {', '.join([MLP, *PROJECTORS])}")
    return PROJECTORS[kind](width, llm_width, tokens_in, tokens)
