"""Milliseconds of one image, of all models of a run side by side.

Notable: machines are noisy, so models take turns, image by image, and the median counts. What is timed begins with pixels and ends with
the embedding; decoding and resizing are the same for all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from sparse_vlm.eval.embedders import Embedder

ROUNDS = 20
WARM_UP = 3


def milliseconds(embedders: Sequence[Embedder], image: Image.Image) -> dict[str, dict[str, Any]]:
    """For each model, by name: `median` of `ROUNDS` turns, and the quarters `low` and `high`.

    Args:
        image: what each model looks at, alone in its batch.
    """
    pixels = {embedder.name: embedder.pixels([image]) for embedder in embedders}
    taken: dict[str, list[float]] = {embedder.name: [] for embedder in embedders}
    for turn in range(WARM_UP + ROUNDS):
        for embedder in embedders:
            started = time.perf_counter()
            embedder.answer(pixels[embedder.name])  # on the CPU at its end, so a GPU is done by then
            if turn >= WARM_UP:
                taken[embedder.name].append(1000 * (time.perf_counter() - started))
    quarters = {name: statistics.quantiles(times, n=4) for name, times in taken.items()}
    return {name: {"median": q[1], "low": q[0], "high": q[2], "threads": torch.get_num_threads()} for name, q in quarters.items()}
