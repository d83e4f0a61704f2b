"""Gradients of mixing: of the sampled features, the hidden vector, and the generator's weight and bias.

Shape legend: as in `forward`. grad_out is of the look's result (T, O, C), grad_points of what point mixing made, before its beta and GELU
(T, O, C), grad_mixed of what channel mixing made, before its beta and GELU (T, P, C), grad_sampled of what was sampled (T, P, C).

Notable: parameters and their gradients exist block by block, in registers. The gradient of a block of parameters is a product of two
small things that are in memory: sampled.T @ grad_mixed, and grad_points @ mixed.T. No atomics: each number has one program that sums it.
"""

import triton
import triton.language as tl

from sparse_vlm.kernels.triton.device import channel_rows, gelu, gelu_slope, generate, point_rows, product, read_block, write_block


@triton.jit
def activated(mixed, m_beta_ptr, c, C: tl.constexpr, BETAS: tl.constexpr):
    """What goes into point mixing, and its derivative by what came out of channel mixing (1 without betas)."""
    mixed = mixed.to(tl.float32)
    if BETAS:
        before = mixed + tl.load(m_beta_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, None, :]
        return gelu(before), gelu_slope(before)
    else:
        return mixed, tl.full(mixed.shape, 1.0, tl.float32)


@triton.jit
def points_backward(
    grad_out_ptr, mixed_ptr, hidden_ptr, weight_ptr, bias_ptr, m_beta_ptr, s_beta_ptr, grad_points_ptr, grad_mixed_ptr, tokens,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr, G: tl.constexpr,  # noqa: E741
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr, TILE_G: tl.constexpr,
    BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_out to grad_points and grad_mixed, for TILE_C channels of TILE_T tokens; runs point mixing again."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    blocks: tl.constexpr = (C + TILE_C - 1) // TILE_C
    c = tl.program_id(0) % blocks * TILE_C + tl.arange(0, TILE_C)
    token = tl.program_id(0) // blocks * TILE_T + tl.arange(0, TILE_T)
    p = tl.arange(0, TILE_P)
    mask = token < tokens
    mixed, slope = activated(read_block(mixed_ptr, token, p, c, mask, P, C), m_beta_ptr, c, C, BETAS)
    grad_mixed = tl.zeros((TILE_T, TILE_P, TILE_C), tl.float32)
    for first in range(0, O, TILE_O):
        o = first + tl.arange(0, TILE_O)
        row, row_mask = point_rows(first, C, P, O, TILE_O, TILE_P)
        made = generate(
            hidden_ptr, weight_ptr, bias_ptr, token, mask, row, row_mask, G, TILE_T, TILE_O * TILE_P, TILE_G, OPERAND, PRECISION
        )
        over_points = tl.reshape(made, (TILE_T, TILE_O, TILE_P)).to(dtype)
        nothing = tl.zeros((TILE_T, TILE_O, TILE_C), tl.float32)
        out = product(over_points, mixed, nothing, dtype, OPERAND, PRECISION)
        if BETAS:
            out += tl.load(s_beta_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :, None]
        grad = read_block(grad_out_ptr, token, o, c, mask, O, C).to(tl.float32) * gelu_slope(out)
        write_block(grad_points_ptr, grad, token, o, c, mask, O, C)
        grad_mixed = product(tl.trans(over_points, (0, 2, 1)), grad, grad_mixed, dtype, OPERAND, PRECISION)
    write_block(grad_mixed_ptr, grad_mixed * slope, token, p, c, mask, P, C)


@triton.jit
def sampled_backward(
    grad_mixed_ptr, hidden_ptr, weight_ptr, bias_ptr, grad_sampled_ptr, tokens,
    C: tl.constexpr, P: tl.constexpr, G: tl.constexpr,
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_G: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_mixed to grad_sampled, for TILE_C channels of TILE_T tokens; generates the channel matrix again."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    blocks: tl.constexpr = (C + TILE_C - 1) // TILE_C
    first_in = tl.program_id(0) % blocks * TILE_C
    token = tl.program_id(0) // blocks * TILE_T + tl.arange(0, TILE_T)
    p = tl.arange(0, TILE_P)
    mask = token < tokens
    grad_sampled = tl.zeros((TILE_T, TILE_P, TILE_C), tl.float32)
    for first_out in range(0, C, TILE_C):
        grad_mixed = read_block(grad_mixed_ptr, token, p, first_out + tl.arange(0, TILE_C), mask, P, C)
        row, row_mask = channel_rows(first_in, first_out, C, TILE_C)
        made = generate(
            hidden_ptr, weight_ptr, bias_ptr, token, mask, row, row_mask, G, TILE_T, TILE_C * TILE_C, TILE_G, OPERAND, PRECISION
        )
        over_channels = tl.reshape(made, (TILE_T, TILE_C, TILE_C)).to(dtype)
        grad_sampled = product(grad_mixed, tl.trans(over_channels, (0, 2, 1)), grad_sampled, dtype, OPERAND, PRECISION)
    write_block(grad_sampled_ptr, grad_sampled, token, p, first_in + tl.arange(0, TILE_C), mask, P, C)


@triton.jit
def grad_channel_block(
    sampled_ptr, grad_mixed_ptr, token, mask, first_in, first_out,
    C: tl.constexpr, P: tl.constexpr, TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of the channel matrices, (TILE_T, TILE_C * TILE_C)."""
    p, c = tl.arange(0, TILE_P), tl.arange(0, TILE_C)
    sampled = read_block(sampled_ptr, token, p, first_in + c, mask, P, C)
    grad_mixed = read_block(grad_mixed_ptr, token, p, first_out + c, mask, P, C)
    nothing = tl.zeros((TILE_T, TILE_C, TILE_C), tl.float32)
    grad = product(tl.trans(sampled, (0, 2, 1)), grad_mixed, nothing, sampled.dtype, OPERAND, PRECISION)
    return tl.reshape(grad, (TILE_T, TILE_C * TILE_C))


@triton.jit
def grad_point_block(
    grad_points_ptr, mixed_ptr, m_beta_ptr, token, mask, first,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr,  # noqa: E741
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr,
    BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of the point matrices, (TILE_T, TILE_O * TILE_P)."""
    p, o = tl.arange(0, TILE_P), first + tl.arange(0, TILE_O)
    grad = tl.zeros((TILE_T, TILE_O, TILE_P), tl.float32)
    for first_c in range(0, C, TILE_C):
        c = first_c + tl.arange(0, TILE_C)
        grad_points = read_block(grad_points_ptr, token, o, c, mask, O, C)
        mixed, _ = activated(read_block(mixed_ptr, token, p, c, mask, P, C), m_beta_ptr, c, C, BETAS)
        grad = product(grad_points, tl.trans(mixed, (0, 2, 1)), grad, grad_points.dtype, OPERAND, PRECISION)
    return tl.reshape(grad, (TILE_T, TILE_O * TILE_P))


@triton.jit
def hidden_backward(
    sampled_ptr, grad_mixed_ptr, mixed_ptr, grad_points_ptr, weight_ptr, m_beta_ptr, grad_hidden_ptr, tokens,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr, G: tl.constexpr,  # noqa: E741
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr, TILE_G: tl.constexpr,
    BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of TILE_G columns of the hidden vectors of TILE_T tokens: the parameters' gradient @ weight."""
    dtype: tl.constexpr = sampled_ptr.dtype.element_ty
    blocks: tl.constexpr = (G + TILE_G - 1) // TILE_G
    g = tl.program_id(0) % blocks * TILE_G + tl.arange(0, TILE_G)
    token = tl.program_id(0) // blocks * TILE_T + tl.arange(0, TILE_T)
    mask = token < tokens
    total = tl.zeros((TILE_G, TILE_T), tl.float32)  # that way round for the reason given in `generate`
    across: tl.constexpr = (C + TILE_C - 1) // TILE_C
    for block in range(0, across * across):
        first_in, first_out = block // across * TILE_C, block % across * TILE_C
        grad = grad_channel_block(
            sampled_ptr, grad_mixed_ptr, token, mask, first_in, first_out, C, P, TILE_T, TILE_P, TILE_C, OPERAND, PRECISION
        )
        row, row_mask = channel_rows(first_in, first_out, C, TILE_C)
        weight = tl.load(weight_ptr + row[:, None] * G + g[None, :], mask=row_mask[:, None] & (g < G)[None, :], other=0.0)
        total = product(tl.trans(weight), tl.trans(grad), total, dtype, OPERAND, PRECISION)
    for first in range(0, O, TILE_O):
        grad = grad_point_block(
            grad_points_ptr, mixed_ptr, m_beta_ptr, token, mask, first,
            C, P, O, TILE_T, TILE_P, TILE_C, TILE_O, BETAS, OPERAND, PRECISION,
        )  # fmt: skip
        row, row_mask = point_rows(first, C, P, O, TILE_O, TILE_P)
        weight = tl.load(weight_ptr + row[:, None] * G + g[None, :], mask=row_mask[:, None] & (g < G)[None, :], other=0.0)
        total = product(tl.trans(weight), tl.trans(grad), total, dtype, OPERAND, PRECISION)
    at = token.to(tl.int64)[None, :] * G + g[:, None]
    tl.store(grad_hidden_ptr + at, total.to(grad_hidden_ptr.dtype.element_ty), mask=mask[None, :] & (g < G)[:, None])


@triton.jit
def weight_backward(
    sampled_ptr, grad_mixed_ptr, mixed_ptr, grad_points_ptr, hidden_ptr, m_beta_ptr, grad_weight_ptr, grad_bias_ptr, tokens, shares,
    C: tl.constexpr, P: tl.constexpr, O: tl.constexpr, G: tl.constexpr,  # noqa: E741
    TILE_T: tl.constexpr, TILE_P: tl.constexpr, TILE_C: tl.constexpr, TILE_O: tl.constexpr, TILE_G: tl.constexpr,
    POINTS: tl.constexpr, BETAS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of the generator's rows, TILE_G columns of it, from one of `shares` shares of the tokens.

    grad_weight (shares, C * C + O * P, G) and grad_bias (shares, C * C + O * P), float32, are added up over the shares afterwards.
    POINTS tells the blocks of the point matrix, program_id(0) of them, from those of the channel matrix.
    """
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    across: tl.constexpr = (C + TILE_C - 1) // TILE_C
    rows: tl.constexpr = TILE_O * TILE_P if POINTS else TILE_C * TILE_C
    block, share = tl.program_id(0), tl.program_id(2)
    first, first_in, first_out = block * TILE_O, block // across * TILE_C, block % across * TILE_C
    g = tl.program_id(1) * TILE_G + tl.arange(0, TILE_G)
    if POINTS:
        row, row_mask = point_rows(first, C, P, O, TILE_O, TILE_P)
    else:
        row, row_mask = channel_rows(first_in, first_out, C, TILE_C)
    total = tl.zeros((rows, TILE_G), tl.float32)
    bias = tl.zeros((rows,), tl.float32)
    for tile in range(share, tl.cdiv(tokens, TILE_T), shares):
        token = tile * TILE_T + tl.arange(0, TILE_T)
        mask = token < tokens
        if POINTS:
            grad = grad_point_block(
                grad_points_ptr, mixed_ptr, m_beta_ptr, token, mask, first,
                C, P, O, TILE_T, TILE_P, TILE_C, TILE_O, BETAS, OPERAND, PRECISION,
            )  # fmt: skip
        else:
            grad = grad_channel_block(
                sampled_ptr, grad_mixed_ptr, token, mask, first_in, first_out, C, P, TILE_T, TILE_P, TILE_C, OPERAND, PRECISION
            )
        hidden = tl.load(hidden_ptr + token.to(tl.int64)[:, None] * G + g[None, :], mask=mask[:, None] & (g < G)[None, :], other=0.0)
        total = product(tl.trans(grad), hidden, total, dtype, OPERAND, PRECISION)
        bias += tl.sum(grad, axis=0)
    row += share * (C * C + O * P)
    tl.store(grad_weight_ptr + row[:, None] * G + g[None, :], total, mask=row_mask[:, None] & (g < G)[None, :])
    if tl.program_id(1) == 0:
        tl.store(grad_bias_ptr + row, bias, mask=row_mask)
