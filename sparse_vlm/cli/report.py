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
        list[Path] | None, typer.Option(help="A report.json of `sparse-vlm eval`; repeatable. Without one the page covers cost only.")
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="QUALITY=COST", help="A model's name in --eval, and in --bench, where they differ: tiny-chat=tiny; repeatable."
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The model in use, by either name; by default the one with most work to the first token.")
    ] = None,
    candidate: Annotated[
        str | None, typer.Option(help="The model that would take its place; by default the one with least work to the first token.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="TASK, or TASK/METRIC; repeatable. The first metric of each task by default.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="A language model of the benchmark; its first by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; the benchmark's first by default.")] = None,
    batch: Annotated[int | None, typer.Option(help="Batch size; the benchmark's first by default.", min=1)] = None,
    answer_tokens: Annotated[int, typer.Option(help="Length of an answer in tokens.", min=1)] = 128,
) -> None:
    """Draw accuracy against cost, and write one page on what changes if a tower is replaced."""
    if out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    from sparse_vlm.report.comparison import Comparison
    from sparse_vlm.report.frontier import draw
    from sparse_vlm.report.notes import notes
    from sparse_vlm.report.page import render
    from sparse_vlm.report.quality import read_quality
    from sparse_vlm.report.records import choose_scenario, find_record, make_records, read_bench
    from sparse_vlm.utils.files import locked, write_text

    document = read_bench(bench)
    quality = read_quality(eval or [])
    scenario = choose_scenario(document, llm, dtype, batch, answer_tokens)
    records = make_records(document, scenario, quality, pair or [])
    if len(records) < 2:
        raise UserError(f"{bench}: holds {records[0].cost_name} alone in this scenario; measure a second model beside it to compare")
    by_work = sorted(records, key=lambda record: record.request["macs"])
    now = find_record(records, "--baseline", baseline) if baseline else by_work[-1]
    then = find_record(records, "--candidate", candidate) if candidate else next(record for record in by_work if record is not now)
    if now is then:
        raise UserError(f"--baseline and --candidate are both {now.name}; name two models")
    measures = quality.chosen(task or [])
    comparison = Comparison(document, scenario, quality, records, now, then, measures, [path.name for path in (bench, *(eval or []))])
    setting = f"{comparison.llm_name}, {scenario.dtype}, batch of {scenario.batch}"
    page = out / "report.html"
    with locked(out):
        write_text(page, render(comparison))
        written = [page]
        for measure in comparison.drawn:
            path = out / f"frontier.{re.sub(r'[^A-Za-z0-9.-]+', '-', measure.title)}.png"
            draw(records, quality, measure, setting, path)
            written.append(path)
    sys.stdout.write(f"{then.name} in place of {now.name}: {setting}\n")
    for line in [*notes(comparison, "warnings"), *notes(comparison, "verdicts")]:
        sys.stdout.write(f"* {line}\n")
    sys.stdout.write("not measured:\n")
    for line in notes(comparison, "unmeasured"):
        sys.stdout.write(f"* {line}\n")
    sys.stdout.write(printable(f"written: {', '.join(map(str, written))}") + "\n")
