"""Sampling and mixing, forward: sample, mix over channels, mix over points, GELU.

Shape legend: T tokens of all images, P sampling points, C channels, O points after mixing, J = C * C + O * P parameters a token. A program
computes TILE_C channels of one token; the other tile names are those of `tiles`.

Notable: a matrix product generates the parameters beforehand. They pass through memory once, which is faster on a GPU than generating
them in small blocks inside the kernel (lab/kernels.md).
"""

import triton
import triton.language as tl

from sparse_vlm.kernels.triton.device import corners, gelu, product, read_between


@triton.jit
def sample_and_mix(
    map_ptr, points_ptr, generated_ptr, m_beta_ptr, s_beta_ptr, out_ptr, per_image, height, width,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr,  # noqa: E741
    TILE_P: tl.constexpr, TILE_I: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr,
    BORDER: tl.constexpr, BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Map (B, H, W, C), points (T, P, 2) float32 and generated parameters (T, J) to out (T, O, C)."""
    dtype: tl.constexpr = generated_ptr.dtype.element_ty
    blocks: tl.constexpr = (C + TILE_C - 1) // TILE_C
    token = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * TILE_C + tl.arange(0, TILE_C)
    p, o = tl.arange(0, TILE_P), tl.arange(0, TILE_O)
    generated_ptr += token.to(tl.int64) * (C * C + O * P)

    at = (token.to(tl.int64) * P + p[:, None]) * 2
    here = (p < P)[:, None]
    image = token // per_image
    cell, across, down, left, right, above, below, _, _, _, _ = corners(points_ptr, at, here, image, height, width, BORDER)

    mixed = tl.zeros((TILE_P, TILE_C), tl.float32)
    for first_in in tl.static_range(0, C, TILE_I):
        i = first_in + tl.arange(0, TILE_I)
        mask = here & (i < C)[None, :]
        over_channels = tl.load(generated_ptr + i[:, None] * C + c[None, :], mask=(i < C)[:, None] & (c < C)[None, :], other=0.0)
        sampled = read_between(map_ptr, cell, across, down, left, right, above, below, i[None, :], mask, C)
        mixed = product(sampled, over_channels, mixed, dtype, OPERAND, PRECISION)
    mixed = mixed.to(dtype).to(tl.float32)
    if BETAS:
        mixed = gelu(mixed + tl.load(m_beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :])

    over_points = tl.load(generated_ptr + C * C + o[:, None] * P + p[None, :], mask=(o < O)[:, None] & (p < P)[None, :], other=0.0)
    out = product(over_points, mixed, tl.zeros((TILE_O, TILE_C), tl.float32), dtype, OPERAND, PRECISION)
    if BETAS:
        out += tl.load(s_beta_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    at_out = token.to(tl.int64) * (O * C) + o[:, None] * C + c[None, :]
    tl.store(out_ptr + at_out, gelu(out).to(out_ptr.dtype.element_ty), mask=(o < O)[:, None] & (c < C)[None, :])
