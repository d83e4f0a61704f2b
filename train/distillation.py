"""The Trainer of bootstrapping: a student learns from views and its teacher's outputs (`train.bootstrapping` is the pipeline around it).

Notable: runs on transformers' Trainer, also in several processes (`torchrun --nproc-per-node N --no-python sparse-vlm bootstrap ...`),
which share each batch, and with `--deepspeed` also optimizer states, gradients and weights. The teacher is in no engine and no
checkpoint. An exponential moving average of the weights is kept beside them, in checkpoints too; it is what is evaluated and what becomes
the student.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from sparse_vlm.distill.cache import TeacherCache
from sparse_vlm.distill.inherit import TensorMapping
from sparse_vlm.distill.live import LiveTeacher
from sparse_vlm.distill.loss import Distillation, parameter_groups, update_average
from sparse_vlm.distill.recipes import Recipe
from sparse_vlm.distill.resident import ResidentPhotos
from sparse_vlm.distill.shrink import shrink
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.teachers import Teacher
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.visualize import save_figure
from sparse_vlm.train.batches import (
    Augmentation,
    CachedViews,
    LiveViews,
    ResidentViews,
    collate,
    held_out,
    held_out_batches,
    live_statistics,
)
from sparse_vlm.train.progress import ProgressLine
from sparse_vlm.train.run import (
    HISTORY,
    MarkComplete,
    StopOnSignal,
    StopWhenComplete,
    TrimMemory,
    arguments,
    curve_of,
    latest_checkpoint,
    of_all_processes,
    run_trainer,
    written_files,
)
from sparse_vlm.train.zero import gathered_parameters, register_external_parameters, with_sizes
from sparse_vlm.utils.devices import compiling, native_dtype, own_device, rank, training_attention
from sparse_vlm.utils.files import write_text

if TYPE_CHECKING:
    from sparse_vlm.train.bootstrapping import Student

RECOMPILE_LIMIT = 64  # of a class: kinds of units, trained or frozen, at one token budget and at any
SAVE_EVERY = {"cpu": 100, "cuda": 1000}  # steps, by kind of device; a few minutes


def groups_of(tower: SparseFormer, mapping: list[TensorMapping], recipe: Recipe) -> list[dict[str, Any]]:
    """`parameter_groups` of a student, at a recipe's rates."""
    new = {row.target for row in mapping if row.fate == "new"}
    return parameter_groups(tower, new, recipe.lr, recipe.new_boost, recipe.lr_rois, recipe.weight_decay, recipe.lr_focus)


