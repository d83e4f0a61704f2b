"""`sparse-vlm eval --model tiny --teacher local-dir:TEACHER --tasks imagenet,cosine --data DATA`: measure models beside each other.

Notable: stdout holds the table, or with `--json -` the JSON document alone; progress goes to stderr, as a bar in a terminal and as a line
every ten seconds elsewhere.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from sparse_vlm.cli.progress import check_teacher, for_people
from sparse_vlm.errors import UserError, printable

LINE_EVERY_S = 10.0
TASK_NAMES = (
    "imagenet, cifar10, flickr8k, coco, cosine, knn, probe, zoom, small-objects, rendered-words, sugarcrepe, valse for towers; "
    "captions, pope, pope-words, pope-coco, aokvqa, aokvqa-direct, aokvqa-val, aokvqa-val-direct, existence, counting, vsr, "
    "sugarcrepe-captions, valse-captions, vqav2, gqa, textvqa, scienceqa, mmbench, mmvet for VLMs"
)


def eval(
    data: Annotated[Path, typer.Option(help="The folder that holds eval/ and train/, and benchmarks (docs/evaluation.md).")],
    tasks: Annotated[str, typer.Option(help=f"Comma-separated: {TASK_NAMES}.")],
    model: Annotated[list[str] | None, typer.Option(help="A tower (or, for tasks in words, a VLM): folder or zoo name; repeat it.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Measured too: local-dir:PATH, hf-hub:ORG/NAME or MODEL@TAG of open_clip.")] = None,
    text: Annotated[str | None, typer.Option(help="The text side: folder or zoo name; the teacher's own unless given.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="VLMs: none, no-image, wrong-image, all unless given. Towers: none, no-looks, crop; with a focus: grid, random, teacher."
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens an image, for models that serve several budgets; repeat it.", min=1)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many photos a set.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is stdout.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for report, table in Markdown and every prediction, filled as tasks are done.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.")] = None,
) -> None:
    """Measure towers beside their teacher, or vision-language models beside their controls."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads is {threads}; it must be at least 1")
    if out is not None and out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if json_file is not None and Path(json_file).is_dir():
        raise UserError(f"--json {json_file}: is a folder; name a file")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UserError("--tasks is empty; name at least one task")
    if teacher is not None:
        check_teacher(teacher)
    from sparse_vlm.eval.report import as_json, as_tables, save
    from sparse_vlm.eval.run import evaluate
    from sparse_vlm.utils.devices import set_cpu_threads
    from sparse_vlm.utils.files import locked, write_json

    set_cpu_threads(threads)
    progress = _Bar() if sys.stderr.isatty() else _Lines()
    with nullcontext() if out is None else locked(out), progress:
        keep = (lambda report: None) if out is None else (lambda report: save(report, out))
        report = evaluate(model or [], names, data, teacher, text, control, limit, progress, tokens or [], keep)
    if json_file is not None:
        write_json(json_file, as_json(report))
    if json_file == "-":
        return
    console = for_people()
    for table in as_tables(report):
        console.print(table)


class _Rate(ProgressColumn):
    """Photos or answers a second."""

    def render(self, task: object) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


class _Bar:
    """Progress for a person at a terminal: one bar for what is being done now, with its rate and the time it still needs."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(printable(what), total=total)
        self._progress.update(self._tasks[what], completed=done, visible=done < total)


class _Lines:
    """Progress for a log: a line when something takes longer than `LINE_EVERY_S`, and every so often from then on."""

    def __init__(self) -> None:
        self._what, self._done = "", 0
        self._started = self._last = 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or done < self._done:  # two sets can lie in one file
            self._what, self._started, self._last = what, now, now
        self._done = done
        if now - self._last < LINE_EVERY_S or not done:
            return
        self._last = now
        rate = done / (now - self._started)
        print(f"{printable(what)}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left", file=sys.stderr, flush=True)
