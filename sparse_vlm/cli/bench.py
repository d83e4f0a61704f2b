"""`sparse-vlm bench --model tiny --rivals --llm 135m --llm 7b`: what towers, projectors and language models cost on this machine.

Notable: stdout holds the tables, or with `--json -` the JSON document alone; progress goes to stderr. Files are written as the run goes, so
that Ctrl-C, or a failure, leaves all that was finished.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_vlm.errors import UserError

GB = 1_000_000_000
ANSWERS = (16, 128, 512)
NARROWEST = 125  # columns that the widest table needs


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A tower (folder, zoo name, a baseline such as clip-l14, or a teacher's name), or TOWER+KIND with what makes its tokens "
            "fewer: pool, stride, random, shuffle, resampler, abstractor, prune; repeat it."
        ),
    ] = None,
    rivals: Annotated[bool, typer.Option("--rivals", help="All baselines, and all that makes the tokens of clip-l14 fewer.")] = False,
    llm: Annotated[
        list[str] | None,
        typer.Option(
            help="A language model (folder or zoo name), or a shape of random weights: 135m, 360m, 1b, 1.7b, 3b, 7b, 13b; repeat it."
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(help="Token budget, where it can be chosen; repeatable. By default 49, or the tower's own.", min=1),
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file; repeatable. A synthetic image by default.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable. 1 and 16 by default.", min=1)] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeatable. The machine's native dtype by default.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Also measure towers with torch.compile.")] = False,
    optimized: Annotated[bool, typer.Option("--optimized", help="Measure towers optimized for CPU inference, baselines too.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.", min=1)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of text beside an image.", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="Timed calls of each part after the warm-up; the median is reported.")] = 10,
    seconds: Annotated[float, typer.Option(help="Time limit of a part; beyond it, three calls are enough.", min=0)] = 20.0,
    serving: Annotated[bool, typer.Option("--serving", help="Estimate requests a second and memory of a server.")] = False,
    answer_tokens: Annotated[
        list[int] | None, typer.Option(help="Answer lengths for --serving; repeatable. 16, 128, 512 by default.", min=1)
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(
            help="Memory in GB for --serving, and limit for language models here; the machine's own by default.",
            min=0.1,
        ),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the document as JSON; - is stdout.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the document, the tables in Markdown, and plots.")] = None,
) -> None:
    """Measure what towers, projectors and language models cost, stage by stage, beside what the machine can do."""
    if out is not None and out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if json_file is not None and Path(json_file).is_dir():
        raise UserError(f"--json {json_file}: is a folder; name a file")
    if not model and not rivals:
        raise UserError("nothing to measure; name a --model, or give --rivals")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, would talk of GPUs that are not there
    from rich.console import Console

    progress = Console(stderr=True)
    with progress.status("starting") if progress.is_terminal else nullcontext():
        import torch

        from sparse_vlm.bench.config import BenchConfig
        from sparse_vlm.bench.run import measure
        from sparse_vlm.bench.vision import BOX
        from sparse_vlm.cli.progress import counting, for_people
        from sparse_vlm.report.tables import as_tables, notes, save
        from sparse_vlm.utils.devices import native_dtype, own_device
        from sparse_vlm.utils.files import locked, write_json

    if threads:
        torch.set_num_threads(threads)
    where = device or str(own_device())
    config = BenchConfig(
        models=(*(model or ()), *(BOX if rivals else ())),
        llms=tuple(llm or ("135m",)),
        tokens=tuple(tokens or ()),
        images=tuple(str(path) for path in image or ()),
        batches=tuple(dict.fromkeys(batch or (1, 16))),
        dtypes=tuple(dict.fromkeys(dtype or [str(native_dtype(where)).removeprefix("torch.")])),
        device=where,
        compile=compile,
        optimized=optimized,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        limit_s=seconds,
        memory_bytes=None if memory is None else int(memory * GB),
        answers=tuple(answer_tokens or ANSWERS) if serving else (),
    )
    files = [*([out / "bench.json"] if out else []), *([Path(json_file)] if json_file not in (None, "-") else [])]
    document: dict[str, Any] = {}

    def keep(latest: dict[str, Any]) -> None:
        document.update(latest)
        for file in files:
            write_json(str(file), document)

    with nullcontext() if out is None else locked(out):
        try:
            with counting(progress, "measuring", "‰", 1000) as advance:
                measure(config, advance, keep)
        finally:
            if document and out is not None:
                save(document, out)
            if document and json_file == "-":
                write_json("-", document)
            elif document.get("measurements"):
                # a narrow terminal wraps lines, which is better than numbers that are cut
                console = for_people()
                console.width = max(NARROWEST, console.width)
                for table in as_tables(document):
                    console.print(table)
                lines = [*notes(document), *(document["serving"]["no_help"] if document["serving"] else [])]
                console.print("\n".join(f"* {line}" for line in lines), soft_wrap=True)