def compile_parts(tower: SparseFormer, live_teacher: LiveTeacher | None) -> None:
    """Compile a student by parts, and its teacher: equal units share compiled code, at all token budgets."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    for part in (tower.feat_extractor, *tower.units()):
        if part is not None:
            part.compile()
    if live_teacher is not None:
        live_teacher.compile()


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of bootstrapping."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


class BootstrapTrainer(Trainer):
    """Trainer with the recipe's parameter groups, teacher outputs computed in the step, and an evaluation of the averaged weights."""

    groups: list[dict[str, Any]]
    average: dict[str, Tensor]
    bf16: bool
    live_teacher: LiveTeacher | None = None
    augment: Augmentation
    small: float = 0.0  # share of views that are shrunk
    canvas_size: int = 0  # side of their canvas
    unreadable: set[int]
    budgets: tuple[int, int] | None = None
    uncompiled: Callable[[], AbstractContextManager[Any]] = nullcontext  # evaluation is too rare to compile for its shapes

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the recipe's groups."""
        if self.optimizer is None:
            self.optimizer = adamw(self.groups)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss, at a token budget that the step number determines, after teacher outputs are computed if they are not cached."""
        if self.live_teacher is not None:
            if "unreadable" in inputs:
                self.unreadable |= {index for index in inputs["unreadable"].tolist() if index >= 0}
            views = self.augment(inputs, self.state.global_step)
            embeds, tokens = self.live_teacher(views.pop("teacher_pixels", views["pixels"]))
            inputs = {**views, "embeds": embeds, "tokens": tokens}
        if self.small:
            inputs = self.shrink_views(inputs)
        out = model(**inputs, num_tokens=self.budget(self.state.global_step))
        return (out["loss"], out) if return_outputs else out["loss"]

    def shrink_views(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Shrink some of the batch's views, determined by step number, seed and rank."""
        pixels = inputs["pixels"]
        sizes = inputs.get("image_sizes", torch.tensor(pixels.shape[-2:]).repeat(len(pixels), 1).to(pixels.device))
        number = int(np.random.SeedSequence((self.args.seed, rank(), self.state.global_step)).generate_state(1)[0])
        pixels, sizes, boxes = shrink(pixels, sizes, self.small, self.canvas_size, torch.Generator().manual_seed(number))
        return {**inputs, "pixels": pixels, "image_sizes": sizes, "boxes": boxes}

    def budget(self, step: int) -> int | None:
        """Token budget of a step, for a student of several: a random one in half of the steps, else its default (None)."""
        rng = random.Random(f"{self.args.seed}/{step}")
        return rng.randint(*self.budgets) if self.budgets is not None and rng.random() < 0.5 else None

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss and centred cosines of the averaged weights on held-out photos; at most once a step, since a run's end calls it twice.

        Every process evaluates all photos, so that the result does not depend on the number of processes.
        """
        for entry in self.state.log_history:  # also from before a resume
            if entry["step"] == self.state.global_step and f"{metric_key_prefix}_cosine" in entry:
                return {key: value for key, value in entry.items() if key.startswith(metric_key_prefix)}
        model: Distillation = self.accelerator.unwrap_model(self.model)
        own = _copies(model.tower)
        _copy_into(model.tower, self.average)
        sums: dict[str, float] = {}
        count = 0
        try:
            for batch in DataLoader(self.eval_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator):
                batch = self._prepare_inputs(batch)
                with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.bf16), self.uncompiled():
                    out = model(**batch)
                size = len(batch["pixels"])
                count += size
                for key in out.keys() & {"loss", "cosine", "token_cosine", "focus"}:
                    sums[key] = sums.get(key, 0.0) + out[key].item() * size
        finally:
            _copy_into(model.tower, own)
        metrics = {f"{metric_key_prefix}_{key}": value / count for key, value in sums.items()}
        self.log(metrics)
        return metrics


class AveragedWeights(TrainerCallback):
    """Keeps the exponential moving average of the tower's weights, also in checkpoints."""

    def __init__(self, model: Distillation, average: dict[str, Tensor], decay: float) -> None:
        self.model, self.average, self.decay = model, average, decay

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Update the average; its decay is smaller at first, so that the initial weights are forgotten."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with gathered_parameters(self.model.tower.parameters()):
            update_average(self.average, self.model.tower, decay)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average beside the Trainer's files."""
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file({name: t.contiguous() for name, t in self.average.items()}, folder / "average.safetensors")


