"""A bar with rate and remaining time for work that is counted; where no terminal is, a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_vlm.errors import UserError, printable

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 30.0
LARGE_MIB = 50
# columns of stdout where no terminal is: tables keep their rows, and paths are not broken
UNBOUNDED = 240


def plain_console(**options: Any) -> Console:
    """A console that shows texts as they are: a bracket in a path is no markup, and an escape sequence in a name is shown, not obeyed."""
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


class ConsoleReporter:
    """A `sparse_vlm.train.Reporter` that prints to stdout; `quiet` for all processes but the first."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = for_people(quiet)

    def message(self, text: str) -> None:
        self.console.print(text)

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


def check_teacher(name: str) -> None:
    """Make sure that a teacher's name says by which library it is read.

    Raises:
        UserError: it is the path of a folder or a file, and nothing more; the line says what to write.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise UserError(f"--teacher {name}: is a file; a checkpoint of timm's is timm:NAME@{name}, and other teachers are folders")
    if path.is_dir():
        ways = {"open_clip_config.json": f"local-dir:{name}", "config.json": f"transformers:{name}"}
        fitting = [way for file, way in ways.items() if (path / file).is_file()] or list(ways.values())
        raise UserError(f"--teacher {name}: is a folder; write {' or '.join(fitting)}, by the library that reads it")


@contextmanager
def counting(console: Console, label: str, unit: str, total: int, completed: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress; what is given to the `with` block is called with the number of units just finished."""
    if not console.is_terminal:
        yield _lines(console, label, unit, total, completed)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]:.1f} " + f"{unit}/s")
    columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=completed, rate=0.0)

        def advance(count: int) -> None:
            progress.update(task, advance=count, rate=progress.tasks[0].speed or 0.0)

        yield advance


@contextmanager
def reading(console: Console, files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """Show how far some files are read, where they are large; what is given to the `with` block is called with bytes just read."""
    total = sum(file.stat().st_size for file in files if file.is_file()) >> 20
    if total < LARGE_MIB:
        yield lambda size: None
        return
    with counting(console, "reading", "MiB", total) as advance:
        read = 0

        def count(size: int) -> None:
            nonlocal read
            before, read = read >> 20, read + size
            if read >> 20 > before:
                advance((read >> 20) - before)

        yield count


def _lines(console: Console, label: str, unit: str, total: int, completed: int) -> Callable[[int], None]:
    began = said = time.monotonic()
    done = completed

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said < SECONDS_BETWEEN_LINES and done < total:
            return
        said = now
        speed = (done - completed) / max(now - began, 1e-9)
        console.print(f"{label}: {done}/{total} {unit}, {speed:.1f} {unit}/s, {(total - done) / speed / 60:.0f} min left")

    return advance


@contextmanager
def fetching(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show what is fetched; the `with` block's callback is told (what, bytes or rows done, in total or 0)."""
    if not console.is_terminal:
        yield _fetched_lines(console)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,}"),
        TimeRemainingColumn(),
        console=console,
    ) as bar:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"fetching {printable(what)}", total=total or None)
            bar.update(tasks[what], completed=done)

        yield tell


def _fetched_lines(console: Console) -> Callable[[str, int, int], None]:
    said = time.monotonic()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES or done == total:
            said = now
            console.print(f"fetching {what}: {done:,}" + (f" of {total:,}" if total else ""), highlight=False)

    return tell
