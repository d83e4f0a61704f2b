"""Teaching an LLM to read a tower's tokens, in LLaVA's two stages and one before them.

    sparse-vlm train --stage read --tower tiny --data 'photos/*.tar' --out build/read
    sparse-vlm train --stage align --init build/read --data 'photos/*.tar' --out build/align
    sparse-vlm train --stage instruct --init build/align --data 'photos/*.tar' --out build/chat

`read` teaches a small LLM to answer from words that stand in an image's place (`train.text_images`); larger ones do without. `align` trains
the projector alone, on captions and names, after it has learnt words without the LLM (`train.vocabulary`); `instruct` trains projector, LLM
(LoRA on every linear layer, or all of it). The tower is frozen unless it is asked to learn, itself or through adapters (`train.parts`).

Notable: runs on transformers' Trainer, also in several processes (`torchrun --nproc-per-node N --no-python sparse-vlm train ...`), which
share each batch, and with `--deepspeed` also optimizer, gradients and weights. A photo is one sample: everything that is said about it is a
tree of tokens that shares the photo's (`sparse_vlm.vlm.tree`), and a frozen tower's tokens come from a cache on disk, so a step costs the
LLM and nothing else. What is frozen stays as it was loaded and out of checkpoints; what is trained is float32. A run that is interrupted
(Ctrl-C saves first) goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from sparse_vlm.data.samples import FeatureCache, Sample
from sparse_vlm.errors import UserError
from sparse_vlm.train.finite import FiniteSteps
from sparse_vlm.train.loss_module import Collator, LiveImages, LossModule, Samples, VLMTrainer
from sparse_vlm.train.parts import Group, Rates, choose_attention, computes_in_bfloat16, prepare, save_memory
from sparse_vlm.train.progress import ProgressLine
from sparse_vlm.train.run import (
    HISTORY,
    EndsInTime,
    GiveBackMemory,
    MarkWhole,
    StopOnSignal,
    arguments,
    carry_out,
    curve_of,
    finished,
    latest_checkpoint,
    locked_run,
    made,
    reporters,
)
from sparse_vlm.train.text_images import WordImages
from sparse_vlm.train.zero import gathered, register_external_parameters, shares_weights, with_sizes
from sparse_vlm.utils.devices import rank, training_attention, world_size
from sparse_vlm.utils.files import atomic_path, write_text
from sparse_vlm.vlm import VLM

__all__ = ["ENGINE", "STAGES", "Engine", "Group", "Stage", "choose_attention", "prepare", "train", "write_history"]


@dataclass(frozen=True)
class Stage(Rates):
    """One stage of training: its rates, and what else is its own.

    Attributes:
        batch_size: photos a step.
        pictures_of_words: whether words stand in an image's place (`train.text_images`).
        word_epochs: how often a new projector goes over the photos to learn words (`train.vocabulary`) before the stage begins.
    """

    batch_size: int = 16
    pictures_of_words: bool = False
    word_epochs: int = 0
    weight_decay: float = 0.0
    warmup: float = 0.05  # of the steps


STAGES: dict[str, Stage] = {
    "read": Stage(lr_projector=None, lr_lora=4e-4, lr_full=5e-5, batch_size=2, pictures_of_words=True),
    "align": Stage(lr_projector=1e-3, lr_lora=None, lr_full=None, lr_tower_lora=2e-4, lr_tower_full=2e-5, word_epochs=5),
    "instruct": Stage(lr_projector=5e-4, lr_lora=4e-4, lr_full=5e-5, lr_tower_lora=2e-4, lr_tower_full=2e-5),
}


AT_ONCE = 4


@dataclass(frozen=True)
class Engine:
    """How a run is carried out; what it learns is the same, up to rounding.

    Attributes:
        deepspeed: its configuration, from `zero.find_config`; torch's own data parallelism without.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        report_to: names in `run.REPORTERS`.
        max_bad_steps: so many steps in a row that are not finite end the run.
        at_once: photos that a process computes at a time, of its share of a batch; unless given, all on a GPU and `AT_ONCE` at most on a
            CPU, which needs a third of the memory for it.
    """

    deepspeed: dict[str, Any] | None = None
    gradient_checkpointing: bool = False
    report_to: tuple[str, ...] = ()
    max_bad_steps: int = 3
    at_once: int | None = None

    @property
    def shares_weights(self) -> bool:
        """Whether each process holds a part of the weights alone (ZeRO-3)."""
        return shares_weights(self.deepspeed)

    def part(self, batch_size: int, device: str) -> int | None:
        """Photos that a process computes at a time, of a batch of so many in all processes; None for its whole share."""
        if self.at_once is not None or device != "cpu" or self.deepspeed is not None:
            return self.at_once
        share = batch_size // world_size()
        return next(size for size in range(min(AT_ONCE, max(share, 1)), 0, -1) if share % size == 0)


ENGINE = Engine()


class TrainedAlone(TrainerCallback):
    """DeepSpeed's checkpoints without what is frozen."""

    trainer: VLMTrainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The engine exists by now."""
        engine = self.trainer.model_wrapped
        engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)


def train(
    vlm: VLM,
    groups: list[Group],
    stage: Stage,
    samples: Sequence[Sample],
    features_cache: FeatureCache | LiveImages | WordImages,
    out: Path,
    settings: dict[str, Any],
    max_steps: int | None = None,
    seed: int = 0,
    engine: Engine = ENGINE,
) -> bool:
    """Train and write the VLM to `out`.

    Args:
        vlm: from `prepare`, which also made `groups`.
        samples: arranged; learnt from once, in this order.
        features_cache: holds what the learner is shown of all their photos: pixels where the tower learns.
        settings: what makes this run this run; `out` is tied to it.

    Returns:
        True when the run is complete; False when it was interrupted and saved.

    Raises:
        UserError: `out` holds a run of other settings, or too many steps in a row were not finite.
    """
    if engine.shares_weights and vlm.quantized is not None:
        raise UserError(f"--deepspeed: ZeRO-3 cannot share weights in {vlm.quantized}; take zero1 or zero2, or leave --quantize out")
    if finished(out, settings):
        return True
    with locked_run(out, settings):
        return _train(vlm, groups, stage, samples, features_cache, out, settings, max_steps, seed, engine)


def _train(
    vlm: VLM,
    groups: list[Group],
    stage: Stage,
    samples: Sequence[Sample],
    features_cache: FeatureCache | LiveImages | WordImages,
    out: Path,
    settings: dict[str, Any],
    max_steps: int | None,
    seed: int,
    engine: Engine,
) -> bool:
    """`train` in a folder that is locked for these settings."""
    batch = min(stage.batch_size, len(samples))
    steps = len(samples) // batch if max_steps is None else min(max_steps, len(samples) // batch)
    device = vlm.model.device.type
    if engine.gradient_checkpointing:
        save_memory(vlm, engine.shares_weights)
    if engine.deepspeed is not None:
        register_external_parameters(vlm.tower)
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
    with StopOnSignal() as stop:
        finite = FiniteSteps(engine.max_bad_steps, engine.deepspeed is not None, args.gradient_accumulation_steps > 1)
        trainer = VLMTrainer(
            model=LossModule(vlm, project=not stage.pictures_of_words),
            args=args,
            train_dataset=Samples(samples, features_cache),
            data_collator=Collator(vlm),
            callbacks=[
                EndsInTime(),
                finite,
                stop,
                MarkWhole(),
                GiveBackMemory(),
                ProgressLine("photos", batch),
                *reporters(engine.report_to, out),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.groups, trainer.finite = groups, finite
        if engine.deepspeed is not None:
            alone = TrainedAlone()
            alone.trainer = trainer
            trainer.add_callback(alone)
        checkpoint = latest_checkpoint(out / "checkpoints", steps)
        with training_attention(vlm.model.device):
            carry_out(trainer, checkpoint)
        complete = trainer.state.global_step >= steps
    if complete:
        tensors = gathered(vlm.own_tensors())
        if rank() == 0:
            vlm.new_projector = vlm.new_projector and stage.lr_projector is None
            vlm.save_pretrained(out, tensors=tensors)
            write_history(out, settings, trainer.state.log_history, batch)
    return complete


def write_history(out: Path, settings: dict[str, Any], history: list[dict[str, Any]], batch_size: int) -> None:
    """`loss.png` and `training.json` (settings and curve)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = [(entry["step"] * batch_size, float(entry["loss"])) for entry in history if "loss" in entry]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(*zip(*points, strict=True), linewidth=1)
    axis.set(title=f"stage {settings['stage']}", xlabel="photos", ylabel="negative log-likelihood a token")
    axis.grid(alpha=0.3)
    with atomic_path(out / "loss.png") as part:
        figure.savefig(part, dpi=130, format="png")
    plt.close(figure)
    # last: it says that the run is complete
    write_text(out / HISTORY, json.dumps({"settings": settings, "files": made(out), "history": curve_of(history)}, indent=1) + "\n")
