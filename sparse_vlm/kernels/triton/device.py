"""What the kernels share: products, GELU, bilinear corners, and blocks of the generated parameters.

Shape legend: TILE_T tokens, TILE_P points (P and padding), TILE_C channels and TILE_O points after mixing of a block; G width of the
hidden vector. C x C and O x P are the two matrices that a token generates, row by row, as the generator's rows lie in memory.

Notable: Triton's interpreter multiplies bfloat16 as if it were integers, so products take operands of type OPERAND: that of the inputs on
a GPU, float32 under the interpreter, in either case after they were rounded to DTYPE.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, DTYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, with operands rounded to DTYPE and a float32 total; in two or three dimensions."""
    return tl.dot(a.to(DTYPE).to(OPERAND), b.to(DTYPE).to(OPERAND), acc=total, input_precision=PRECISION)


@triton.jit
def gelu(x):
    """x times the normal distribution's cumulative density, exactly."""
    return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def gelu_slope(x):
    """Derivative of `gelu`."""
    return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def axis(at, cells, BORDER: tl.constexpr):
    """What bilinear sampling reads along one axis.

    Clamping also catches what is not a number, so that no address is ever out of bounds.

    Returns: the cell to the left (the first one where there is none), how far the next one is (0 or 1), the weights of both (0 where
    there is none), and what both weights change by when the sample moves by one cell.
    """
    at = at * cells - 0.5
    low = 0.0 if BORDER else -2.0  # beyond -1 and `cells` zeros are read, however far
    high = cells - 1.0 if BORDER else cells + 1.0
    moves = (at > low) & (at < high)
    at = tl.minimum(tl.maximum(at, low), high)
    floor = tl.floor(at)
    near, far = 1 - (at - floor), at - floor
    cell = floor.to(tl.int32)
    has_near, has_far = (cell >= 0) & (cell < cells), (cell + 1 >= 0) & (cell + 1 < cells)
    left = tl.minimum(tl.maximum(cell, 0), cells - 1)
    step = (has_near & has_far).to(tl.int32)
    slope_near, slope_far = tl.where(moves & has_near, -1.0, 0.0), tl.where(moves & has_far, 1.0, 0.0)
    return left, step, tl.where(has_near, near, 0.0), tl.where(has_far, far, 0.0), slope_near, slope_far


@triton.jit
def read_cells(map_ptr, cell, channel, mask, C: tl.constexpr):
    """Channels of cells of the map as float32; `cell` has a last dimension of 1."""
    return tl.load(map_ptr + cell.to(tl.int64) * C + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def corners(points_ptr, at, mask, picture, height, width, BORDER: tl.constexpr):
    """The four cells between which each point lies.

    Args:
        at: where its x stands, with a last dimension of 1; y stands behind it.
        picture: which of the maps is its own.

    Returns: the cell at its upper left; how far the next one is across, and down; the weights of left, right, above and below, and what
    these change by when the point moves by one cell.
    """
    x, across, left, right, d_left, d_right = axis(tl.load(points_ptr + at, mask=mask, other=0.0), width, BORDER)
    y, down, above, below, d_above, d_below = axis(tl.load(points_ptr + at + 1, mask=mask, other=0.0), height, BORDER)
    return (picture * height + y) * width + x, across, down * width, left, right, above, below, d_left, d_right, d_above, d_below


@triton.jit
def read_between(map_ptr, cell, across, down, left, right, above, below, channel, mask, C: tl.constexpr):
    """Channels of the map at points that lie between four cells, bilinearly, in float32; arguments are those that `corners` gives."""
    sampled = read_cells(map_ptr, cell, channel, mask, C) * (above * left)
    sampled += read_cells(map_ptr, cell + across, channel, mask, C) * (above * right)
    sampled += read_cells(map_ptr, cell + down, channel, mask, C) * (below * left)
    sampled += read_cells(map_ptr, cell + down + across, channel, mask, C) * (below * right)
    return sampled


@triton.jit
def read_block(ptr, token, row, column, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of each token's matrix (T, ROWS, COLUMNS) as (TILE_T, rows, columns), zeros where masked."""
    at = token[:, None, None].to(tl.int64) * (ROWS * COLUMNS) + row[None, :, None] * COLUMNS + column[None, None, :]
    inside = mask[:, None, None] & (row < ROWS)[None, :, None] & (column < COLUMNS)[None, None, :]
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def write_block(ptr, value, token, row, column, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `read_block`."""
    at = token[:, None, None].to(tl.int64) * (ROWS * COLUMNS) + row[None, :, None] * COLUMNS + column[None, None, :]
    inside = mask[:, None, None] & (row < ROWS)[None, :, None] & (column < COLUMNS)[None, None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def channel_rows(first_in, first_out, C: tl.constexpr, TILE_C: tl.constexpr):
    """Generator rows of a block of the channel matrix, (TILE_C * TILE_C,), and which of them exist."""
    j = tl.arange(0, TILE_C * TILE_C)
    i, c = first_in + j // TILE_C, first_out + j % TILE_C
    return i * C + c, (i < C) & (c < C)


@triton.jit
def point_rows(first, C: tl.constexpr, P: tl.constexpr, O: tl.constexpr, TILE_O: tl.constexpr, TILE_P: tl.constexpr):  # noqa: E741
    """Generator rows of a block of the point matrix, (TILE_O * TILE_P,), and which of them exist."""
    j = tl.arange(0, TILE_O * TILE_P)
    o, p = first + j // TILE_P, j % TILE_P
    return C * C + o * P + p, (o < O) & (p < P)


@triton.jit
def generate(
    hidden_ptr, weight_ptr, bias_ptr, token, mask, row, row_mask,
    G: tl.constexpr, TILE_T: tl.constexpr, ROWS: tl.constexpr, TILE_G: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some parameters of some tokens: hidden @ weight[row].T + bias[row], (TILE_T, ROWS) float32, zeros where masked."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    made = tl.zeros((ROWS, TILE_T), tl.float32)  # rows first: Hopper's wide products need 64 of them, and tokens can be few
    for first in tl.static_range(0, G, TILE_G):
        g = first + tl.arange(0, TILE_G)
        hidden = tl.load(hidden_ptr + token.to(tl.int64)[:, None] * G + g[None, :], mask=mask[:, None] & (g < G)[None, :], other=0.0)
        weight = tl.load(weight_ptr + row[:, None] * G + g[None, :], mask=row_mask[:, None] & (g < G)[None, :], other=0.0)
        made = product(weight, tl.trans(hidden), made, dtype, OPERAND, PRECISION)
    made += tl.load(bias_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    return tl.trans(made)
