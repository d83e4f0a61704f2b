"""Shared by the kernels: products, GELU, and reading a map between four cells.

Notable: Triton's interpreter multiplies bfloat16 as if it were integers, so products take operands of type OPERAND: the input dtype on a
GPU, float32 under the interpreter. In either case they are rounded to DTYPE first.
"""

import triton
import triton.language as tl


@triton.jit
def product(a, b, total, DTYPE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b, with operands rounded to DTYPE and a float32 total; in two or three dimensions."""
    return tl.dot(a.to(DTYPE).to(OPERAND), b.to(DTYPE).to(OPERAND), acc=total, input_precision=PRECISION)


@triton.jit
def gelu(x):
    """The exact GELU."""
    return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def axis(at, cells, BORDER: tl.constexpr):
    """Cells and weights of bilinear sampling along one axis.

    Clamping also catches NaN, so no address is out of bounds.

    Returns: the cell to the left (the first one where there is none), the step to the next one (0 or 1), the weights of both (0 where
    there is none), and the derivatives of both weights by the position in cells.
    """
    at = at * cells - 0.5
    low = 0.0 if BORDER else -2.0  # beyond -1 and `cells` all samples are zero
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
    """Channels of map cells as float32; `cell` has a last dimension of 1."""
    return tl.load(map_ptr + cell.to(tl.int64) * C + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def corners(points_ptr, at, mask, image, height, width, BORDER: tl.constexpr):
    """The four cells around each point.

    Args:
        at: index of its x, with a last dimension of 1; y is the next number.
        image: index of its map.

    Returns: the cell at its upper left; the steps to the next one across and down; the weights of left, right, above and below, and
    their derivatives by the position in cells.
    """
    x, across, left, right, d_left, d_right = axis(tl.load(points_ptr + at, mask=mask, other=0.0), width, BORDER)
    y, down, above, below, d_above, d_below = axis(tl.load(points_ptr + at + 1, mask=mask, other=0.0), height, BORDER)
    return (image * height + y) * width + x, across, down * width, left, right, above, below, d_left, d_right, d_above, d_below


@triton.jit
def read_between(map_ptr, cell, across, down, left, right, above, below, channel, mask, C: tl.constexpr):
    """Channels of the map at points, bilinearly, in float32; arguments as `corners` returns them."""
    sampled = read_cells(map_ptr, cell, channel, mask, C) * (above * left)
    sampled += read_cells(map_ptr, cell + across, channel, mask, C) * (above * right)
    sampled += read_cells(map_ptr, cell + down, channel, mask, C) * (below * left)
    sampled += read_cells(map_ptr, cell + down + across, channel, mask, C) * (below * right)
    return sampled
