"""`sparse-vlm export --model tiny --format onnx --out build/tiny-onnx`: a tower or a VLM in a format that others load.

sparse-vlm export --model tiny-chat --format transformers --out build/tiny-chat-hf
sparse-vlm export --model tiny --format onnx --tokens 25 --image photo.jpg --out build/tiny-25 --json
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.errors import printable

FORMAT_NAMES = "transformers (towers and VLMs), onnx, torch-export (towers)"


def export(
    model: Annotated[str, typer.Option(help="A tower or a VLM: a folder or a name of the model zoo.")],
    name: Annotated[str, typer.Option("--format", help=f"What to write: {FORMAT_NAMES}.")],
    out: Annotated[Path, typer.Option(help="Output folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the weights: float32 or bfloat16, which is the default for transformers; onnx has float32 alone."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Token budget, for a model that serves several.", min=1)] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image to compare on; repeatable. Synthetic images by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier export in --out.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written and compared as one JSON object.")] = False,
) -> None:
    """Write a model in a format that others load.

    The export is loaded again and compared with the model before it takes its name. Its README.md runs it, and is its card on a model hub.
    """
    from rich.console import Console
    from rich.text import Text

    from sparse_vlm.export.run import export as run

    _silence_libraries()
    if threads:
        import torch

        torch.set_num_threads(threads)
    # some libraries log to stdout, which is for what was asked for
    with Console(stderr=True).status(Text(f"exporting {printable(model)}")), contextlib.redirect_stdout(sys.stderr):
        described = run(model, name, out, dtype, tokens, image or (), replace)
    if as_json:
        print(json.dumps({"out": str(out), **described}))
        return
    size = sum(each["size"] for each in described["files"].values()) / 1e6
    what = printable(f"{out}: {described['model']} for {name}")
    print(f"{what}, {described['dtype']}, {described['tokens']} tokens an image, {size:.1f} MB")
    print(f"loaded again and compared on {described['compared_on']}:")
    for one in described["compared"]:
        at_a_time = f"{one['pictures']} at a time" if one["pictures"] else ""
        print(f"  {one['what']:22} {at_a_time:12} largest difference {one['difference']:.2g} of {one['largest']:.3g}")


def _silence_libraries() -> None:
    """Progress bars and logs of libraries add nothing to an export: errors are raised."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
