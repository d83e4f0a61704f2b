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
ENDPOINT_TOKENS = 64  # of an answer
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
    url: Annotated[
        str | None,
        typer.Option(
            help="Load an OpenAI-compatible endpoint, http://HOST:PORT/v1, with requests about each --image, instead of measuring here."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(help="With --url: number of requests.", min=1)] = 32,
    concurrency: Annotated[int | None, typer.Option(help="With --url: most requests at a time; no limit by default.", min=1)] = None,
    rate: Annotated[float, typer.Option(help="With --url: mean requests a second, Poisson arrivals; all at once by default.")] = float(
        "inf"
    ),
    goodput: Annotated[
        list[str] | None, typer.Option(help="With --url: a bound that good requests keep, ttft:MS, tpot:MS or e2el:MS; repeatable.")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the document as JSON; - is stdout.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for the document, the tables in Markdown, and plots.")] = None,
) -> None:
    """Measure what towers, projectors and language models cost, stage by stage, beside what the machine can do."""
    if out is not None and out.is_file():
        raise UserError(f"--out {out}: is a file; name a folder")
    if json_file is not None and Path(json_file).is_dir():
        raise UserError(f"--json {json_file}: is a folder; name a file")
    if url is not None:
        if len(model or ()) > 1 or len(answer_tokens or ()) > 1:
            raise UserError("--url takes one --model, the name at the endpoint, and one --answer-tokens")
        _load_endpoint(url, model, image, requests, concurrency, rate, answer_tokens, goodput, json_file)
        return
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


def _load_endpoint(
    url: str,
    model: list[str] | None,
    images: list[Path] | None,
    requests: int,
    concurrency: int | None,
    rate: float,
    answer_tokens: list[int] | None,
    goodput: list[str] | None,
    json_file: str | None,
) -> None:
    """Load an endpoint and print the document or its table; the API key is read from `OPENAI_API_KEY`."""
    from rich.console import Console
    from rich.table import Table

    from sparse_vlm.bench.endpoint import PERCENTILES, LoadConfig, load
    from sparse_vlm.cli.progress import counting, for_people
    from sparse_vlm.utils.files import write_json

    goals = {}
    for goal in goodput or ():
        name, _, bound = goal.partition(":")
        try:
            goals[name] = float(bound)
        except ValueError:
            raise UserError(f"--goodput {goal}: write a bound in ms, such as ttft:500") from None
    config = LoadConfig(
        url=url.rstrip("/"),
        images=[str(path) for path in images or ()],
        model=model[0] if model else None,
        requests=requests,
        concurrency=concurrency,
        rate=rate,
        max_tokens=answer_tokens[0] if answer_tokens else ENDPOINT_TOKENS,
        goals=goals,
        api_key=os.environ.get("OPENAI_API_KEY"),
    )
    with counting(Console(stderr=True), "requests", "requests", requests) as advance:
        document = load(config, advance)
    if json_file is not None:
        write_json(json_file, document)
    if json_file != "-":
        table = Table("ms", "mean", *(f"p{percent}" for percent in PERCENTILES), box=None)
        for name in ("ttft", "itl", "tpot", "e2el"):
            table.add_row(name.upper(), *(f"{document[f'{column}_{name}_ms']:.1f}" for column in ("mean", *(f"p{p}" for p in PERCENTILES))))
        console = for_people()
        console.print(table)
        good = "" if document["request_goodput"] is None else f", {document['request_goodput']:.2f} of them good"
        console.print(
            f"{document['model_id']} at {url}: {document['completed']} of {requests} requests in {document['duration']:.1f} s; "
            f"{document['request_throughput']:.2f} requests/s{good}; {document['output_throughput']:.1f} output tokens/s"
        )
