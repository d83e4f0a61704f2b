"""Progress of a Trainer run: a bar in a terminal, else a line every half minute; and a line for every evaluation."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainingArguments

from sparse_vlm.utils.devices import rank

SECONDS_BETWEEN_LINES = 30.0


class ProgressLine(TrainerCallback):
    """Replaces the Trainer's bar and printed dictionaries. Without a terminal, the first and the last loss have a line, too.

    Args:
        unit: what is counted.
        per_step: units a step.
    """

    def __init__(self, unit: str, per_step: int) -> None:
        self.unit, self.per_step = unit, per_step
        # the first process prints
        self.console = Console(file=sys.stderr, quiet=rank() > 0, markup=False)
        self.bar = Progress(
            TextColumn("{task.fields[loss]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Start where the run starts, which is not 0 when it was resumed."""
        total, done = state.max_steps * self.per_step, state.global_step * self.per_step
        self.task = self.bar.add_task("", total=total, completed=done, loss="", rate="")
        self.began = self.last_line = time.monotonic()
        self.first, self.loss = done, ""
        if self.console.is_terminal:
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        now, done, total = time.monotonic(), state.global_step * self.per_step, state.max_steps * self.per_step
        speed = (done - self.first) / max(now - self.began, 1e-9)
        self.bar.update(self.task, completed=done, rate=f"{speed:.1f} {self.unit}/s")
        if not self.console.is_terminal and now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            self._line(done, total, f"{speed:.1f} {self.unit}/s", f"{(total - done) / speed / 60:.0f} min left", self.loss)

    def _line(self, done: int, total: int, *parts: str) -> None:
        self.console.print(", ".join(part for part in (f"{done}/{total} {self.unit}", *parts) if part), highlight=False)

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The loss stands beside the bar; an evaluation gets a line that stays."""
        logs = logs or {}
        if "loss" in logs and self.bar.tasks:
            previous, self.loss = self.loss, f"loss {float(logs['loss']):.3f}"
            self.bar.update(self.task, loss=self.loss)
            if not previous and not self.console.is_terminal:  # a short run has ended before a line is due
                self._line(state.global_step * self.per_step, state.max_steps * self.per_step, self.loss)
        measured = {k.removeprefix("eval_"): v for k, v in logs.items() if k.startswith("eval_")}
        if measured:
            values = ", ".join(f"{key} {value:.4f}" for key, value in measured.items())
            self.console.print(f"after {state.global_step * self.per_step} {self.unit}: {values}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen, or a last line."""
        if self.console.is_terminal:
            self.bar.stop()
        else:
            self._line(state.global_step * self.per_step, state.max_steps * self.per_step, self.loss)
