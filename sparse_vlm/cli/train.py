"""`sparse-vlm train`: teach an LLM to read a tower's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.errors import UserError


def train(
    data: Annotated[
        list[str],
        typer.Option(
            help="Photos with captions or questions: tars, globs, URLs, hf:ORG/NAME:SPLIT; or a LLaVA json or jsonl. "
            "Repeatable; =0.5 behind one takes half of it, =2 all of it twice."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the model.")] = None,
    stage: Annotated[str, typer.Option(help="read: the LLM, from words; align: the projector; instruct: both.")] = "align",
    tower: Annotated[str | None, typer.Option(help="Tower: a folder or a name of the zoo; tiny, or that of --init, unless given.")] = None,
    llm: Annotated[str, typer.Option(help="LLM: a folder or a name of the zoo.")] = "smollm2-135m-instruct",
    tokens: Annotated[int | None, typer.Option(help="Latent tokens an image, for a tower that serves several budgets.", min=1)] = None,
    init: Annotated[
        str | None,
        typer.Option(help="A VLM to start from: what the stage before made. With --tower, its tower is replaced and its projector new."),
    ] = None,
    keep_projector: Annotated[
        bool, typer.Option("--keep-projector", help="With --init and --tower: keep the projector, for a tower of the same teacher.")
    ] = False,
    projector: Annotated[
        str,
        typer.Option(
            help="A new projector's kind: mlp, or one that reduces a ViT's tokens to --tokens of them: pool, stride, random, shuffle, "
            "resampler, abstractor."
        ),
    ] = "mlp",
    images: Annotated[Path | None, typer.Option(help="Folder of the images that a LLaVA json names.")] = None,
    allow_outside: Annotated[
        bool, typer.Option("--allow-outside", help="Let a LLaVA json name images outside --images: by .., whole paths, symbolic links.")
    ] = False,
    on_bad_image: Annotated[
        str, typer.Option(help="raise: stop and name the sample; skip: leave out what shows it; blank: show a grey image instead.")
    ] = "raise",
    epochs: Annotated[int, typer.Option(help="Visits to each photo, with other captions and questions each time.", min=1)] = 1,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Read all data, name every problem in it and count its tokens; start no model. Exit code 1: problems."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --check: print one JSON document.")] = False,
    samples: Annotated[int | None, typer.Option(help="Number of samples, drawn at random; all by default.", min=1)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Maximum number of steps.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Photos a step, instead of the stage's.", min=1)] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            help="Photos of a step that each process computes at a time, so that a step needs less memory (gradient accumulation); all "
            "unless given, and four on a CPU.",
            min=1,
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the projector, instead of the stage's.")] = None,
    lr_llm: Annotated[float | None, typer.Option(help="Learning rate of the LLM, instead of the stage's.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the LLM's adapters.", min=1)] = 32,
    full: Annotated[bool, typer.Option("--full", help="Train the LLM itself instead of adapters.")] = False,
    tune_tower: Annotated[bool, typer.Option("--tune-tower", help="Train the tower as well; it then looks at every step.")] = False,
    tower_lora: Annotated[int | None, typer.Option(help="Train adapters of this rank on the tower instead.", min=1)] = None,
    lr_tower: Annotated[float | None, typer.Option(help="Learning rate of the tower or its adapters, instead of the stage's.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Hold the LLM in 4bit or 8bit (bitsandbytes) under its adapters, as QLoRA does.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them: less memory, more time.")
    ] = False,
    deepspeed: Annotated[
        str | None,
        typer.Option(help="Under torchrun: zero1, zero2, zero3, zero2-offload, zero3-offload, or a json file of DeepSpeed's."),
    ] = None,
    report_to: Annotated[list[str] | None, typer.Option(help="Tell tensorboard or wandb of the run's curve, too; repeatable.")] = None,
    max_bad_steps: Annotated[
        int, typer.Option(help="Consecutive steps with a non-finite loss that end the run; such steps update nothing.", min=1)
    ] = 3,
    cache: Annotated[Path, typer.Option(help="Folder of the tower's cached tokens, shared by all runs.")] = Path("build/token-cache"),
    seed: Annotated[int, typer.Option(help="Seed of data, order and new weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Teach an LLM to read a tower's tokens.

    Give the same command again to continue an interrupted run.
    """
    from sparse_vlm.cli.progress import ConsoleReporter
    from sparse_vlm.train.finetuning import SFTConfig, sft
    from sparse_vlm.utils.devices import rank as process_rank

    config = SFTConfig(
        data=data,
        out=out,
        stage=stage,
        tower=tower,
        llm=llm,
        tokens=tokens,
        init=init,
        keep_projector=keep_projector,
        projector=projector,
        images=images,
        allow_outside=allow_outside,
        on_bad_image=on_bad_image,
        epochs=epochs,
        samples=samples,
        max_steps=max_steps,
        batch_size=batch_size,
        at_once=at_once,
        lr=lr,
        lr_llm=lr_llm,
        lr_tower=lr_tower,
        lora_rank=rank,
        full=full,
        tune_tower=tune_tower,
        tower_lora_rank=tower_lora,
        quantize=quantize,
        gradient_checkpointing=gradient_checkpointing,
        deepspeed=deepspeed,
        report_to=report_to or (),
        max_bad_steps=max_bad_steps,
        cache=cache,
        seed=seed,
        threads=threads,
    )
    if check:
        from sparse_vlm.cli.checking import print_check

        raise typer.Exit(print_check(config, as_json))
    if as_json:
        raise UserError("--json needs --check")
    if not sft(config, ConsoleReporter(quiet=process_rank() > 0)).completed:
        raise typer.Exit(130)
