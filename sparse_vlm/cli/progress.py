"""A bar with rate and remaining time for work that is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def counting(console: Console, label: str, unit: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar; what is given to the `with` block is called with the number of units just finished."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} " + f"{unit}/s")
    with Progress(TextColumn(label), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=total, completed=completed, rate=0.0)

        def advance(count: int) -> None:
            progress.update(task, advance=count, rate=progress.tasks[0].speed or 0.0)

        yield advance
