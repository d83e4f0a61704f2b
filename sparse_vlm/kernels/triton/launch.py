"""Launching the kernels: allocation, grids and tiles. Needs triton.

Shape legend: T tokens of all images, n of one, P points a token, C channels, O points after mixing, G width of the hidden vector, J =
C * C + O * P parameters a token, B x H x W cells of all maps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_vlm.kernels.triton import stem
from sparse_vlm.kernels.triton.backward import hidden_backward, points_backward, sampled_backward, weight_backward
from sparse_vlm.kernels.triton.forward import look_forward, mix_forward
from sparse_vlm.kernels.triton.spread import coordinates_backward, map_backward, sample_forward
from sparse_vlm.kernels.triton.tiles import Tiles, choose_mixing_tiles, choose_tiles

SHARES = 8  # of the tokens, whose parts of a weight's gradient are added up at the end: enough programs, and memory that T does not change
SAMPLED = 32  # points of a program that samples alone
CONVOLVED = 64  # positions of a program of the early convolution

# the interpreter takes over when a kernel is decorated, so this is what every kernel of this process is
INTERPRETED = not isinstance(look_forward, triton.JITFunction)


def forward(
    feature_map: Tensor,
    points: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    border: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as `ops.look`'s."""
    height, width, channels = feature_map.shape[1:]
    tokens, count, inner = hidden.shape[0] * hidden.shape[1], points.shape[2], hidden.shape[2]
    out = hidden.new_empty(*hidden.shape[:2], out_points * channels)
    kept = (*hidden.shape[:2], count, channels) if save else (0,)
    sampled, mixed = hidden.new_empty(kept), hidden.new_empty(kept)
    if not save:
        made = F.linear(hidden, weight, bias)
        mixing = choose_mixing_tiles(tokens, count, channels, out_points, _cores(hidden))
        with _on(hidden):
            mix_forward[(tokens * triton.cdiv(channels, mixing.channels),)](
                feature_map, points, made, bias if m_beta is None else m_beta, bias if s_beta is None else s_beta, out,
                hidden.shape[1], height, width, C=channels, P=count, O=out_points, TILE_P=mixing.points, TILE_I=mixing.read,
                TILE_C=mixing.channels, TILE_O=mixing.out_points, BORDER=border, BETAS=m_beta is not None, **_multiplied(hidden),
                num_warps=mixing.warps, num_stages=1,
            )  # fmt: skip
        return out, sampled, mixed
    tiles = choose_tiles(tokens, count, channels, out_points, inner, hidden.dtype, _cores(hidden))
    with _on(hidden):
        look_forward[(_programs(tokens, channels, tiles),)](
            feature_map, points, hidden, weight, bias, bias if m_beta is None else m_beta, bias if s_beta is None else s_beta,
            out, sampled, mixed, tokens, hidden.shape[1], height, width, C=channels, P=count, O=out_points, G=inner,
            TILE_O=tiles.out_points, BORDER=border, BETAS=m_beta is not None, **_shared(hidden, tiles),
        )  # fmt: skip
    return out, sampled, mixed


def mixing_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    sampled: Tensor,
    mixed: Tensor,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and result as `ops.mixing_backward`'s."""
    count, channels = sampled.shape[-2:]
    tokens, inner = hidden.shape[0] * hidden.shape[1], hidden.shape[-1]
    out_points = grad.shape[-1] // channels
    tiles = choose_tiles(tokens, count, channels, out_points, inner, hidden.dtype, _cores(hidden))
    shared = _shared(hidden, tiles)
    betas, beta = m_beta is not None, bias if m_beta is None else m_beta
    sizes = {"C": channels, "P": count, "G": inner}
    whole = {**sizes, "O": out_points, "TILE_O": tiles.out_points, "BETAS": betas}
    grad_points = hidden.new_empty(tokens, out_points, channels)
    grad_mixed, grad_sampled, grad_hidden = torch.empty_like(mixed), torch.empty_like(sampled), torch.empty_like(hidden)
    grads = [hidden.new_empty(0) for _ in range(4)]
    with _on(hidden):
        programs = _programs(tokens, channels, tiles)
        points_backward[(programs,)](
            grad, mixed, hidden, weight, bias, beta, bias if s_beta is None else s_beta, grad_points, grad_mixed, tokens, **whole, **shared
        )
        sampled_backward[(programs,)](grad_mixed, hidden, weight, bias, grad_sampled, tokens, **sizes, **shared)
        columns = triton.cdiv(inner, tiles.hidden)
        hidden_backward[(columns * triton.cdiv(tokens, tiles.tokens),)](
            sampled, grad_mixed, mixed, grad_points, weight, beta, grad_hidden, tokens, **whole, **shared
        )
        if parameters:
            shares = min(SHARES, triton.cdiv(tokens, max(16, tiles.tokens)))
            of_weight = hidden.new_empty(shares, *weight.shape, dtype=torch.float32)
            of_bias = hidden.new_empty(shares, *bias.shape, dtype=torch.float32)
            blocks = triton.cdiv(channels, tiles.channels) ** 2, triton.cdiv(out_points, tiles.out_points)
            for of_points, number in enumerate(blocks):
                weight_backward[(number, columns, shares)](
                    sampled, grad_mixed, mixed, grad_points, hidden, beta, of_weight, of_bias, tokens, shares,
                    POINTS=bool(of_points), **whole, **{**shared, "TILE_T": max(16, tiles.tokens)},
                )  # fmt: skip
            grads[:2] = of_weight.sum(0).to(weight.dtype), of_bias.sum(0).to(bias.dtype)
            if m_beta is not None and s_beta is not None:
                of_m, of_s = grad_mixed.sum((0, 1, 2), dtype=torch.float32), grad_points.sum((0, 2), dtype=torch.float32)
                grads[2:] = of_m.to(m_beta.dtype), of_s.to(s_beta.dtype)
    return grad_sampled, grad_hidden, *grads


