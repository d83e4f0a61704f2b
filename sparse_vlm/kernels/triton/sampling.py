"""Bilinear sampling, and its gradients of the feature map and of the points.

Shape legend: T tokens of all images, P points a token, C channels, B x H x W cells of all maps.

Notable: no atomics. The host sorts the points (stably) by the cell at their upper left. The points that read a cell are then two runs of
the sorted list and are summed in its order, so the gradients are bitwise reproducible.
"""

import triton
import triton.language as tl

from sparse_vlm.kernels.triton.device import corners, read_between, read_cells


@triton.jit
def coordinate(at, cells, BORDER: tl.constexpr):
    """A relative coordinate in cells, clamped as in `device.axis`."""
    low = 0.0 if BORDER else -2.0
    high = cells - 1.0 if BORDER else cells + 1.0
    return tl.minimum(tl.maximum(at * cells - 0.5, low), high)


@triton.jit
def sample_forward(
    map_ptr, points_ptr, out_ptr, points, per_image, height, width,
    C: tl.constexpr, TILE_N: tl.constexpr, TILE_C: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """Map (B, H, W, C) at points (T * P, 2) to out (T * P, C), for TILE_N points and TILE_C channels.

    Args:
        points: T * P.
        per_image: points of one image.
    """
    point = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)[None, :]
    here = (point < points)[:, None]
    at = point.to(tl.int64)[:, None] * 2
    image = (point // per_image)[:, None]
    cell, across, down, left, right, above, below, _, _, _, _ = corners(points_ptr, at, here, image, height, width, BORDER)
    valid = here & (c < C)
    sampled = read_between(map_ptr, cell, across, down, left, right, above, below, c, valid, C)
    tl.store(out_ptr + point.to(tl.int64)[:, None] * C + c, sampled.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def map_backward(
    grad_sampled_ptr, points_ptr, order_ptr, starts_ptr, grad_map_ptr, cells, height, width,
    C: tl.constexpr, TILE_N: tl.constexpr, TILE_C: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """grad_sampled (T * P, C) to grad_map (B, H, W, C), for TILE_N cells.

    Args:
        order: indices of the points, sorted by bin.
        starts: where each bin starts in `order`. Bins are (B, H + 1, W + 1), with those of points left of the map and above it.
    """
    cell = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    c = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    mask = cell < cells
    x, y, image = cell % width, cell // width % height, cell // (width * height)
    total = tl.zeros((TILE_N, TILE_C), tl.float32)
    for row in tl.static_range(2):
        # the cell is the lower or the upper neighbour of points of this row of bins, and the right or the left one
        first = (image * (height + 1) + y + row) * (width + 1) + x
        start = tl.load(starts_ptr + first, mask=mask, other=0)
        count = tl.load(starts_ptr + first + 2, mask=mask, other=0) - start
        for k in range(0, tl.max(count, axis=0)):
            valid = mask & (k < count)
            point = tl.load(order_ptr + start + k, mask=valid, other=0).to(tl.int64)
            at_x = coordinate(tl.load(points_ptr + point * 2, mask=valid, other=0.0), width, BORDER)
            at_y = coordinate(tl.load(points_ptr + point * 2 + 1, mask=valid, other=0.0), height, BORDER)
            # a tent around the cell: the result does not depend on the bin that rounding chose for a point between two
            weight = tl.maximum(1 - tl.abs(at_x - x), 0.0) * tl.maximum(1 - tl.abs(at_y - y), 0.0)
            inside = valid[:, None] & (c < C)[None, :]
            grad = tl.load(grad_sampled_ptr + point[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            total += weight[:, None] * grad
    at = cell.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(grad_map_ptr + at, total.to(grad_map_ptr.dtype.element_ty), mask=mask[:, None] & (c < C)[None, :])


@triton.jit
def coordinates_backward(
    grad_sampled_ptr, map_ptr, points_ptr, grad_at_ptr, points, per_image, height, width,
    C: tl.constexpr, TILE_N: tl.constexpr, TILE_C: tl.constexpr, BORDER: tl.constexpr,
):  # fmt: skip
    """grad_sampled (T * P, C) to the gradient of the points (T * P, 2), for TILE_N of them.

    Args:
        points: T * P.
        per_image: points of one image.
    """
    point = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    mask = point < points
    here = mask[:, None]
    at = point.to(tl.int64)[:, None] * 2
    image = (point // per_image)[:, None]
    cell, across, down, left, right, above, below, d_left, d_right, d_above, d_below = corners(
        points_ptr, at, here, image, height, width, BORDER
    )
    grad_x = tl.zeros((TILE_N,), tl.float32)
    grad_y = tl.zeros((TILE_N,), tl.float32)
    for first in range(0, C, TILE_C):
        c = first + tl.arange(0, TILE_C)[None, :]
        valid = here & (c < C)
        grad = tl.load(grad_sampled_ptr + point.to(tl.int64)[:, None] * C + c, mask=valid, other=0.0).to(tl.float32)
        upper_left, upper_right = read_cells(map_ptr, cell, c, valid, C), read_cells(map_ptr, cell + across, c, valid, C)
        lower_left, lower_right = read_cells(map_ptr, cell + down, c, valid, C), read_cells(map_ptr, cell + down + across, c, valid, C)
        by_x = d_left * (above * upper_left + below * lower_left) + d_right * (above * upper_right + below * lower_right)
        by_y = d_above * (left * upper_left + right * upper_right) + d_below * (left * lower_left + right * lower_right)
        grad_x += tl.sum(grad * by_x, axis=1)
        grad_y += tl.sum(grad * by_y, axis=1)
    tl.store(grad_at_ptr + point.to(tl.int64) * 2, grad_x * width, mask=mask)
    tl.store(grad_at_ptr + point.to(tl.int64) * 2 + 1, grad_y * height, mask=mask)
