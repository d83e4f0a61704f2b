"""Teaching an LLM to read a tower's tokens, in LLaVA's two stages and one before them.

    sparse-vlm train --stage read --tower tiny --data 'photos/*.tar' --out build/read
    sparse-vlm train --stage align --init build/read --data 'photos/*.tar' --out build/align
    sparse-vlm train --stage instruct --init build/align --data 'photos/*.tar' --out build/chat

`read` teaches a small LLM to answer from words that stand in a picture's place (`train.reading`); larger ones do without. `align` trains
the projector alone, on captions and names, after it has learnt words without the LLM (`train.words`); `instruct` trains projector and LLM
(LoRA on every linear layer, or all of it).

Notable: runs on transformers' Trainer, also in several processes (`torchrun --nproc-per-node N --no-python sparse-vlm train ...`), which
share each batch. A photo is one sample: everything that is said about it is a tree of tokens that shares the photo's
(`sparse_vlm.vlm.tree`), and the tower's tokens come from a cache on disk, so a step costs the LLM and nothing else. What is frozen stays
in bfloat16 and out of checkpoints; what is trained is float32. A run that is interrupted (Ctrl-C saves first) goes on from its last
checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer

from sparse_vlm.data.samples import Sample, TokenBank
from sparse_vlm.devices import native_dtype, rank
from sparse_vlm.errors import UserError
from sparse_vlm.files import write_text
from sparse_vlm.train.progress import ProgressLine
from sparse_vlm.train.reading import WordPictures
from sparse_vlm.train.run import MarkWhole, StopOnSignal, arguments, claim, latest_checkpoint
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.tree import TreeBatch, collate, target_log_probs


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        lr_projector: learning rate of the projector; None leaves it as it is.
        lr_lora, lr_full: of the LLM, through adapters or in full; None leaves the LLM frozen.
        batch_size: photos a step.
        pictures_of_words: whether words stand in a picture's place (`train.reading`).
        word_epochs: how often a new projector goes over the photos to learn words (`train.words`) before the stage begins.
    """

    lr_projector: float | None
    lr_lora: float | None
    lr_full: float | None
    batch_size: int = 16
    pictures_of_words: bool = False
    word_epochs: int = 0
    weight_decay: float = 0.0
    warmup: float = 0.05  # of the steps


STAGES: dict[str, Stage] = {
    "read": Stage(lr_projector=None, lr_lora=4e-4, lr_full=5e-5, batch_size=2, pictures_of_words=True),
    "align": Stage(lr_projector=1e-3, lr_lora=None, lr_full=None, word_epochs=5),
    "instruct": Stage(lr_projector=5e-4, lr_lora=4e-4, lr_full=5e-5),
}


@dataclass(frozen=True)
class Group:
    """Parameters that learn at one rate; `lr` None for those that do not learn."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    lr: float | None

    @property
    def size(self) -> int:
        """Numbers in all its tensors."""
        return sum(parameter.numel() for parameter in self.parameters)


def prepare(vlm: VLM, stage: Stage, lora_rank: int | None, seed: int = 0) -> list[Group]:
    """Make trainable what the stage trains, in float32.

    Args:
        lora_rank: of the LLM's adapters, where it has none yet; None trains the LLM itself.
        seed: of new adapters.

    Returns:
        Groups that cover every parameter once.

    Raises:
        UserError: adapters and full training at once.
    """
    vlm.model.requires_grad_(False)
    vlm.projector.float()
    llm_lr = None
    language = vlm.model.model.language_model
    if stage.lr_lora is not None and lora_rank is not None:
        if vlm.peft is None:
            vlm.add_adapters(lora_rank, seed)
        for name, parameter in language.named_parameters():
            parameter.requires_grad_("lora_" in name)
        llm_lr = stage.lr_lora
        _leave_inputs_alone(language)
    elif stage.lr_full is not None:
        if vlm.peft is not None:
            raise UserError("the model to start from has adapters, and full training would lose them; leave --full out")
        language.float().requires_grad_(True)
        vlm.llm_changed = True
        llm_lr = stage.lr_full
    vlm.projector.requires_grad_(stage.lr_projector is not None)
    if vlm.model.device.type == "cpu":
        # at a few hundred tokens a tree, plain attention takes a quarter less of a step than the fused kernel
        language.set_attn_implementation("eager")
    trained = [p for p in language.parameters() if p.requires_grad]
    frozen = [p for p in language.parameters() if not p.requires_grad]
    groups = [
        Group("tower", tuple(vlm.tower.parameters()), None),
        Group("projector", tuple(vlm.projector.parameters()), stage.lr_projector),
        Group("LLM", tuple(frozen), None),
        Group("LLM" if lora_rank is None else "LLM adapters", tuple(trained), llm_lr),
    ]
    return [group for group in groups if group.parameters]


def _leave_inputs_alone(language: nn.Module) -> None:
    """Autocast decides the adapters' dtype; PEFT would copy every activation to float32 first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in language.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False