def sample(feature_map: Tensor, points: Tensor, border: bool, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `ops.sample`'s."""
    height, width, channels = feature_map.shape[1:]
    out = feature_map.new_empty(*points.shape[:3], channels, dtype=dtype)
    number, per_picture = points.numel() // 2, points.shape[1] * points.shape[2]
    tile = min(64, triton.next_power_of_2(channels))
    with _on(points):
        sample_forward[(triton.cdiv(number, SAMPLED), triton.cdiv(channels, tile))](
            feature_map, points, out, number, per_picture, height, width, C=channels, TILE_N=SAMPLED, TILE_C=tile, BORDER=border
        )
    return out


def sampling_backward(
    grad_sampled: Tensor, feature_map: Tensor, points: Tensor, border: bool, of_map: bool, of_points: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `ops.sampling_backward`'s."""
    batch, height, width, channels = feature_map.shape
    per_picture = points.shape[1] * points.shape[2]
    grad_map, grad_at = feature_map.new_empty(0), points.new_empty(0)
    tile = min(64, triton.next_power_of_2(channels))
    tiles = choose_tiles(per_picture, points.shape[2], channels, 1, 1, points.dtype, _cores(points))
    with _on(points):
        if of_map:
            order, starts = sort_points(points, height, width, border)
            grad_map = torch.empty_like(feature_map)
            cells = batch * height * width
            map_backward[(triton.cdiv(cells, tiles.cells), triton.cdiv(channels, tile))](
                grad_sampled,
                points,
                order,
                starts,
                grad_map,
                cells,
                height,
                width,
                C=channels,
                TILE_N=tiles.cells,
                TILE_C=tile,
                BORDER=border,
            )
        if of_points:
            grad_at = torch.empty_like(points)
            number = batch * per_picture
            coordinates_backward[(triton.cdiv(number, tiles.cells),)](
                grad_sampled, feature_map, points, grad_at, number, per_picture, height, width, C=channels, TILE_N=tiles.cells, TILE_C=tile,
                BORDER=border,
            )  # fmt: skip
    return grad_map, grad_at


def early_convolution(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Arguments and result as `ops.early_convolution`'s."""
    batch, _, height, width = pixels.shape
    out = pixels.new_empty(batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0])
    positions = batch * out.shape[1] * out.shape[2]
    with _on(pixels):
        stem.early_convolution[(triton.cdiv(positions, CONVOLVED),)](
            pixels, weight, bias, out, positions, height, width, out.shape[1], out.shape[2], C=weight.shape[0], TILE_N=CONVOLVED,
            TILE_C=max(16, triton.next_power_of_2(weight.shape[0])), TILE_K=16, **_multiplied(pixels), num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def sort_points(points: Tensor, height: int, width: int, border: bool) -> tuple[Tensor, Tensor]:
    """The points (B, n, P, 2) in the order of the bins that `spread.map_backward` reads.

    Returns:
        order (B * n * P,) int32 and starts (B * (H + 1) * (W + 1) + 1,) int32.
    """
    batch = points.shape[0]
    points = points.nan_to_num().flatten(1, 2)
    x, y = (
        (points[..., axis] * cells - 0.5).clamp(0 if border else -2, cells - 1 if border else cells + 1).floor().int()
        for axis, cells in enumerate((width, height))
    )
    picture = torch.arange(batch, device=points.device, dtype=torch.int32)[:, None]
    bins = batch * (height + 1) * (width + 1)
    bin_of = (picture * (height + 1) + y + 1) * (width + 1) + x + 1
    reads_map = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    bin_of, order = torch.where(reads_map, bin_of, bins).flatten().sort(stable=True)
    every = torch.arange(bins + 1, device=points.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(bin_of, every, out_int32=True)


def _programs(tokens: int, channels: int, tiles: Tiles) -> int:
    return triton.cdiv(channels, tiles.channels) * triton.cdiv(tokens, tiles.tokens)


def _shared(hidden: Tensor, tiles: Tiles) -> dict[str, Any]:
    """Arguments that every fused kernel of mixing has."""
    return {
        "TILE_T": tiles.tokens,
        "TILE_P": tiles.points,
        "TILE_C": tiles.channels,
        "TILE_G": tiles.hidden,
        **_multiplied(hidden),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _multiplied(hidden: Tensor) -> dict[str, Any]:
    """How products are made."""
    exact = hidden.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "OPERAND": tl.bfloat16 if hidden.dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
    }


def _cores(tensor: Tensor) -> int | None:
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else None


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
