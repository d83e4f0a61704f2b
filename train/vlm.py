"""Training a VLM: LLaVA's two stages, and text-as-image pretraining of the LLM before them.

    sparse-vlm train --stage read --tower tiny --data 'photos/*.tar' --out build/read
    sparse-vlm train --stage align --init build/read --data 'photos/*.tar' --out build/align
    sparse-vlm train --stage instruct --init build/align --data 'photos/*.tar' --out build/chat

`read` trains a small LLM to answer from words in the place of an image (`train.text_images`); larger LLMs do not need it. `align` trains
the projector alone, on captions and labels, after vocabulary pretraining without the LLM (`train.vocabulary`); `instruct` trains the
projector and the LLM (LoRA on every linear layer, or all weights). The tower is frozen unless it or its adapters are trained
(`train.parts`).

Notable: this is transformers' Trainer, also under `torchrun --nproc-per-node N --no-python sparse-vlm train ...`, where processes share
each batch and, with `--deepspeed`, also optimizer states, gradients and weights. All conversations about an image are one sample: a token
tree in which they share the image's tokens (`sparse_vlm.vlm.tree`). Features of a frozen tower come from a cache on disk, so a step costs
the LLM alone. Frozen weights keep their dtype and are in no checkpoint; trained weights are float32.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from sparse_vlm.data.samples import TokenizedDataset
from sparse_vlm.errors import UserError
from sparse_vlm.tower.visualize import save_figure
from sparse_vlm.train.finite import FiniteSteps
from sparse_vlm.train.loss_module import Collator, LossModule, VLMTrainer
from sparse_vlm.train.parts import Group, Rates, choose_attention, computes_in_bfloat16, prepare, save_memory
from sparse_vlm.train.progress import ProgressLine
from sparse_vlm.train.run import (
    HISTORY,
    MarkComplete,
    StopOnSignal,
    StopWhenComplete,
    TrimMemory,
    arguments,
    curve_of,
    finished,
    latest_checkpoint,
    locked_run,
    reporters,
    run_trainer,
    written_files,
)
from sparse_vlm.train.zero import gather_state_dict, register_external_parameters, shares_weights, with_sizes
from sparse_vlm.utils.devices import rank, training_attention, world_size
from sparse_vlm.utils.files import write_text
from sparse_vlm.vlm import VLM

__all__ = ["ENGINE", "STAGES", "Engine", "Group", "Stage", "choose_attention", "prepare", "train", "write_history"]


@dataclass(frozen=True)
class Stage(Rates):
    """One stage of training.

    Attributes:
        batch_size: photos a step.
        text_as_images: whether words take the place of images (`train.text_images`).
        word_epochs: epochs of vocabulary pretraining of a new projector (`train.vocabulary`) before the stage.
    """

    batch_size: int = 16
    text_as_images: bool = False
    word_epochs: int = 0
    weight_decay: float = 0.0
    warmup: float = 0.05  # of the steps


STAGES: dict[str, Stage] = {
    "read": Stage(lr_projector=None, lr_lora=4e-4, lr_full=5e-5, batch_size=2, text_as_images=True),
    "align": Stage(lr_projector=1e-3, lr_lora=None, lr_full=None, lr_tower_lora=2e-4, lr_tower_full=2e-5, word_epochs=5),
    "instruct": Stage(lr_projector=5e-4, lr_lora=4e-4, lr_full=5e-5, lr_tower_lora=2e-4, lr_tower_full=2e-5),
}


AT_ONCE = 4


@dataclass(frozen=True)
class Engine:
    """How a run is computed; the results are equal up to rounding.

    Attributes:
        deepspeed: its configuration, from `zero.find_config`; torch's own data parallelism without.
        gradient_checkpointing: recompute activations in the backward pass.
        report_to: names in `run.REPORTERS`.
        max_bad_steps: number of consecutive non-finite steps that ends the run.
        at_once: samples that a process computes at a time (micro batch); by default all on a GPU and at most `AT_ONCE` on a CPU, which
            takes a third of the memory.
    """

    deepspeed: dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()
    max_bad_steps: int = 3
    at_once: int | None = None

    @property
    def shares_weights(self) -> bool:
        """Whether weights are partitioned over processes (ZeRO-3)."""
        return shares_weights(self.deepspeed)

    def part(self, batch_size: int, device: str) -> int | None:
        """Micro batch size, given the batch size of all processes; None for a process's whole share."""
        if self.at_once is not None or device != "cpu" or self.deepspeed is not None:
            return self.at_once
        share = batch_size // world_size()
        return next(size for size in range(min(AT_ONCE, max(share, 1)), 0, -1) if share % size == 0)


