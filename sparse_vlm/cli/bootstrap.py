"""`sparse-vlm bootstrap`: make a tower from a teacher and photos (`sparse_vlm.train.bootstrap`)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bootstrap(
    teacher: Annotated[
        str,
        typer.Option(
            help="Teacher: tiny-teacher of the zoo; local-dir:PATH, hf-hub:ORG/NAME or MODEL@TAG of open_clip, such as "
            "ViT-B-16-quickgelu@openai; timm:NAME or timm:NAME@FILE; transformers:ORG/NAME or transformers:PATH."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Photos: webdataset tars, image folders, globs and {000..099} of them, URLs, or hf:ORG/NAME:SPLIT; may be repeated."
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe by name.")] = "adaptive",
    out: Annotated[Path | None, typer.Option(help="Folder of the student; build/RECIPE by default.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of the teacher's cached outputs, shared by all runs.")] = Path("build/teacher-cache"),
    views: Annotated[int | None, typer.Option(help="Views to train on, instead of the recipe's number.", min=32)] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a number of the recipe, such as lr=1e-3, looks=2 or views_per_photo=4; may be repeated."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Tower (folder or zoo name) whose weights the student starts from, instead of the teacher's alone."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of views, order and new weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    deepspeed: Annotated[
        str | None,
        typer.Option(help="Under torchrun: zero1, zero2, zero3, zero2-offload, zero3-offload, or a DeepSpeed JSON file."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass: less memory, more time.")
    ] = False,
    resident: Annotated[
        bool,
        typer.Option(
            "--resident",
            help="Keep all photos decoded in GPU memory and make views there, for a GPU that waits for photos; needs --set "
            "views_per_photo=0.",
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile teacher and student: a minute or two at the start, then faster steps on a GPU.")
    ] = False,
    mapping_only: Annotated[bool, typer.Option("--mapping-only", help="Print which tensors are inherited, and stop.")] = False,
) -> None:
    """Make a tower from a teacher and photos.

    The student inherits the teacher's blocks and is trained to reproduce its outputs, without labels or captions.
    Give the same command again to continue an interrupted run.
    """
    from sparse_vlm.cli.progress import ConsoleReporter
    from sparse_vlm.train.bootstrapping import BootstrapConfig, inherit_student
    from sparse_vlm.train.bootstrapping import bootstrap as run
    from sparse_vlm.utils.devices import rank

    config = BootstrapConfig(
        teacher=teacher,
        data=data or (),
        recipe=recipe,
        changes=change or (),
        views=views,
        init=init,
        out=out,
        cache=cache,
        seed=seed,
        threads=threads,
        deepspeed=deepspeed,
        gradient_checkpointing=gradient_checkpointing,
        resident=resident,
        compile=compiled,
    )
    reporter = ConsoleReporter(quiet=rank() > 0)
    if mapping_only:
        inherit_student(config, reporter)
    elif not run(config, reporter).completed:
        raise typer.Exit(130)
