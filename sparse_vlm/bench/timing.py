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
MIN_REPEATS = 3  # for a median


@dataclass
class TimedCall:
    """A call to time.

    Attributes:
        stage, model, llm, batch, tokens: what is timed; `tokens` is the number of tokens per image in the LLM.
        steps: (function, factor) in order; each takes the result of the one before, and its time is multiplied by the factor.
        work: MACs and numbers moved, for one image or request.
        compiled: whether the tower is compiled.
        prepare: called before each repetition and not timed; its result goes to the first step.
        expected_s: estimated seconds of a repetition, for progress.
        beyond_bytes: peak memory that layers which are not loaded would add.
        seconds: of each repetition.
        peak_bytes: peak memory of a repetition, if measured.
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
        """Run once; the seconds that it took."""
        state, total = self.prepare(), 0.0
        for step, factor in self.steps:
            synchronize(device)
            began = time.perf_counter()
            state = step(state)
            synchronize(device)
            total += factor * (time.perf_counter() - began)
        return total

    def once(self) -> None:
        """Run once without timing."""
        state = self.prepare()
        for step, _ in self.steps:
            state = step(state)

    @property
    def finished(self) -> bool:
        """Whether there are enough repetitions for a median."""
        return len(self.seconds) >= MIN_REPEATS

    def quartiles(self) -> dict[str, float]:
        """Median and quartiles in milliseconds."""
        low, median, high = (1000 * q for q in statistics.quantiles(self.seconds, n=4))
        return {"median": median, "low": low, "high": high}


def time_interleaved(
    calls: Sequence[TimedCall],
    device: torch.device,
    rounds: int,
    limit_s: float,
    on_call: Callable[[TimedCall], None] = lambda call: None,
) -> None:
    """Time calls interleaved, after `WARM_UP` rounds; each keeps its seconds.

    Args:
        rounds: repetitions of each call, at least `MIN_REPEATS`.
        limit_s: a call that has taken this many seconds is not repeated beyond `MIN_REPEATS`.
        on_call: called with each call in each round, also if it was skipped.
    """
    spent = dict.fromkeys(map(id, calls), 0.0)
    for repetition in range(WARM_UP + rounds):
        for call in calls:
            skipped = spent[id(call)] > limit_s and (call.finished or 1 <= repetition < WARM_UP)
            if not skipped:
                began = time.perf_counter()
                seconds = call.run(device)
                spent[id(call)] += time.perf_counter() - began
                if repetition >= WARM_UP:
                    call.seconds.append(seconds)
            on_call(call)