class Learner(nn.Module):
    """What the Trainer sees: token trees and the tower's tokens in, the loss out; its state dict is what is trained.

    Args:
        project: whether pictures come as the tower's tokens; else they are in the LLM's width already.
    """

    def __init__(self, vlm: VLM, project: bool = True) -> None:
        super().__init__()
        self.model, self.project = vlm.model, project

    def forward(self, trees: TreeBatch, tokens: Tensor | None) -> dict[str, Tensor]:
        """Mean negative log-likelihood of the targets.

        Args:
            tokens: (pictures, N, d) of the tower, or (pictures, N, D); None without pictures.
        """
        if tokens is not None and self.project:
            tokens = self.model.model.multi_modal_projector(tokens.float())
        said = target_log_probs(self.model, trees, tokens)
        count = torch.tensor(float(len(said)), device=said.device)
        if dist.is_available() and dist.is_initialized():
            # of several processes each counts its targets as the whole batch would, not as its part
            dist.all_reduce(count)
            count /= dist.get_world_size()
        loss = -said.sum() / count
        if tokens is None:
            # a batch without pictures: the projector has a gradient all the same, and it is zero
            loss = loss + sum(0.0 * parameter.sum() for parameter in self.model.model.multi_modal_projector.parameters())
        return {"loss": loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Trained tensors alone."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse of `state_dict`; always strict."""
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise UserError(f"the checkpoint holds other tensors than this run trains ({sorted(own.keys() ^ state_dict.keys())[0]})")
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


class Samples(Dataset):
    """Samples in the order in which they are learnt from, each with the tokens of its photos: (photos, N, d)."""

    def __init__(self, samples: Sequence[Sample], bank: TokenBank | WordPictures) -> None:
        self.samples, self.bank = samples, bank

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Sample, Tensor | None]:
        sample = self.samples[index]
        return sample, torch.stack([self.bank[photo] for photo in sample.photos]) if sample.photos else None


class LearnerTrainer(Trainer):
    """The Trainer with our groups, keeping the samples' order."""

    groups: list[Group]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, a group a learning rate."""
        if self.optimizer is None:
            groups = [{"params": list(group.parameters), "lr": group.lr} for group in self.groups if group.lr is not None]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay, fused=True)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss as the learner computes it."""
        out = model(**inputs)
        return (out["loss"], out) if return_outputs else out["loss"]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value if value is None else value.to(self.args.device) for name, value in inputs.items()}


def train(
    vlm: VLM,
    groups: list[Group],
    stage: Stage,
    samples: Sequence[Sample],
    bank: TokenBank | WordPictures,
    out: Path,
    settings: dict[str, Any],
    max_steps: int | None = None,
    seed: int = 0,
) -> bool:
    """Train and write the VLM to `out`.

    Args:
        vlm: from `prepare`, which also made `groups`.
        samples: arranged; learnt from once, in this order.
        bank: holds the tokens of all their photos.
        settings: what makes this run this run; `out` is tied to it.

    Returns:
        True when the run is complete; False when it was interrupted and saved.

    Raises:
        UserError: `out` holds a run of other settings.
    """
    if rank() == 0:
        claim(out, settings)
    batch = min(stage.batch_size, len(samples))
    steps = len(samples) // batch if max_steps is None else min(max_steps, len(samples) // batch)
    pad_id = vlm.tokenizer.pad_token_id

    def gather(items: list[tuple[Sample, Tensor | None]]) -> dict[str, Any]:
        for sample, found in items:
            vlm.renderer.check_count(sample.tree.ids, 0 if found is None else len(found), sample.name)
        tokens = [t for _, t in items if t is not None]
        return {"trees": collate([sample.tree for sample, _ in items], pad_id), "tokens": torch.cat(tokens) if tokens else None}

    args = arguments(
        out,
        vlm.model.device.type,
        steps,
        batch,
        save_steps=max(1, min(50, steps // 4)),
        warmup_steps=max(1, round(stage.warmup * steps)),
        weight_decay=stage.weight_decay,
        # an LLM that is trained in full is float32 by now, whatever it was loaded in
        bf16=(native_dtype(vlm.model.device) if vlm.llm_changed else vlm.model.dtype) == torch.bfloat16,
        seed=seed,
    )
    with StopOnSignal() as stop:
        trainer = LearnerTrainer(
            model=Learner(vlm, project=not stage.pictures_of_words),
            args=args,
            train_dataset=Samples(samples, bank),
            data_collator=gather,
            callbacks=[stop, MarkWhole(), ProgressLine("photos", batch)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.groups = groups
        checkpoint = latest_checkpoint(out / "checkpoints")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        complete = trainer.state.global_step >= steps
    if complete and rank() == 0:
        vlm.new_projector = vlm.new_projector and stage.lr_projector is None
        vlm.save_pretrained(out)
        write_history(out, settings, trainer.state.log_history, batch)
    return complete


def write_history(out: Path, settings: dict[str, Any], history: list[dict[str, Any]], batch_size: int) -> None:
    """`training.json` (settings and curve) and `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    write_text(out / "training.json", json.dumps({"settings": settings, "history": history}, indent=1) + "\n")

    points = [(entry["step"] * batch_size, float(entry["loss"])) for entry in history if "loss" in entry]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(*zip(*points, strict=True), linewidth=1)
    axis.set(title=f"stage {settings['stage']}", xlabel="photos", ylabel="negative log-likelihood a token")
    axis.grid(alpha=0.3)
    figure.savefig(out / "loss.png", dpi=130)
    plt.close(figure)
