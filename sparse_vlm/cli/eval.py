"""`sparse-vlm eval --model tiny --teacher local-dir:TEACHER --tasks imagenet,cosine --data DATA`: measure models beside each other.

Notable: stdout holds the table, or with `--json -` the JSON document alone; progress goes to stderr, as a bar in a terminal and as a line
every half minute elsewhere.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.cli.progress import for_people, plain_console, showing
from sparse_vlm.errors import UserError

TASK_NAMES = (
    "imagenet, cifar10, flickr8k, coco, cosine, knn, probe, zoom, small-objects, rendered-words, sugarcrepe, valse for towers; "
    "captions, pope, pope-words, pope-coco, aokvqa, aokvqa-direct, aokvqa-val, aokvqa-val-direct, existence, counting, vsr, "
    "sugarcrepe-captions, valse-captions, vqav2, gqa, textvqa, scienceqa, mmbench, mmvet for VLMs"
)


def eval(
    data: Annotated[Path, typer.Option(help="The folder that holds eval/ and train/, and benchmarks (docs/evaluation.md).")],
    tasks: Annotated[str, typer.Option(help=f"Comma-separated: {TASK_NAMES}.")],
    model: Annotated[list[str] | None, typer.Option(help="A tower (or, for VLM tasks, a VLM): folder or zoo name; repeatable.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Also measured: local-dir:PATH, hf-hub:ORG/NAME or MODEL@TAG of open_clip.")] = None,
    text: Annotated[str | None, typer.Option(help="The text side: folder or zoo name; the teacher's own by default.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="VLMs: none, no-image, wrong-image; all by default. Towers: none, no-looks, crop; with a focus: grid, random, teacher."
        ),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Token budget, for models that serve several; repeatable.", min=1)] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of photos a set.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON; - is stdout.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for the report, tables in Markdown and all predictions, written after each task.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
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
    from sparse_vlm.eval import EvalConfig, evaluate
    from sparse_vlm.eval.report import as_json, as_tables, save
    from sparse_vlm.teachers.load import check_teacher
    from sparse_vlm.utils.devices import set_cpu_threads
    from sparse_vlm.utils.files import locked, write_json

    if teacher is not None:
        check_teacher(teacher)
    set_cpu_threads(threads)
    with nullcontext() if out is None else locked(out), showing(plain_console(stderr=True), brief=True) as progress:
        keep = (lambda report: None) if out is None else (lambda report: save(report, out))
        report = evaluate(EvalConfig(model or [], names, data, teacher, text, control or [], limit, tokens or []), progress, keep)
    if json_file is not None:
        write_json(json_file, as_json(report))
    if json_file == "-":
        return
    console = for_people()
    for table in as_tables(report):
        console.print(table)
