"""What commands print for people: consoles, and the progress of work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from sparse_vlm.errors import printable
from sparse_vlm.train.reporter import Reporter

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 30.0
# columns of stdout where no terminal is: tables keep their rows, and paths are not broken
UNBOUNDED = 240


def plain_console(**options: Any) -> Console:
    """A console that prints text literally: without markup, and with escape sequences made visible."""
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        def render_str(self, text: str, **given: Any) -> Text:
            return super().render_str(readable(text), **given)

    return PlainConsole(markup=False, emoji=False, highlight=False, **options)


def readable(text: str) -> str:
    """A text of several lines with what is not printable in it as escapes."""
    return "\n".join(printable(line) for line in text.split("\n"))


def for_people(quiet: bool = False) -> Console:
    """A console on stdout, as wide as the terminal that it is."""
    return plain_console(quiet=quiet, width=None if sys.stdout.isatty() else UNBOUNDED)


class ConsoleReporter(Reporter):
    """A reporter of training that prints to stdout, or to stderr; `quiet` for all processes but the first."""

    def __init__(self, quiet: bool = False, stderr: bool = False) -> None:
        self.console = plain_console(stderr=True, quiet=quiet, soft_wrap=True) if stderr else for_people(quiet)

    def message(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table

        table = Table(*columns, title=title, title_justify="left", box=None)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def counting(self, label: str, unit: str, total: int, completed: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        return counting(self.console, label, unit, total, completed)

    def fetching(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        return fetching(self.console)


@contextmanager
def showing(console: Console, unit: str = "", brief: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far work is: a bar with rate and remaining time in a terminal, elsewhere a line every `SECONDS_BETWEEN_LINES`.

    What is given to the `with` block is called with (what, units done, units in total or 0 where that is not known).

    Args:
        brief: of many pieces of work, those that are done leave no bar, and no line unless they took long.
    """
    if not console.is_terminal:
        yield _lines(console, unit, brief)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} " + f"{unit}/s")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=brief) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(printable(what), total=total or None, completed=done, rate=0.0)
            speed = next(task for task in bar.tasks if task.id == tasks[what]).speed or 0.0
            bar.update(tasks[what], completed=done, rate=speed, visible=not brief or done < total)

        yield tell


def _lines(console: Console, unit: str, brief: bool) -> Callable[[str, int, int], None]:
    current, first, before = "", 0, 0
    began = printed = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal current, first, before, began, printed
        now = time.monotonic()
        if what != current or done < before:  # two sets of photos can have one name
            current, first, began, printed = what, done, now, now
        before = done
        ended = done == total and not brief
        if done == first or (now - printed < SECONDS_BETWEEN_LINES and not ended):
            return
        printed = now
        speed = (done - first) / max(now - began, 1e-9)
        left = (total - done) / speed
        rest = f", {left:.0f} s left" if left < 120 else f", {left / 60:.0f} min left"
        far = f"{done}/{total}" if total else f"{done:,}"
        console.print(
            f"{printable(what)}: {far}{unit and ' '}{unit}, {speed:.1f} {unit}/s{rest if total else ''}", markup=False, soft_wrap=True
        )

    return tell


@contextmanager
def counting(console: Console, label: str, unit: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
    """Show the progress of one piece of work; what is given to the `with` block is called with the number of units just finished."""
    with showing(console, unit) as tell:
        done = completed
        tell(label, done, total)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            tell(label, done, total)

        yield advance


@contextmanager
def fetching(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show downloads; yields a callback for (name, bytes or rows done, total or 0)."""
    with showing(console) as tell:
        yield lambda what, done, total: tell(f"fetching {what}", done, total)
