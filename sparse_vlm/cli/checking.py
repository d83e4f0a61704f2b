"""`sparse-vlm train --check`: what is wrong with a data set, and how long its samples are, as a page for people or one JSON document.

Notable: stdout holds the report alone; progress goes to stderr.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sparse_vlm.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from sparse_vlm.data.check import Problem, Report
    from sparse_vlm.train.finetuning import SFTConfig

SHOWN = 5  # cases of each kind
BAR = 40  # characters


def print_check(config: SFTConfig, as_json: bool) -> int:
    """Check the data of a run and print the report.

    Returns:
        The exit code: 0 where nothing is wrong, 1 where something is.

    Raises:
        UserError: data, tower or LLM that cannot be read at all.
    """
    from rich.console import Console

    from sparse_vlm.cli.progress import ConsoleReporter
    from sparse_vlm.train.finetuning import check_data

    report = check_data(config, ConsoleReporter(stderr=True))
    if as_json:
        print("\n".join(map(printable, json.dumps(report.document(), ensure_ascii=False, indent=1).split("\n"))))
    else:
        _print(Console(highlight=False, soft_wrap=True), report)
    return int(bool(report.problems))


def _print(console: Console, report: Report) -> None:
    from rich.table import Table

    from sparse_vlm.data.check import KINDS, NOTES, PERCENTILES, histogram_of, summary

    console.print(
        f"data: {report.samples:,} samples ({report.text_only:,} of text alone, {report.several_images:,} of several images), "
        f"{report.conversations:,} conversations, {report.images:,} images"
    )
    if report.problems:
        samples = len({problem.sample for problem in report.problems})
        console.print(f"\n{len(report.problems):,} problems, in {samples:,} samples:")
        _print_grouped(console, report.problems, KINDS)
    else:
        console.print("no problems")
    if report.notes:
        console.print("\nworth knowing:")
        _print_grouped(console, report.notes, NOTES)

    lengths = report.lengths
    if not len(lengths["all"]):
        return
    columns = ("min", *(f"{p} %" for p in PERCENTILES), "max", "mean", "sum")
    table = Table(box=None)
    table.add_column("tokens")
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in lengths.items():
        row = summary(values)
        table.add_row(name, *(f"{row[column]:,.{int(column == 'mean')}f}" for column in columns))
    console.print()
    console.print(table)
    reads = "" if report.context is None else f"; the LLM reads {report.context:,}"
    console.print(f"\nsamples by their tokens{reads}:")
    bins = histogram_of(lengths["all"])
    most = max(count for *_, count in bins)
    width = len(f"{bins[-1][1]:,}")
    for low, high, count in bins:
        bar = "#" * max(int(count > 0), round(BAR * count / most))
        console.print(f"  {low:>{width},} - {high:>{width},}  {bar:<{BAR}}  {count:,}")


def _print_grouped(console: Console, problems: list[Problem], kinds: dict[str, str]) -> None:
    """By kind, with counts, what to do, and the first few."""
    for kind, advice in kinds.items():
        found = [problem for problem in problems if problem.kind == kind]
        if found:
            console.print(f"\n  {kind}: {len(found):,}; {advice}", markup=False)
            for problem in found[:SHOWN]:
                console.print(printable(f"    {problem.sample}: {problem.text}"), markup=False)
            if len(found) > SHOWN:
                console.print(f"    and {len(found) - SHOWN:,} more; --json lists all")
