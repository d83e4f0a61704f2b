"""The early convolution, forward: 7 x 7, stride 2, three input channels.

Shape legend: B images, H x W their pixels, H' x W' half of that, C channels, K = 3 * 7 * 7 inputs of one output. A program computes
TILE_N positions of all C channels.

Notable: libraries pad three channels to eight and change layouts before and after; this kernel reads the pixels channels first and writes
the result channels last, as the map is read.
"""

import triton
import triton.language as tl

from sparse_vlm.kernels.triton.device import product


@triton.jit
def early_convolution(
    pixels_ptr, weight_ptr, bias_ptr, out_ptr, positions, height, width, out_height, out_width,
    C: tl.constexpr, TILE_N: tl.constexpr, TILE_C: tl.constexpr, TILE_K: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pixels (B, 3, H, W) with weight (C, K) and bias (C,) to out (B, H', W', C)."""
    dtype: tl.constexpr = pixels_ptr.dtype.element_ty
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    c = tl.arange(0, TILE_C)
    row, x = n // out_width, n % out_width * 2 - 3
    image, y = (row // out_height).to(tl.int64), row % out_height * 2 - 3
    corner = image * 3 * height * width + y * width + x
    # positions last: neighbours in a warp read pixels that are two apart
    total = tl.zeros((TILE_C, TILE_N), tl.float32)
    for first in tl.static_range(0, 147, TILE_K):
        k = first + tl.arange(0, TILE_K)
        down, across = k % 49 // 7, k % 7
        step = (k // 49 * height + down) * width + across
        y_k, x_k = y[None, :] + down[:, None], x[None, :] + across[:, None]
        inside = (y_k >= 0) & (y_k < height) & (x_k >= 0) & (x_k < width) & (n < positions)[None, :] & (k < 147)[:, None]
        pixels = tl.load(pixels_ptr + (corner[None, :] + step[:, None]), mask=inside, other=0.0)
        weight = tl.load(weight_ptr + c[:, None] * 147 + k[None, :], mask=(c < C)[:, None] & (k < 147)[None, :], other=0.0)
        total = product(weight, pixels, total, dtype, OPERAND, PRECISION)
    total += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(out_ptr + at, tl.trans(total).to(out_ptr.dtype.element_ty), mask=(n < positions)[:, None] & (c < C)[None, :])
