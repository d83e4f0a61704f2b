"""`sparse-vlm train`: teach an LLM to read a tower's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


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
    samples: Annotated[int | None, typer.Option(help="Learn from so many samples, drawn at random; all by default.", min=1)] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.", min=1)] = None,
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
        int, typer.Option(help="End the run when so many steps in a row have a loss that is not finite; no step learns from one.", min=1)
    ] = 3,
    cache: Annotated[Path, typer.Option(help="Folder of the tower's cached tokens, shared by all runs.")] = Path("build/token-cache"),
    seed: Annotated[int, typer.Option(help="Seed of data, order and new weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
) -> None:
    """Teach an LLM to read a tower's tokens.

    Give the same command again to continue an interrupted run.
    """
    import dataclasses
    import random
    from contextlib import nullcontext

    from sparse_vlm.cli.progress import counting, plain_console
    from sparse_vlm.data.bad_images import ON_BAD_IMAGE
    from sparse_vlm.data.samples import FeatureCache, arrange, build_samples
    from sparse_vlm.data.words import words_about
    from sparse_vlm.errors import UserError
    from sparse_vlm.train import vlm as training
    from sparse_vlm.train.loss_module import LiveImages
    from sparse_vlm.train.parts import choose_attention
    from sparse_vlm.train.run import check_reporters, finished, marked_checkpoints
    from sparse_vlm.train.text_images import WordImages
    from sparse_vlm.train.vocabulary import pretrain_projector, words_of
    from sparse_vlm.train.zero import find_config
    from sparse_vlm.utils.devices import own_device, set_cpu_threads
    from sparse_vlm.utils.devices import rank as process_rank
    from sparse_vlm.utils.files import locked
    from sparse_vlm.vlm import VLM
    from sparse_vlm.vlm.projectors import MLP

    if keep_projector and not (init and tower):
        raise UserError("--keep-projector: says what becomes of the model's projector under another tower; give --init and --tower")
    if projector != MLP and (keep_projector or (init and not tower)):
        raise UserError(f"--projector {projector}: is for a new projector, which comes with a new tower; give --tower")
    if stage not in training.STAGES:
        raise UserError(f"--stage {stage}: no such stage; known are {', '.join(training.STAGES)}")
    if on_bad_image not in ON_BAD_IMAGE:
        raise UserError(f"--on-bad-image {on_bad_image}: unknown; known are {', '.join(ON_BAD_IMAGE)}")
    if check:
        from sparse_vlm.cli.checking import check_data

        raise typer.Exit(check_data(data, images, stage, tower, llm, init, tokens, projector, threads, as_json, allow_outside))
    if as_json:
        raise UserError("--json needs --check")
    if out is None:
        raise UserError("--out is missing; name the folder of the model (--check alone needs none)")
    chosen = training.STAGES[stage]
    if lr is not None:
        chosen = dataclasses.replace(chosen, lr_projector=lr)
    if lr_llm is not None:
        if chosen.lr_lora is None:
            raise UserError(f"--lr-llm: stage {stage} leaves the LLM frozen")
        chosen = dataclasses.replace(chosen, lr_lora=lr_llm, lr_full=lr_llm)
    live = tune_tower or tower_lora is not None
    if tune_tower and tower_lora is not None:
        raise UserError("--tune-tower and --tower-lora: train the tower itself or adapters on it, not both")
    if live and chosen.pictures_of_words:
        raise UserError(f"--tune-tower, --tower-lora: in stage {stage} words stand in an image's place and the tower takes no part")
    if lr_tower is not None:
        if not live:
            raise UserError("--lr-tower: the tower is frozen; give --tune-tower or --tower-lora")
        chosen = dataclasses.replace(chosen, lr_tower_lora=lr_tower, lr_tower_full=lr_tower)
    if batch_size is not None:
        chosen = dataclasses.replace(chosen, batch_size=batch_size)
    check_reporters(report_to or [])
    engine = training.Engine(
        find_config(deepspeed, "train") if deepspeed else None, gradient_checkpointing, tuple(report_to or ()), max_bad_steps, at_once
    )
    set_cpu_threads(threads)
    # of the processes that torchrun starts, one looks, teaches words and speaks
    first = process_rank() == 0
    console = plain_console(soft_wrap=True, quiet=not first)
    examples = _talks(console, data, images, stage, epochs, seed, allow_outside)
    if chosen.pictures_of_words:
        spoken = [index for index, example in enumerate(examples) if not example.photos or words_about(example)]
        if not spoken:
            raise UserError(f"--stage {stage}: no word is said about any photo; give captions, or answers in words")
        if len(spoken) < len(examples):
            console.print(
                f"left out: {len(examples) - len(spoken):,} of {len(examples):,} samples, because no word is said about their photo"
            )
        examples = examples.select(spoken)
    if samples is not None and samples < len(examples):
        examples = examples.select(random.Random(seed).sample(range(len(examples)), samples))
    device = own_device()
    if init:
        more = {"new_tower": tower, "keep_projector": keep_projector, "projector": projector}
        vlm = VLM.from_pretrained(init, device, fold=False, num_tokens=tokens, quantize=quantize, **more)
    else:
        vlm = VLM.build(tower or "tiny", llm, device, seed=seed, num_tokens=tokens, quantize=quantize, projector=projector)
    with console.status("rendering conversations and checking their label masks"):
        context = getattr(vlm.model.config.text_config, "max_position_embeddings", None)
        built = build_samples(examples, vlm.renderer, context, seed)
    groups = training.prepare(vlm, chosen, None if full else rank, seed, tune_tower, tower_lora)
    _describe(console, built, groups, vlm, min(chosen.batch_size, len(built)), seed)
    console.print(f"attention of the LLM: {choose_attention(vlm)}")

    if chosen.pictures_of_words:
        features_cache = None
    elif live:
        features_cache = LiveImages(vlm.tower.config, examples.photos, owner=first, threads=threads or 1)
    else:
        features_cache = FeatureCache(cache, vlm.tower, examples.photos, owner=first)
    with locked(out) if first else nullcontext():  # from here on something is written to it
        built, bad = _look(console, built, features_cache, "reading" if live else "looking", on_bad_image, out, first)
        examples = built.examples
        if features_cache is None:
            features_cache = WordImages(vlm, examples, seed)
        built = arrange(built, chosen.batch_size, seed)
        settings = {
            "stage": stage,
            **dataclasses.asdict(chosen),
            "tower": vlm.tower_name,
            "tokens": vlm.tokens_per_image,
            "llm": vlm.llm_name,
            "init": init,
            "rank": None if full or chosen.lr_lora is None else rank,
            "photos": len(examples.photos),
            "samples": len(built),
            "data": examples.fingerprint(),
            "on_bad_image": on_bad_image,
            "bad_images": bad,
            "epochs": epochs,
            "max_steps": max_steps,
            "seed": seed,
            **{
                name: value
                for name, value in {
                    "keep_projector": keep_projector,
                    "projector": None if vlm.projector_kind == MLP else vlm.projector_kind,
                    "tune_tower": tune_tower,
                    "tower_rank": tower_lora,
                    "quantize": quantize,
                    "at_once": at_once,
                    "deepspeed": engine.deepspeed,
                }.items()
                if value
            },
        }
        fresh = first and vlm.new_projector and not marked_checkpoints(out / "checkpoints") and not finished(out, settings)
        if chosen.word_epochs and fresh and (words := words_of(examples, vlm.tokenizer)).names:
            heard = features_cache
            if live:  # the tower as it begins
                heard = FeatureCache(cache, vlm.tower, examples.photos)
                heard.stand_in(bad)
                with counting(console, "looking", "photos", len(heard.missing(words.photos))) as advance:
                    heard.fill([photo for photo in words.photos if photo not in bad], advance)
            with counting(console, f"saying {len(words.names):,} words", "photos", len(words.photos) * chosen.word_epochs) as advance:
                learnt = pretrain_projector(vlm, words, heard, chosen.word_epochs, seed, advance)
            if learnt:
                console.print(
                    f"the word that a new photo's tokens say most is said of it in {learnt['first']:.0%} of the cases "
                    f"(the most common word in {learnt['commonest']:.0%})"
                )
        if training.train(vlm, groups, chosen, built, features_cache, out, settings, max_steps, seed, engine):
            console.print(f"model written to {out}; its curve is {out / 'loss.png'}")
            if bad:
                console.print(f"of the images {len(bad):,} could not be used: {out / 'training.json'} names them (bad_images)")
        else:
            console.print(f"interrupted and saved; give the same command again to continue ({out})")
            raise typer.Exit(130)


def _talks(console: Any, data: list[str], images: Path | None, stage: str, epochs: int, seed: int, allow_outside: bool) -> Any:
    """What the data says, as a dataset."""
    from functools import partial

    from sparse_vlm.cli.progress import fetching, reading
    from sparse_vlm.data.conversations import MIXTURES
    from sparse_vlm.data.dataset import files_of, photos_of, read_conversations
    from sparse_vlm.data.llava import LlavaFile

    with fetching(console) as on_fetched:
        photos = photos_of(data, on_fetched)
    files = files_of(data)
    with reading(console, [path for path, _ in files]) as on_bytes:
        return read_conversations(
            files, photos, images, MIXTURES[stage], epochs, seed, partial(LlavaFile, on_bytes=on_bytes, allow_outside=allow_outside)
        )


def _look(
    console: Any, samples: Any, features_cache: Any, label: str, on_bad_image: str, out: Path, first: bool
) -> tuple[Any, dict[int, str]]:
    """Let the tower look at what it has not seen yet, or, where it learns, make sure that all can be read.

    Returns:
        The samples that remain, and the images that cannot be used.
    """
    from sparse_vlm.cli.progress import counting
    from sparse_vlm.data.bad_images import DECISIONS, resolve_bad_images
    from sparse_vlm.errors import UserError

    def look(wanted: Any, on_bad: Any) -> None:
        if features_cache is None:
            return
        if missing := len(features_cache.missing(wanted)):
            with counting(console, label, "photos", missing) as advance:
                features_cache.fill(wanted, advance, on_bad)
        else:
            console.print(f"{label}: {len(wanted)} photos, all done before")

    bad = resolve_bad_images(samples.examples, on_bad_image, out, first, look)
    kept = samples.without(bad) if on_bad_image == "skip" else samples
    if not len(kept):
        raise UserError(f"--on-bad-image skip: no sample is left, as {len(bad):,} images cannot be used; {out / DECISIONS} says why")
    if bad:
        done = f"{len(samples) - len(kept):,} of {len(samples):,} samples are left out" if on_bad_image == "skip" else "shown as grey"
        console.print(f"bad images: {len(bad):,}, {done}; {out / DECISIONS} names all")
        for why in list(bad.values())[:5]:
            console.print(f"  {why}")
    if features_cache is not None:
        features_cache.stand_in(bad)
        features_cache.fill([photo for photo in kept.examples.wanted() if photo not in bad])
    return kept, bad


def _describe(console: Any, samples: Any, groups: list[Any], vlm: Any, batch_size: int, seed: int) -> None:
    """What is learnt from and what it costs in tokens, what learns, and one sample with its label mask."""
    from rich.table import Table

    from sparse_vlm.data.samples import arrange, report
    from sparse_vlm.train.cost import token_cost

    known = samples.counts.examples
    about = (
        ""
        if known == len(samples)
        else f", of the text by {known:,} samples (the others are rendered and checked when they are learnt from)"
    )
    console.print("data: " + ", ".join(f"{number:,} {name}" for name, number in report(samples).items()) + about)
    ordered = arrange(samples, batch_size, seed)
    for line in token_cost(ordered, ordered.lengths, batch_size, vlm.tokens_per_image).lines():
        console.print(line)
    table = Table(box=None)
    for column in ("part", "tensors", "parameters", "learning rate"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for group in groups:
        table.add_row(group.name, str(len(group.parameters)), f"{group.size:,}", "frozen" if group.lr is None else f"{group.lr:g}")
    console.print(table)
    example = samples.examples[0]
    shown = vlm.renderer.renderings(example.conversations[-1], example.name)[-1]
    console.print(f"one conversation, [[what carries loss]] in brackets ({example.name}):")
    console.print(vlm.renderer.describe(shown))
