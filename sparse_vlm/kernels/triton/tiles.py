"""How a look is cut into programs: tile sizes for a shape, a dtype and a device.

Shape legend: T tokens of all images, P sampling points, C channels, O points after mixing, g width of the generator's hidden vector.

Notable: this is all the tuning there is. Without gradients the sizes are the fastest of those that were timed on an H100 in bfloat16
(docs/kernels.md); the others follow from what fits a streaming multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_POINTS = 64  # a program holds all points of its tokens
MAX_CHANNELS = 128  # of the early convolution, whose programs make all of them


@dataclass(frozen=True)
class Tiles:
    """Sizes of the blocks that a program works on, powers of two.

    Attributes:
        tokens: tokens of a program (TILE_T).
        channels: channels of a block, of those read as well as of those written by channel mixing (TILE_C).
        out_points: points after mixing, of a block (TILE_O).
        points: P, padded (TILE_P).
        hidden: columns of the hidden vector that are multiplied at once (TILE_G).
        cells: of the map, or points, of a program of the gradient of sampling (TILE_N).
        warps: warps of a program.
        stages: loads in flight in a loop.
    """

    tokens: int
    channels: int
    out_points: int
    points: int
    hidden: int
    cells: int
    warps: int
    stages: int


def choose_tiles(tokens: int, points: int, channels: int, out_points: int, hidden: int, dtype: torch.dtype, cores: int | None) -> Tiles:
    """Tiles for T tokens of P points, C channels, O points after mixing and g hidden numbers.

    bfloat16 multiplies on tensor cores, whose products are at least 16 deep. float32 by default multiplies exactly, on the ordinary
    cores, and holds twice the bytes: smaller tiles. Triton's interpreter has no registers to spare, but takes its time for each program.

    Args:
        cores: multiprocessors of the GPU; None for the interpreter.
    """
    padded = max(16, _power_of_two(points))
    if cores is None:
        blocks = (max(16, min(32, _power_of_two(number))) for number in (channels, out_points, hidden))
        channels, out_points, hidden = blocks
        return Tiles(16, channels, out_points, padded, hidden, cells=256, warps=1, stages=1)
    half = dtype == torch.bfloat16
    deep, few = 16, (512 if half else 128) // padded
    # few tokens are spread over all multiprocessors rather than read the weights few times
    while few > 8 and (few // 2 >= tokens or -(-tokens // few) * -(-channels // deep) < cores):
        few //= 2
    return Tiles(
        tokens=max(8, few),
        channels=deep,
        out_points=deep,
        points=padded,
        hidden=min(64 if half and padded == 16 else 32, max(16, _power_of_two(hidden))),
        cells=16,
        warps=8,
        stages=1,
    )


@dataclass(frozen=True)
class MixingTiles:
    """Sizes of the blocks of a program that has one token: channels read at once (TILE_I) and written (TILE_C), O and P padded."""

    read: int
    channels: int
    out_points: int
    points: int
    warps: int


def choose_mixing_tiles(tokens: int, points: int, channels: int, out_points: int, cores: int | None) -> MixingTiles:
    """Tiles of `forward.mix_forward`; the arguments are those of `choose_tiles`."""
    padded, wide = max(16, _power_of_two(points)), max(16, _power_of_two(channels))
    block = 64 if padded == 16 else 32
    return MixingTiles(
        read=min(block, wide),
        channels=min(block, wide),
        out_points=max(16, _power_of_two(out_points)),
        points=padded,
        # more warps for many points, and where multiprocessors have no other tokens to turn to
        warps=4 if padded > 16 or (cores is not None and tokens < cores) else 2,
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()
