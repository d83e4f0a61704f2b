"""Launching the kernels: allocation, grids and tiles. Needs triton.

Shape legend: n tokens of an image, P points a token, C channels, B x H x W cells of all maps.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sparse_vlm.kernels.triton import convolution, mixing, sampling
from sparse_vlm.kernels.triton.tiles import choose_mixing_tiles

# the interpreter replaces kernels where they are decorated, so this holds for every kernel of this process
INTERPRETED = not isinstance(mixing.sample_and_mix, triton.JITFunction)
SAMPLED = 32  # points of a sampling program
GRADIENTS = 256 if INTERPRETED else 16  # cells, or points, of a program of its gradients; the interpreter takes its time for each program
CONVOLVED = 64  # positions of a program of the early convolution


def sample_and_mix(
    feature_map: Tensor,
    points: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    border: bool,
) -> Tensor:
    """Arguments and result as `ops.sample_and_mix`'s."""
    height, width, channels = feature_map.shape[1:]
    tokens, count = hidden.shape[0] * hidden.shape[1], points.shape[2]
    out = hidden.new_empty(*hidden.shape[:2], out_points * channels)
    generated = F.linear(hidden, weight, bias)
    cores = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else None
    tiles = choose_mixing_tiles(tokens, count, channels, out_points, cores)
    with _on(hidden):
        mixing.sample_and_mix[(tokens * triton.cdiv(channels, tiles.channels),)](
            feature_map, points, generated, bias if m_beta is None else m_beta, bias if s_beta is None else s_beta, out,
            hidden.shape[1], height, width, C=channels, P=count, O=out_points, TILE_P=tiles.points, TILE_I=tiles.read,
            TILE_C=tiles.channels, TILE_O=tiles.out_points, BORDER=border, BETAS=m_beta is not None, **_precision(hidden),
            num_warps=tiles.warps, num_stages=1,
        )  # fmt: skip
    return out


def sample(feature_map: Tensor, points: Tensor, border: bool, dtype: torch.dtype) -> Tensor:
    """Arguments and result as `ops.sample`'s."""
    height, width, channels = feature_map.shape[1:]
    out = feature_map.new_empty(*points.shape[:3], channels, dtype=dtype)
    number, per_image = points.numel() // 2, points.shape[1] * points.shape[2]
    tile = min(64, triton.next_power_of_2(channels))
    with _on(points):
        sampling.sample_forward[(triton.cdiv(number, SAMPLED), triton.cdiv(channels, tile))](
            feature_map, points, out, number, per_image, height, width, C=channels, TILE_N=SAMPLED, TILE_C=tile, BORDER=border
        )
    return out


def sampling_backward(
    grad_sampled: Tensor, feature_map: Tensor, points: Tensor, border: bool, of_map: bool, of_points: bool
) -> tuple[Tensor, Tensor]:
    """Arguments and result as `ops.sampling_backward`'s."""
    batch, height, width, channels = feature_map.shape
    per_image = points.shape[1] * points.shape[2]
    grad_map, grad_at = feature_map.new_empty(0), points.new_empty(0)
    tile = min(64, triton.next_power_of_2(channels))
    with _on(points):
        if of_map:
            order, starts = sort_points(points, height, width, border)
            grad_map = torch.empty_like(feature_map)
            cells = batch * height * width
            sampling.map_backward[(triton.cdiv(cells, GRADIENTS), triton.cdiv(channels, tile))](
                grad_sampled, points, order, starts, grad_map, cells, height, width, C=channels, TILE_N=GRADIENTS, TILE_C=tile,
                BORDER=border,
            )  # fmt: skip
        if of_points:
            grad_at = torch.empty_like(points)
            number = batch * per_image
            sampling.coordinates_backward[(triton.cdiv(number, GRADIENTS),)](
                grad_sampled, feature_map, points, grad_at, number, per_image, height, width, C=channels, TILE_N=GRADIENTS, TILE_C=tile,
                BORDER=border,
            )  # fmt: skip
    return grad_map, grad_at


def early_convolution(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Arguments and result as `ops.early_convolution`'s."""
    batch, _, height, width = pixels.shape
    out = pixels.new_empty(batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0])
    positions = batch * out.shape[1] * out.shape[2]
    with _on(pixels):
        convolution.early_convolution[(triton.cdiv(positions, CONVOLVED),)](
            pixels, weight, bias, out, positions, height, width, out.shape[1], out.shape[2], C=weight.shape[0], TILE_N=CONVOLVED,
            TILE_C=max(16, triton.next_power_of_2(weight.shape[0])), TILE_K=16, **_precision(pixels), num_warps=4, num_stages=1,
        )  # fmt: skip
    return out


def sort_points(points: Tensor, height: int, width: int, border: bool) -> tuple[Tensor, Tensor]:
    """Sort points (B, n, P, 2) by the bins that `sampling.map_backward` reads.

    Returns:
        order (B * n * P,) int32 and starts (B * (H + 1) * (W + 1) + 1,) int32.
    """
    batch = points.shape[0]
    points = points.nan_to_num().flatten(1, 2)
    x, y = (
        (points[..., axis] * cells - 0.5).clamp(0 if border else -2, cells - 1 if border else cells + 1).floor().int()
        for axis, cells in enumerate((width, height))
    )
    image = torch.arange(batch, device=points.device, dtype=torch.int32)[:, None]
    bins = batch * (height + 1) * (width + 1)
    bin_of = (image * (height + 1) + y + 1) * (width + 1) + x + 1
    reads_map = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    bin_of, order = torch.where(reads_map, bin_of, bins).flatten().sort(stable=True)
    every = torch.arange(bins + 1, device=points.device, dtype=torch.int32)
    return order.int(), torch.searchsorted(bin_of, every, out_int32=True)


def _precision(hidden: Tensor) -> dict[str, Any]:
    """Operand type and precision of matrix products."""
    exact = hidden.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {
        "OPERAND": tl.bfloat16 if hidden.dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
    }


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
