"""Bootstrap a tower: a teacher, photos and a recipe become a folder that `SparseFormer.from_pretrained` loads.

    from sparse_vlm.train import BootstrapConfig, bootstrap

    result = bootstrap(BootstrapConfig(teacher="ViT-B-16-quickgelu@openai", data=["photos/*.tar"], out="build/tower"))
    print(result.completed, result.metrics["cosine"])

The pipeline: load the teacher; make the student and copy what it inherits (`distill.inherit`); cache the teacher's outputs
(`distill.cache`), or compute them at every step (`distill.live`); train (`train.distillation`). `sparse-vlm bootstrap` is this function.
An interrupted run (Ctrl-C saves a checkpoint first) continues when it is called again with the same config.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_vlm.distill.cache import TeacherCache
from sparse_vlm.distill.inherit import TensorMapping, inherit, load_init, summarize
from sparse_vlm.distill.recipes import Recipe, changed, get_recipe
from sparse_vlm.distill.resident import ResidentPhotos
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.errors import UserError
from sparse_vlm.hub.store import locate, sha256
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.teachers import Teacher, load_teacher
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.cost import count_macs, vit_macs
from sparse_vlm.train.reporter import Reporter
from sparse_vlm.train.zero import find_config, shares_weights
from sparse_vlm.utils.devices import own_device, rank, set_cpu_threads


@dataclass(frozen=True)
class BootstrapConfig:
    """A bootstrapping run.

    Attributes:
        teacher: name of the teacher, as `teachers.load_teacher` takes it.
        data: photos, as `PhotoSet` takes them: tars, folders, globs, URLs. Not needed where the recipe trains nothing.
        recipe: name in `distill.recipes.RECIPES`.
        changes: numbers of the recipe to change, as {"lr": 1e-3} or as ["lr=1e-3"].
        views: views to train on; the recipe's number by default.
        init: tower whose weights the student starts from (folder or zoo name), instead of the teacher's weights alone.
        out: folder of the student; `build/RECIPE` by default.
        cache: folder of cached teacher outputs, shared by all runs.
        seed: of views, order and new weights.
        threads: CPU threads; torch's number by default.
        deepspeed: name in `train.zero.CONFIGS` or a json file of DeepSpeed's; needs torchrun.
        gradient_checkpointing: recompute activations in the backward pass.
        resident: keep all photos decoded in GPU memory; needs a recipe without cached views (`views_per_photo` 0).
        compile: compile teacher and student.
    """

    teacher: str
    data: Sequence[str | Path] = ()
    recipe: str = "adaptive"
    changes: Mapping[str, float] | Sequence[str] = ()
    views: int | None = None
    init: str | None = None
    out: str | Path | None = None
    cache: str | Path = Path("build/teacher-cache")
    seed: int = 0
    threads: int | None = None
    deepspeed: str | None = None
    gradient_checkpointing: bool = False
    resident: bool = False
    compile: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the student."""
        return Path(self.out or Path("build") / self.recipe)

    def resolve(self) -> Recipe:
        """The recipe with this run's changes.

        Raises:
            UserError: an unknown recipe or number.
        """
        recipe = changed(get_recipe(self.recipe), self.changes)
        return recipe if self.views is None else dataclasses.replace(recipe, views=self.views)


@dataclass(frozen=True)
class BootstrapResult:
    """What became of a run.

    Attributes:
        out: folder of the student.
        completed: False where the run was interrupted and a checkpoint saved; the same config continues it.
        metrics: of the averaged weights on held-out photos at the end: `loss`, and the centred cosines to the teacher `cosine` (embedding)
            and `token_cosine`; empty unless the run was completed and trained something.
    """

    out: Path
    completed: bool = True
    metrics: dict[str, float] = field(default_factory=dict)


class Student(NamedTuple):
    """A student before training: what it inherits is copied, the rest is as new."""

    tower: SparseFormer
    teacher: Teacher
    recipe: Recipe
    mapping: list[TensorMapping]
    init_digest: str  # sha256 of the weights of `BootstrapConfig.init`; empty without


def inherit_student(config: BootstrapConfig, reporter: Reporter | None = None) -> Student:
    """Load the teacher, make the student and copy what it inherits; reports the mapping and the student's size. Trains nothing.

    Raises:
        UserError: a teacher, recipe or `init` that cannot be loaded or do not fit each other.
    """
    reporter = reporter or Reporter()
    recipe = config.resolve()
    set_cpu_threads(config.threads)
    torch.manual_seed(config.seed)
    teacher = load_teacher(config.teacher)
    tower = SparseFormer(recipe.config(teacher.spec))
    mapping, init_digest = inherit(tower, teacher, recipe), ""
    if config.init:
        mapping = load_init(tower, mapping, SparseFormer.from_pretrained(config.init), config.init)
        init_digest = sha256(locate(config.init) / "model.safetensors")
    reporter.table("what the student inherits", ("teacher tensor", "student tensor", "fate", "reason"), summarize(mapping))
    macs, teacher_macs = count_macs(tower.config).total, vit_macs(teacher.spec)
    reporter.message(
        f"student: {sum(p.numel() for p in tower.parameters()) / 1e6:.1f} M parameters, {tower.config.num_latent_tokens} tokens, "
        f"{macs / 1e9:.2f} GMACs ({macs / teacher_macs:.0%} of the teacher's {teacher_macs / 1e9:.2f})"
    )
    return Student(tower, teacher, recipe, mapping, init_digest)