ENGINE = Engine()


class TrainableCheckpoints(TrainerCallback):
    """Keeps frozen parameters out of DeepSpeed's checkpoints."""

    trainer: VLMTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the engine's `save_checkpoint`; the engine exists by now."""
        engine = self.trainer.model_wrapped
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)


def train(
    vlm: VLM,
    groups: list[Group],
    stage: Stage,
    samples: TokenizedDataset,
    out: Path,
    settings: dict[str, Any],
    max_steps: int | None = None,
    seed: int = 0,
    engine: Engine = ENGINE,
) -> list[dict[str, Any]] | None:
    """Train and write the VLM to `out`.

    Args:
        vlm: from `prepare`, which also made `groups`.
        samples: arranged and with images (`TokenizedDataset.with_images`); trained on once, in this order.
        settings: what identifies the run; `out` is locked to them.

    Returns:
        What was logged, when the run is complete; None when it was interrupted and saved.

    Raises:
        UserError: `out` holds a run of other settings, or too many steps in a row were not finite.
    """
    if engine.shares_weights and vlm.quantized is not None:
        raise UserError(f"--deepspeed: ZeRO-3 cannot share weights in {vlm.quantized}; take zero1 or zero2, or leave --quantize out")
    if finished(out, settings):
        return json.loads((out / HISTORY).read_text())["history"]
    batch = min(stage.batch_size, len(samples))
    steps = len(samples) // batch if max_steps is None else min(max_steps, len(samples) // batch)
    with locked_run(out, settings):
        if engine.gradient_checkpointing:
            save_memory(vlm, engine.shares_weights)
        if engine.deepspeed is not None:
            register_external_parameters(vlm.tower)
        with StopOnSignal() as stop:
            trainer = _trainer(vlm, groups, stage, samples, out, batch, steps, seed, engine, stop)
            checkpoint = latest_checkpoint(out / "checkpoints", steps)
            with training_attention(vlm.model.device):
                run_trainer(trainer, checkpoint)
        if trainer.state.global_step < steps:
            return None
        tensors = gather_state_dict(vlm.own_tensors())
        if rank() == 0:
            vlm.new_projector = vlm.new_projector and stage.lr_projector is None
            vlm.save_pretrained(out, tensors=tensors)
            write_history(out, settings, trainer.state.log_history, batch)
    return curve_of(trainer.state.log_history)


def _trainer(
    vlm: VLM,
    groups: list[Group],
    stage: Stage,
    samples: TokenizedDataset,
    out: Path,
    batch: int,
    steps: int,
    seed: int,
    engine: Engine,
    stop: StopOnSignal,
) -> VLMTrainer:
    device = vlm.model.device.type
    args = arguments(
        out,
        device,
        steps,
        batch,
        save_steps=max(1, min(50, steps // 4)),
        deepspeed=with_sizes(engine.deepspeed, vlm.model.config.text_config.hidden_size),
        at_once=engine.part(batch, device),
        warmup_steps=max(1, round(stage.warmup * steps)),
        weight_decay=stage.weight_decay,
        bf16=computes_in_bfloat16(vlm),
        seed=seed,
    )
    finite = FiniteSteps(engine.max_bad_steps, engine.deepspeed is not None, args.gradient_accumulation_steps > 1)
    callbacks = [StopWhenComplete(), finite, stop, MarkComplete(), TrimMemory(), ProgressLine("photos", batch)]
    trainer = VLMTrainer(
        model=LossModule(vlm, project=not stage.text_as_images),
        args=args,
        train_dataset=samples,
        data_collator=Collator(vlm),
        callbacks=[*callbacks, *reporters(engine.report_to, out)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.groups, trainer.finite = groups, finite
    if engine.deepspeed is not None:
        alone = TrainableCheckpoints()
        alone.trainer = trainer
        trainer.add_callback(alone)
    return trainer


def write_history(out: Path, settings: dict[str, Any], history: list[dict[str, Any]], batch_size: int) -> None:
    """`loss.png` and `training.json` (settings and curve)."""
    from matplotlib.figure import Figure

    points = [(entry["step"] * batch_size, float(entry["loss"])) for entry in history if "loss" in entry]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(*zip(*points, strict=True), linewidth=1)
    axis.set(title=f"stage {settings['stage']}", xlabel="photos", ylabel="negative log-likelihood a token")
    axis.grid(alpha=0.3)
    save_figure(figure, out / "loss.png", dpi=130)
    # last: it says that the run is complete
    document = {"settings": settings, "files": written_files(out), "history": curve_of(history)}
    write_text(out / HISTORY, json.dumps(document, indent=1) + "\n")
