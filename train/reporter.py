"""Where a pipeline's messages and progress go, so that Python and the command line run the same pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

LARGE_MIB = 50  # files of fewer are read without a progress bar


class Reporter:
    """Ignores everything; a subclass shows what it overrides (the command line's is `sparse_vlm.cli.progress.ConsoleReporter`)."""

    def message(self, text: str) -> None:
        """One line about what was done or found."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of texts."""

    def counting(self, label: str, unit: str, total: int, completed: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        """Progress of counted work: the `with` block calls what it is given with the number of units just finished."""
        return nullcontext(lambda count: None)

    def fetching(self) -> AbstractContextManager[Callable[[str, int, int], None]]:
        """Progress of downloads: the `with` block calls what it is given with (name, bytes or rows done, total or 0)."""
        return nullcontext(lambda what, done, total: None)

    @contextmanager
    def reading(self, files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
        """Progress of reading files, if they are large: the `with` block calls what it is given with the number of bytes just read."""
        total = sum(file.stat().st_size for file in files if file.is_file()) >> 20
        if total < LARGE_MIB:
            yield lambda size: None
            return
        with self.counting("reading", "MiB", total) as advance:
            read = 0

            def on_bytes(size: int) -> None:
                nonlocal read
                before, read = read >> 20, read + size
                if read >> 20 > before:
                    advance((read >> 20) - before)

            yield on_bytes