def train_student(
    student: Student,
    views: ViewSet,
    out: Path,
    settings: dict[str, Any],
    deepspeed: dict[str, Any] | None = None,
    resident: ResidentPhotos | None = None,
    compiled: bool = False,
) -> list[dict[str, Any]] | None:
    """Train a student that has inherited its weights, and write it to `out`, which is locked for these settings.

    Args:
        views: to train on; a `TeacherCache` must be filled, and without one the teacher's outputs are computed at every step.
        settings: that identify the run.
        deepspeed: its configuration, from `zero.find_config`; torch's own data parallelism by default.
        resident: the photos of `views`, where the device keeps them; only with teacher outputs computed at every step.
        compiled: compile teacher and student.

    Returns:
        The Trainer's log of the whole run; None where the run was interrupted and a checkpoint saved.

    Raises:
        UserError: photos are too few.
    """
    tower, teacher, recipe, mapping, _ = student
    own = own_device()
    device = own.type
    bf16 = native_dtype(own) == torch.bfloat16
    steps = -(-recipe.views // recipe.batch_size)
    size, count = tower.config.image_size, len(views.photos)
    test = held_out(views.photos)
    excluded = {*test, *views.unreadable}
    indices = [i for i in range(count) if i not in excluded]
    rows = [view * count + i for view in range(views.views) for i in indices]
    test_rows = [i for i in test if i not in views.unreadable]  # view 0, the evaluation transform
    if not rows or not test_rows:
        raise UserError(f"{count} photos are too few: none is left to train on, or none to hold out")
    live_teacher = None
    if isinstance(views, TeacherCache):
        train_views, tests, statistics = CachedViews(views, rows, size), CachedViews(views, test_rows, size), views.statistics()
    else:
        live_teacher = LiveTeacher(teacher, None if tower.config.budgets else tower.initial_roi.weight.detach(), own)
        train_views = LiveViews(views, rows, size) if resident is None else ResidentViews(views, resident, rows)
        tests, statistics = held_out_batches(views, test_rows, size, live_teacher), live_statistics(views, indices, live_teacher)

    if compiled:
        compile_parts(tower, live_teacher)
    model = Distillation(tower, statistics, recipe.dense_weight, recipe.whitened)
    if deepspeed is not None:
        register_external_parameters(tower)
    average: dict[str, Tensor] = {}
    args = arguments(
        out,
        device,
        steps,
        recipe.batch_size,
        save_steps=max(1, min(SAVE_EVERY[device], steps // 4)),
        warmup_steps=min(recipe.warmup_steps, steps // 5),
        deepspeed=with_sizes(deepspeed, tower.config.width),
        bf16=bf16,
        logging_nan_inf_filter=False,  # the filter would wait for the GPU at every step, and hide a loss that is not finite
        seed=settings["seed"],
        eval_strategy="steps",
        eval_steps=max(1, min(200, steps // 4)),
    )
    with StopOnSignal() as stop:
        trainer = BootstrapTrainer(
            model=model,
            args=args,
            train_dataset=train_views,
            eval_dataset=tests,
            data_collator=collate,
            callbacks=[
                StopWhenComplete(),
                AveragedWeights(model, average, recipe.ema),
                MarkComplete(),
                TrimMemory(),
                stop,
                ProgressLine("views", recipe.batch_size),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.groups = groups_of(tower, mapping, recipe)
        # the Trainer has moved the tower to its device
        average.update({name: p.float() for name, p in _copies(tower).items()})
        trainer.average, trainer.bf16 = average, bf16
        trainer.live_teacher, trainer.unreadable = live_teacher, set()
        trainer.augment = Augmentation(views.size if views.fit == "whole" else size, views.size, resident, recipe.mixed, settings["seed"])
        trainer.budgets = tower.config.budgets
        trainer.small, trainer.canvas_size = recipe.small, views.size
        if compiled:
            trainer.uncompiled = partial(torch.compiler.set_stance, "force_eager")
        checkpoint = latest_checkpoint(out / "checkpoints", steps)
        if checkpoint is not None:
            for name, value in load_file(checkpoint / "average.safetensors").items():
                average[name].copy_(value)
        with training_attention(own):
            if checkpoint is None:
                trainer.evaluate()
            with compiling("teacher or student"):
                run_trainer(trainer, checkpoint)
            if trainer.state.global_step < steps:
                return None
            trainer.evaluate()
    views.unreadable |= {index: _why(views, index) for index in set().union(*of_all_processes(trainer.unreadable))}
    if rank() == 0:
        # under ZeRO-3 no process holds the trained tower entirely
        trained = SparseFormer(tower.config)
        _copy_into(trained, average)
        trained.save_pretrained(out)
        write_history(out, settings, teacher, trainer.state.log_history, list(views.unreadable.values()))
    return trainer.state.log_history


def _why(views: ViewSet, index: int) -> str:
    """Why a photo could not be read."""
    try:
        views.photos[index].load()
    except ImageError as error:
        return str(error)
    return f"{views.photos[index].key}: could not be read, and now can"


def _copies(tower: SparseFormer) -> dict[str, Tensor]:
    with gathered_parameters(tower.parameters()):
        return {name: p.detach().clone() for name, p in tower.named_parameters()}


@torch.no_grad()
def _copy_into(tower: SparseFormer, values: dict[str, Tensor]) -> None:
    with gathered_parameters(tower.parameters(), change=True):
        for name, parameter in tower.named_parameters():
            parameter.copy_(values[name])


def write_history(out: Path, settings: dict[str, Any], teacher: Teacher, history: list[dict[str, Any]], unreadable: list[str]) -> None:
    """Write `loss.png`, then `training.json` (settings, curves, photos that could not be read)."""
    from matplotlib.figure import Figure

    provenance = {"teacher": teacher.spec.name, "teacher_licence": teacher.spec.licence}
    outcome = {"unreadable": unreadable, "files": written_files(out), "history": curve_of(history)}
    document = {"settings": settings, **provenance, **outcome}
    batch = settings["batch_size"]
    train = [(h["step"] * batch, h["loss"]) for h in history if "loss" in h]
    held_out = [(h["step"] * batch, h["eval_cosine"], h["eval_token_cosine"]) for h in history if "eval_cosine" in h]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1)
    left.set(title="training loss", xlabel="views", ylabel="1 - cosine, plus tokens")
    views, cosine, tokens = zip(*held_out, strict=True)
    right.plot(views, cosine, marker="o", markersize=3, label="embedding")
    right.plot(views, tokens, marker="o", markersize=3, label="tokens")
    right.set(title="held-out photos, averaged weights", xlabel="views", ylabel="centred cosine to the teacher")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(settings["recipe"])
    save_figure(figure, out / "loss.png", dpi=130)
    write_text(out / HISTORY, json.dumps(document, indent=1) + "\n")  # last: it marks the run as complete
