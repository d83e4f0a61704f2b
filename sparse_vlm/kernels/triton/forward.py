"""A look, forward: sample, generate, mix over channels, mix over points, GELU.

Shape legend: T tokens of all images, P sampling points, C channels, O points after mixing, G width of the hidden vector,
J = C * C + O * P parameters a token. A program has TILE_T tokens, or one, and writes TILE_C channels of them; the other tile names are
those of `tiles`.

Notable: with gradients all of it is one kernel, because memory is what is short then. Without, a matrix product generates and one kernel
does the rest: the parameters go through memory once, which a GPU does sooner than it generates them in small blocks (docs/kernels.md).
"""

import triton
import triton.language as tl

from sparse_vlm.kernels.triton.device import channel_rows, corners, gelu, generate, point_rows, product, read_between, write_block


@triton.jit
def look_forward(
    map_ptr, points_ptr, hidden_ptr, weight_ptr, bias_ptr, m_beta_ptr, s_beta_ptr, out_ptr, sampled_ptr, mixed_ptr,
    tokens, per_picture, height, width,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr, G: tl.constexpr,  # noqa: E741
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr, TILE_G: tl.constexpr,
    BORDER: tl.constexpr, BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Map (B, H, W, C), points (T, P, 2) float32, hidden (T, G), weight (J, G) to out (T, O, C), and what the backward pass needs.

    That is sampled (T, P, C) and mixed (T, P, C), the latter before beta and activation.
    """
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    # neighbours in time read the same cells of the map: the blocks of channels of one tile of tokens
    blocks: tl.constexpr = (C + TILE_C - 1) // TILE_C
    first_out = tl.program_id(0) % blocks * TILE_C
    token = tl.program_id(0) // blocks * TILE_T + tl.arange(0, TILE_T)
    c = first_out + tl.arange(0, TILE_C)
    p = tl.arange(0, TILE_P)
    mask = token < tokens

    # where the points lie on the map: (TILE_T, TILE_P, 1) each
    here = (mask[:, None] & (p < P)[None, :])[:, :, None]
    at = (token.to(tl.int64)[:, None] * P + p[None, :])[:, :, None] * 2
    picture = (token // per_picture)[:, None, None]
    cell, across, down, left, right, above, below, _, _, _, _ = corners(points_ptr, at, here, picture, height, width, BORDER)

    mixed = tl.zeros((TILE_T, TILE_P, TILE_C), tl.float32)
    for first_in in range(0, C, TILE_C):
        i = first_in + tl.arange(0, TILE_C)
        channel = i[None, None, :]
        wanted = here & (channel < C)
        sampled = read_between(map_ptr, cell, across, down, left, right, above, below, channel, wanted, C)
        if first_out == 0:
            write_block(sampled_ptr, sampled, token, p, i, mask, P, C)
        row, row_mask = channel_rows(first_in, first_out, C, TILE_C)
        over_channels = generate(
            hidden_ptr, weight_ptr, bias_ptr, token, mask, row, row_mask, G, TILE_T, TILE_C * TILE_C, TILE_G, OPERAND, PRECISION
        )
        mixed = product(sampled, tl.reshape(over_channels, (TILE_T, TILE_C, TILE_C)), mixed, dtype, OPERAND, PRECISION)
    write_block(mixed_ptr, mixed, token, p, c, mask, P, C)
    mixed = mixed.to(dtype).to(tl.float32)  # what the backward pass will read
    if BETAS:
        mixed = gelu(mixed + tl.load(m_beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, None, :])

    for first in range(0, O, TILE_O):
        o = first + tl.arange(0, TILE_O)
        row, row_mask = point_rows(first, C, P, O, TILE_O, TILE_P)
        over_points = generate(
            hidden_ptr, weight_ptr, bias_ptr, token, mask, row, row_mask, G, TILE_T, TILE_O * TILE_P, TILE_G, OPERAND, PRECISION
        )
        nothing = tl.zeros((TILE_T, TILE_O, TILE_C), tl.float32)
        out = product(tl.reshape(over_points, (TILE_T, TILE_O, TILE_P)), mixed, nothing, dtype, OPERAND, PRECISION)
        if BETAS:
            out += tl.load(s_beta_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :, None]
        write_block(out_ptr, gelu(out), token, o, c, mask, O, C)


@triton.jit
def mix_forward(
    map_ptr, points_ptr, made_ptr, m_beta_ptr, s_beta_ptr, out_ptr, per_picture, height, width,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr,  # noqa: E741
    TILE_P: tl.constexpr, TILE_I: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr,
    BORDER: tl.constexpr, BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Map (B, H, W, C), points (T, P, 2) float32, generated parameters (T, J) to out (T, O, C); a program has one token."""
    dtype: tl.constexpr = made_ptr.dtype.element_ty
    blocks: tl.constexpr = (C + TILE_C - 1) // TILE_C
    token = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * TILE_C + tl.arange(0, TILE_C)
    p, o = tl.arange(0, TILE_P), tl.arange(0, TILE_O)
    made_ptr += token.to(tl.int64) * (C * C + O * P)

    at = (token.to(tl.int64) * P + p[:, None]) * 2
    here = (p < P)[:, None]
    picture = token // per_picture
    cell, across, down, left, right, above, below, _, _, _, _ = corners(points_ptr, at, here, picture, height, width, BORDER)

    mixed = tl.zeros((TILE_P, TILE_C), tl.float32)
    for first_in in tl.static_range(0, C, TILE_I):
        i = first_in + tl.arange(0, TILE_I)
        wanted = here & (i < C)[None, :]
        over_channels = tl.load(made_ptr + i[:, None] * C + c[None, :], mask=(i < C)[:, None] & (c < C)[None, :], other=0.0)
        sampled = read_between(map_ptr, cell, across, down, left, right, above, below, i[None, :], wanted, C)
        mixed = product(sampled, over_channels, mixed, dtype, OPERAND, PRECISION)
    mixed = mixed.to(dtype).to(tl.float32)
    if BETAS:
        mixed = gelu(mixed + tl.load(m_beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :])

    over_points = tl.load(made_ptr + C * C + o[:, None] * P + p[None, :], mask=(o < O)[:, None] & (p < P)[None, :], other=0.0)
    out = product(over_points, mixed, tl.zeros((TILE_O, TILE_C), tl.float32), dtype, OPERAND, PRECISION)
    if BETAS:
        out += tl.load(s_beta_ptr + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    at_out = token.to(tl.int64) * (O * C) + o[:, None] * C + c[None, :]
    tl.store(out_ptr + at_out, gelu(out).to(out_ptr.dtype.element_ty), mask=(o < O)[:, None] & (c < C)[None, :])
