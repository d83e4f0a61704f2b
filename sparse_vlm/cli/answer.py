"""`sparse-vlm answer --images 'photos/*.tar' --out captions.jsonl`: one answer for each of many images, or of many questions.

Notable: what is printed for people goes to stderr, except for the summary; the answers are in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.vlm.batch import QUESTION

FAILED_SHOWN = 10


def answer(
    out: Annotated[Path, typer.Option(help="File of the answers, .jsonl or .csv; a run that was stopped continues in it.")],
    images: Annotated[list[str] | None, typer.Option(help="An image, folder, glob pattern or tar; repeat it.")] = None,
    questions: Annotated[Path | None, typer.Option(help='JSONL of {"image": path, "question": text}, instead of --images.')] = None,
    question: Annotated[str, typer.Option(help="Asked about each of --images.")] = QUESTION,
    model: Annotated[str, typer.Option(help="A VLM: a folder or a name of the model zoo.")] = "tiny-chat",
    tokens: Annotated[int | None, typer.Option(help="Token budget, for a model that serves several.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Images answered together.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of an answer.", min=1)] = 64,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.", min=1)] = None,
) -> None:
    """Answer questions about many images.

    Give the same command again to continue an interrupted run.
    """
    from sparse_vlm.cli.progress import plain_console, showing
    from sparse_vlm.utils.devices import set_cpu_threads
    from sparse_vlm.vlm.batch import AnswerConfig
    from sparse_vlm.vlm.batch import answer as answer_all

    set_cpu_threads(threads)
    config = AnswerConfig(out, images or (), questions, question, model, tokens, batch_size, max_new_tokens)
    console = plain_console(stderr=True)
    with showing(console, "images") as tell:
        done = total = 0

        def start(kept: int, rows: int) -> None:
            nonlocal done, total
            done, total = kept, rows
            if kept:
                console.print(f"{out}: continuing after {kept} of {rows} answers")
            tell("answers", done, total)

        def advance(rows: int) -> None:
            nonlocal done
            done += rows
            tell("answers", done, total)

        result = answer_all(config, start, advance)
    for row in result.failed[:FAILED_SHOWN]:
        named = row["error"].startswith(row["image"])
        console.print(row["error"] if named else f"{row['image']}: {row['error']}", soft_wrap=True)
    failed = f"; {len(result.failed)} without an answer, whose rows hold the error" if result.failed else ""
    typer.echo(f"{out}: {result.kept + result.answered} rows, {result.answered} of them new{failed}")
