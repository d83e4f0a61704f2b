"""`sparse-vlm report --bench bench.json --eval report.json --out DIR`: accuracy against cost, and one page on replacing a tower.

Notable: nothing is measured here; the files that `sparse-vlm bench` and `sparse-vlm eval` wrote are read, so that a page can be made
anywhere, without the models.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.errors import UserError, printable


def report(
    bench: Annotated[Path, typer.Option(help="The bench.json of `sparse-vlm bench`.")],
    out: Annotated[Path, typer.Option(help="A folder for report.html, and a plot of accuracy against cost for each task.")],
    eval: Annotated[
        list[Path] | None, typer.Option(help="A report.json of `sparse-vlm eval`; repeat it. Without one the page is of cost alone.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUALITY=COST", help="A model's name in --eval, and in --bench, where they differ: tiny-chat=tiny; repeat it."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The model in use, by either name; the one of most work to the first token unless given.")
    ] = None,
    candidate: Annotated[
        str | None, typer.Option(help="The model that would take its place; the one of least work to the first token unless given.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="TASK, or TASK/METRIC; repeat it. The first metric of each task unless given.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="A language model of the benchmark; its first unless given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the benchmark's first unless given.")] = None,
    batch: Annotated[int | None, typer.Option(help="Requests at once; the benchmark's first unless given.", min=1)] = None,
    answer_tokens: Annotated[int, typer.Option(help="Length of an answer.", min=1)] = 128,
) -> None:
    """Draw accuracy against cost, and write one page on what changes if a tower is replaced."""
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    from sparse_vlm.report.comparison import Subject
    from sparse_vlm.report.frontier import draw
    from sparse_vlm.report.notes import unmeasured, verdicts, warnings
    from sparse_vlm.report.page import render
    from sparse_vlm.report.quality import read_quality
    from sparse_vlm.report.records import choose_case, find_entry, make_entries, read_bench
    from sparse_vlm.utils.files import locked, write_text

    document = read_bench(bench)
    quality = read_quality(eval or [])
    case = choose_case(document, llm, dtype, batch, answer_tokens)
    entries = make_entries(document, case, quality, pair or [])
    if len(entries) < 2:
        raise UserError(f"{bench}: holds {entries[0].cost_name} alone in this case; measure a second model beside it to compare")
    by_work = sorted(entries, key=lambda entry: entry.request["macs"])
    now = find_entry(entries, "--baseline", baseline) if baseline else by_work[-1]
    then = find_entry(entries, "--candidate", candidate) if candidate else next(entry for entry in by_work if entry is not now)
    if now is then:
        raise UserError(f"--baseline and --candidate are both {now.name}; name two models")
    measures = quality.chosen(task or [])
    subject = Subject(document, case, quality, entries, now, then, measures, [path.name for path in (bench, *(eval or []))])
    setting = f"{subject.llm_name}, {case.dtype}, batch of {case.batch}"
    page = out / "report.html"
    with locked(out):
        write_text(page, render(subject))
        written = [page]
        for measure in subject.drawn:
            path = out / f"frontier.{re.sub(r'[^A-Za-z0-9.-]+', '-', measure.title)}.png"
            draw(entries, quality, measure, setting, path)
            written.append(path)
    sys.stdout.write(f"{then.name} in place of {now.name}: {setting}\n")
    for line in [*warnings(subject), *verdicts(subject)]:
        sys.stdout.write(f"* {line}\n")
    sys.stdout.write("not measured:\n")
    for line in unmeasured(subject):
        sys.stdout.write(f"* {line}\n")
    sys.stdout.write(printable(f"written: {', '.join(map(str, written))}") + "\n")