def bootstrap(config: BootstrapConfig, reporter: Reporter | None = None) -> BootstrapResult:
    """Make a tower from a teacher and photos, without labels; continue or skip what an earlier call has done.

    Args:
        reporter: called with messages and progress; without one, only training progress is printed, to stderr. Under torchrun every process
            calls this function; the first fills the cache and writes the student.

    Raises:
        UserError: an input that is wrong or does not fit, or `out` holds another run.
    """
    reporter = reporter or Reporter()
    recipe, out = config.resolve(), config.folder
    engine = _check(config, recipe)
    student = inherit_student(config, reporter)
    tower, teacher = student.tower, student.teacher
    if not recipe.views:
        tower.save_pretrained(out)
        reporter.message(f"tower written to {out}; nothing was to be trained")
        return BootstrapResult(out)
    with reporter.fetching() as on_progress:
        photos = PhotoSet(list(config.data), on_progress)
    if config.gradient_checkpointing:
        tower.set_grad_checkpointing()
        reporter.message("activations are not kept but computed again in the backward pass")

    from sparse_vlm.train.distillation import train_student  # transformers' Trainer takes seconds to import
    from sparse_vlm.train.run import HISTORY, finished, locked_run

    if recipe.views_per_photo:
        rois = None if tower.config.budgets else tower.initial_roi.weight.detach()
        views: ViewSet = TeacherCache(
            Path(config.cache), teacher, photos, recipe.views_per_photo, rois, config.seed, owner=rank() == 0, fit=tower.config.fit
        )
    else:
        views = ViewSet(photos, -(-recipe.views // len(photos)), teacher.spec.image_size, config.seed, tower.config.fit)
    settings = _settings(config, student, views, engine)
    if finished(out, settings):
        return BootstrapResult(out, metrics=_final_metrics(json.loads((out / HISTORY).read_text())["history"]))
    if isinstance(views, TeacherCache):
        _fill(views, teacher, reporter)
        _report_unreadable(views, reporter)
    else:
        reporter.message("teacher: its outputs are computed at every step, and no view is shown twice")
    resident = None
    if config.resident:
        with reporter.counting("decoding", "photos", len(photos)) as advance:
            resident = ResidentPhotos(views, own_device(), advance)
    with locked_run(out, settings):
        history = train_student(student, views, out, settings, engine, resident, config.compile)
    if not recipe.views_per_photo:  # which photos cannot be read is known only now
        _report_unreadable(views, reporter)
    if history is None:
        reporter.message(f"interrupted and saved; give the same command again to continue ({out})")
        return BootstrapResult(out, completed=False)
    reporter.message(f"student written to {out}; its curve is {out / 'loss.png'}")
    return BootstrapResult(out, metrics=_final_metrics(history))


def _check(config: BootstrapConfig, recipe: Recipe) -> dict[str, Any] | None:
    """Refuse options that exclude each other.

    Returns:
        DeepSpeed's configuration, if it is asked for.
    """
    engine = find_config(config.deepspeed) if config.deepspeed else None
    if config.gradient_checkpointing and shares_weights(engine):
        raise UserError(
            "--gradient-checkpointing: not with ZeRO-3, whose gathered weights are gone when activations are recomputed; take zero2"
        )
    if config.compile and shares_weights(engine):
        raise UserError("--compile: not with ZeRO-3, under which each process holds a part of the weights; take zero2")
    if recipe.views_per_photo and recipe.views and (config.resident or recipe.mixed):
        option = "--resident" if config.resident else "--set mixed"
        raise UserError(f"{option}: needs teacher outputs that are computed at every step; add --set views_per_photo=0")
    if recipe.views and not config.data:
        raise UserError(f"--recipe {config.recipe}: trains on photos; give --data")
    return engine


def _settings(config: BootstrapConfig, student: Student, views: ViewSet, engine: dict[str, Any] | None) -> dict[str, Any]:
    """What identifies a run, as JSON: a folder is resumed only with the same."""
    recipe = {f.name: getattr(student.recipe, f.name) for f in dataclasses.fields(Recipe)}
    return {
        "recipe": config.recipe,
        **{name: value for name, value in recipe.items() if name not in ("student", "blocks", "summary")},
        "cache": {"teacher": student.teacher.fingerprint()} | views.describe(),
        "seed": config.seed,
        "groups": "sizes to a quarter of an octave",  # earlier runs had a group a tensor, so that their optimizer states do not fit
        **({"deepspeed": engine} if engine else {}),
        **({"resident": True} if config.resident else {}),
        **({"begun": student.init_digest} if student.init_digest else {}),
    }


def _fill(cache: TeacherCache, teacher: Teacher, reporter: Reporter) -> None:
    """Compute the teacher outputs that the cache does not hold."""
    if cache.done == len(cache):
        reporter.message(f"teacher outputs: {len(cache)} views, all cached")
        return
    with reporter.counting("teacher outputs", "views", len(cache), cache.done) as advance:
        cache.fill(teacher, on_rows=advance, device=own_device())


def _report_unreadable(views: ViewSet, reporter: Reporter) -> None:
    if views.unreadable:
        named = "; ".join(list(views.unreadable.values())[:5])
        more = f"; and {len(views.unreadable) - 5} more, which training.json names" if len(views.unreadable) > 5 else ""
        reporter.message(f"left out: {len(views.unreadable)} of {len(views.photos):,} photos cannot be read: {named}{more}")


def _final_metrics(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last evaluation in the Trainer's log."""
    last = next((entry for entry in reversed(history) if "eval_cosine" in entry), {})
    return {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}
