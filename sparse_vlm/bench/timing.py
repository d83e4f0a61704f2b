"""Interleaved timing: one call of each, then the next of each, so that other load on the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparse_vlm.bench.machine import synchronize
from sparse_vlm.tower.cost import Work

WARM_UP = 2
MIN_REPEATS = 3  # calls below which a median is none


@dataclass
class TimedCall:
    """A call to be timed.

    Attributes:
        stage, model, llm, batch, tokens: what it is of; `tokens` are those that the LLM is given of each image.
        steps: (call, factor) in order: each is given what the one before returned, and its time counts so many times.
        work: MACs and numbers moved, for one image or request.
        compiled: whether the tower was.
        prepare: called before each turn, out of its time; its result is given to the first step.
        expected_s: a guess at a turn's seconds, to tell what remains.
        beyond_bytes: what the layers that are not there would add to the peak of memory.
        seconds: of each turn.
        peak_bytes: most memory held at once in a turn, where it was measured.
    """

    stage: str
    steps: Sequence[tuple[Callable[[Any], Any], float]]
    model: str | None = None
    llm: str | None = None
    batch: int = 1
    tokens: int | None = None
    work: Work | None = None
    compiled: bool = False
    prepare: Callable[[], Any] = lambda: None
    expected_s: float = 0.0
    beyond_bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def run(self, device: torch.device) -> float:
        """One turn; its seconds."""
        state, total = self.prepare(), 0.0
        for call, factor in self.steps:
            synchronize(device)
            began = time.perf_counter()
            state = call(state)
            synchronize(device)
            total += factor * (time.perf_counter() - began)
        return total

    def once(self) -> None:
        """One turn that is not timed."""
        state = self.prepare()
        for call, _ in self.steps:
            state = call(state)

    @property
    def finished(self) -> bool:
        """Whether there are enough turns for a median."""
        return len(self.seconds) >= MIN_REPEATS

    def quartiles(self) -> dict[str, float]:
        """Median and quartiles of the turns, in milliseconds."""
        low, median, high = (1000 * q for q in statistics.quantiles(self.seconds, n=4))
        return {"median": median, "low": low, "high": high}


def take_turns(
    pieces: Sequence[TimedCall],
    device: torch.device,
    rounds: int,
    limit_s: float,
    on_turn: Callable[[TimedCall], None] = lambda call: None,
) -> None:
    """Time pieces in turn, after `WARM_UP` turns that do not count; each piece keeps its seconds.

    Args:
        rounds: turns of each piece, `MIN_REPEATS` at least.
        limit_s: a piece that has taken so many seconds takes no more turns once it has `MIN_REPEATS`.
        on_turn: told after each turn which piece had it, also where the piece was spared it.
    """
    spent = dict.fromkeys(map(id, pieces), 0.0)
    for turn in range(WARM_UP + rounds):
        for piece in pieces:
            spared = spent[id(piece)] > limit_s and (piece.finished or 1 <= turn < WARM_UP)
            if not spared:
                began = time.perf_counter()
                seconds = piece.run(device)
                spent[id(piece)] += time.perf_counter() - began
                if turn >= WARM_UP:
                    piece.seconds.append(seconds)
            on_turn(piece)
