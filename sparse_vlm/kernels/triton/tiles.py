"""Tile sizes and limits of the kernels. Importable without triton.

Shape legend: P sampling points, C channels, O points after mixing.

Notable: the sizes are the fastest of those that were timed on an H100 in bfloat16 (lab/kernels.md).
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_POINTS = 64  # a program holds all points of its token
MAX_CHANNELS = 128  # of the early convolution, whose programs compute all channels


@dataclass(frozen=True)
class MixingTiles:
    """Block sizes of a program of `mixing.sample_and_mix`: channels read at once (TILE_I) and written (TILE_C), O and P padded."""

    read: int
    channels: int
    out_points: int
    points: int
    warps: int


def choose_mixing_tiles(tokens: int, points: int, channels: int, out_points: int, cores: int | None) -> MixingTiles:
    """Tiles for tokens of all images, P points, C channels and O points after mixing.

    Args:
        cores: multiprocessors of the GPU; None for the interpreter.
    """
    padded, wide = max(16, _power_of_two(points)), max(16, _power_of_two(channels))
    block = 64 if padded == 16 else 32
    return MixingTiles(
        read=min(block, wide),
        channels=min(block, wide),
        out_points=max(16, _power_of_two(out_points)),
        points=padded,
        # more warps for many points, and where there are fewer tokens than multiprocessors
        warps=4 if padded > 16 or (cores is not None and tokens < cores) else 2,
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least this."""
    return 1 << max(0, number - 1).bit_length()
