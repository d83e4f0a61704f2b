"""`sparse-vlm bootstrap`: make a tower from a teacher and photos, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def bootstrap(
    teacher: Annotated[
        str,
        typer.Option(
            help="Teacher: local-dir:PATH, hf-hub:ORG/NAME or MODEL@TAG of open_clip, such as ViT-B-16-quickgelu@openai; timm:NAME; "
            "transformers:ORG/NAME or transformers:PATH."
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Photos: webdataset tars, image folders, globs and {000..099} of them, URLs, or hf:ORG/NAME:SPLIT; may be repeated."
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="Recipe by name.")] = "elastic",
    out: Annotated[Path | None, typer.Option(help="Folder of the student; build/RECIPE by default.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of the teacher's cached outputs, shared by all runs.")] = Path("build/teacher-cache"),
    views: Annotated[int | None, typer.Option(help="Views to learn from, instead of the recipe's number.", min=32)] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a number of the recipe, as lr=1e-3, looks=2 or views_per_photo=4; may be repeated."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Tower that the student begins as, a folder or a name of the zoo, instead of the teacher's weights alone."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of views, order and new weights.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    deepspeed: Annotated[
        str | None,
        typer.Option(help="Under torchrun: zero1, zero2, zero3, zero2-offload, zero3-offload, or a json file of DeepSpeed's."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again in the backward pass: less memory, more time.")
    ] = False,
    resident: Annotated[
        bool,
        typer.Option(
            "--resident",
            help="Keep all photos decoded in the device's memory and make views there; for a GPU that waits for photos, and with --set "
            "views_per_photo=0.",
        ),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile teacher and student: a minute or two at the start, faster steps on a GPU.")
    ] = False,
    mapping_only: Annotated[bool, typer.Option("--mapping-only", help="Print what is inherited, and stop.")] = False,
) -> None:
    """Make a tower from a teacher and photos.

    The student inherits the teacher's blocks and learns, without labels or captions, to say of an image what the teacher says.
    Give the same command again to continue an interrupted run.
    """
    import dataclasses

    import torch

    from sparse_vlm.cli.progress import check_teacher, counting, fetching, for_people
    from sparse_vlm.distill.cache import TeacherCache
    from sparse_vlm.distill.inherit import begin_from, inherit
    from sparse_vlm.distill.recipes import changed, get_recipe
    from sparse_vlm.distill.resident import ResidentPhotos
    from sparse_vlm.distill.views import ViewSet
    from sparse_vlm.errors import UserError
    from sparse_vlm.hub.store import locate, sha256
    from sparse_vlm.images.photos import PhotoSet
    from sparse_vlm.teachers import load_teacher
    from sparse_vlm.tower import SparseFormer
    from sparse_vlm.tower.cost import count_macs, vit_macs
    from sparse_vlm.train.zero import find_config, shares_weights
    from sparse_vlm.utils.devices import own_device, rank, use_processors

    # of the processes that torchrun starts, one fills the cache and speaks
    first = rank() == 0
    console = for_people(quiet=not first)
    chosen = changed(get_recipe(recipe), change or [])
    if views is not None:
        chosen = dataclasses.replace(chosen, views=views)
    engine = find_config(deepspeed) if deepspeed else None
    if gradient_checkpointing and shares_weights(engine):
        raise UserError(
            "--gradient-checkpointing: ZeRO-3 has a process's own part of the weights alone when they are needed again; take zero2"
        )
    if compiled and shares_weights(engine):
        raise UserError("--compile: not with ZeRO-3, under which a process has its own part of the weights alone; take zero2")
    if chosen.views_per_photo and chosen.views and (resident or chosen.mixed):
        raise UserError(
            f"{'--resident' if resident else '--set mixed'}: for a teacher that answers at every step; add --set views_per_photo=0"
        )
    out = out or Path("build") / recipe
    if chosen.views and not data and not mapping_only:
        raise UserError(f"--recipe {recipe}: learns from photos; give --data")
    check_teacher(teacher)
    use_processors(threads)
    torch.manual_seed(seed)
    source = load_teacher(teacher)
    tower = SparseFormer(chosen.config(source.spec))
    rows, begun = inherit(tower, source, chosen), ""
    if init:
        rows, begun = begin_from(tower, rows, SparseFormer.from_pretrained(init), init), sha256(locate(init) / "model.safetensors")
    console.print(_mapping_table(rows))
    student_macs, teacher_macs = count_macs(tower.config).total, vit_macs(source.spec)
    console.print(
        f"student: {sum(p.numel() for p in tower.parameters()) / 1e6:.1f} M parameters, {tower.config.num_latent_tokens} tokens, "
        f"{student_macs / 1e9:.2f} GMACs ({student_macs / teacher_macs:.0%} of the teacher's {teacher_macs / 1e9:.2f})"
    )
    if mapping_only:
        return
    if not chosen.views:
        tower.save_pretrained(out)
        console.print(f"tower written to {out}; nothing was to be trained")
        return
    with fetching(console) as on_progress:
        photos = PhotoSet(data, on_progress)
    if gradient_checkpointing:
        tower.set_grad_checkpointing()
        console.print("activations are not kept but computed again in the backward pass")

    from sparse_vlm.train.bootstrap import bootstrap as run
    from sparse_vlm.train.bootstrap import settings_of
    from sparse_vlm.train.run import finished

    if chosen.views_per_photo:
        cells = None if tower.config.budgets else tower.initial_roi.weight.detach()
        shown = store = TeacherCache(cache, source, photos, chosen.views_per_photo, cells, seed, first, tower.config.fit)
        if finished(out, settings_of(recipe, chosen, source, store, seed, engine, resident, begun)):
            return
        if store.done == len(store):
            console.print(f"teacher's outputs: {len(store)} views, all cached")
        else:
            with counting(console, "asking the teacher", "views", len(store), store.done) as advance:
                store.fill(source, on_rows=advance, device=own_device())
        _report_unreadable(console, store)
    else:
        shown = ViewSet(photos, -(-chosen.views // len(photos)), source.spec.image_size, seed, tower.config.fit)
        console.print("teacher: answers at every step, and no view is shown twice")
    kept = None
    if resident:
        with counting(console, "decoding", "photos", len(photos)) as advance:
            kept = ResidentPhotos(shown, own_device(), advance)
    done = run(recipe, chosen, source, shown, out, rows, tower, seed, engine, kept, compiled, begun)
    if not chosen.views_per_photo:  # who cannot be read is known only now
        _report_unreadable(console, shown)
    if done:
        console.print(f"student written to {out}; its curve is {out / 'loss.png'}")
    else:
        console.print(f"interrupted and saved; give the same command again to continue ({out})")
        raise typer.Exit(130)


def _report_unreadable(console: Any, views: Any) -> None:
    if views.unreadable:
        named = "; ".join(list(views.unreadable.values())[:5])
        more = f"; and {len(views.unreadable) - 5} more, which training.json names" if len(views.unreadable) > 5 else ""
        console.print(f"left out: {len(views.unreadable)} of {len(views.photos):,} photos cannot be read: {named}{more}", highlight=False)


def _mapping_table(rows: list[Any]) -> Any:
    """The mapping, with runs of teacher tensors that share a fate and a block folded into one line."""
    from rich.table import Table

    table = Table(title="what the student inherits", title_justify="left", box=None)
    for column in ("teacher tensor", "student tensor", "fate", "reason"):
        table.add_column(column)
    folded: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        key = (_block(row.source), _block(row.target), row.fate, row.reason)
        folded[key] = folded.get(key, 0) + 1
    for (source, target, fate, reason), count in folded.items():
        many = f" ({count} tensors)" if count > 1 else ""
        table.add_row((source or "-") + (many if source else ""), (target or "-") + ("" if source else many), fate, reason)
    return table


def _block(name: str) -> str:
    parts = name.split(".")
    return ".".join([*parts[:2], "*"]) if parts[0] in ("blocks", "layers") else name
