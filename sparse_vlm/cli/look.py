"""`sparse-vlm look photo.jpg`: draw what a tower's tokens look at over a photo.

sparse-vlm look photo.jpg --model tiny --output look.png
sparse-vlm look photo.jpg --json                        # the RoIs as one JSON object; an image only with --output
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.errors import printable
from sparse_vlm.hub.store import locate
from sparse_vlm.images.decode import load_image


def look(
    photo: Annotated[Path, typer.Argument(help="The image file.")],
    model: Annotated[str, typer.Option(help="A tower: a folder or a name of the model zoo.")] = "tiny",
    out: Annotated[
        Path | None, typer.Option("--output", "--out", help="The figure to write; its suffix decides the format. [default: look.png]")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Token budget, for a tower that serves several.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the RoIs of every sampling step as one JSON object.")] = False,
) -> None:
    """Draw what the tokens look at over a photo."""
    picture = load_image(photo)
    folder = locate(model, kind="tower")

    from sparse_vlm.tower import SparseFormer
    from sparse_vlm.tower.visualize import draw, save_figure, trace_regions

    regions = trace_regions(SparseFormer.from_pretrained(folder, num_tokens=tokens), picture)
    if out is None and not as_json:
        out = Path("look.png")
    if out is not None:
        save_figure(draw(regions, f"What {Path(model).name} looks at in {photo.name}"), out)
    if as_json:
        print(json.dumps({"model": model, "image": str(photo), **regions.to_dict()}))
    else:
        print(printable(f"wrote {out}"))
