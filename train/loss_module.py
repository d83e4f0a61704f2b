"""Loss module, collate function and Trainer: token trees and images in, the loss out.

Shape legend: N tokens an image, d width of the tower, D width of the LLM, h x w pixels of an image, H x W of a batch's canvas.
Images come as the tower's cached tokens (N, d), as pixels (3, h, w) where the tower learns, or as embeddings (N, D) that stand in an
image's place (`train.text_images`).

Notable: batches without images run on zeros with weight 0, so that all ranks run the same collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from sparse_vlm.data.bad_images import blank, broken
from sparse_vlm.data.samples import Sample
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import Inputs, Preprocessor
from sparse_vlm.tower import SparseFormerConfig
from sparse_vlm.train.finite import FiniteSteps, NotFinite
from sparse_vlm.train.parts import FLASH, SDPA, Group
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.tree import TreeBatch, collate, is_chain, pack, target_log_probs


class LiveImages:
    """Pixels of photos, (3, h, w), for a tower that is trained; used like a `FeatureCache`.

    Args:
        config: of the tower.
        photos: in a fixed order.
        owner: whether this process makes sure beforehand that they can be read.
        threads: that decode them then.
    """

    def __init__(self, config: SparseFormerConfig, photos: Sequence[Photo], owner: bool = True, threads: int = 1) -> None:
        self.preprocessor = Preprocessor.of(config)
        self.photos, self.owner, self.threads = photos, owner, threads
        self._read: set[int] = set()
        self._blank: frozenset[int] = frozenset()

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Photos of `wanted` that were not read yet."""
        return [index for index in wanted if index not in self._read] if self.owner else []

    def fill(self, wanted: Sequence[int], on_photos: Any = lambda photos: None, on_bad: Any = None) -> None:
        """Decode photos once to find those that cannot be read; arguments as `FeatureCache.fill`."""
        missing = self.missing(wanted)
        if missing and on_bad is not None:
            broken(self.photos, missing, on_bad, on_photos, self.threads)
        self._read.update(missing)

    def stand_in(self, photos: Collection[int]) -> None:
        """Replace some photos by a blank image."""
        self._blank = frozenset(photos)

    def __getitem__(self, index: int) -> Tensor:
        """(3, h, w), normalised."""
        prepare = self.preprocessor
        return prepare.pixels(blank(prepare.size, prepare.mean) if index in self._blank else prepare.load(self.photos[index]))


class LossModule(nn.Module):
    """The module that the Trainer trains; its state dict holds the trainable tensors.

    Args:
        project: whether images go through the projector; else they are in the LLM's width already.
    """

    def __init__(self, vlm: VLM, project: bool = True) -> None:
        super().__init__()
        self.model, self.project = vlm.model, project
        self.live = any(parameter.requires_grad for parameter in vlm.tower.parameters())
        self.attention = vlm.model.model.language_model.config._attn_implementation
        side = vlm.tower.config.image_size
        # in the place of a batch's images where it has none
        self.nothing = (1, 3, side, side) if self.live else (1, vlm.tower.config.visual_tokens, vlm.tower.config.width)

    def forward(
        self, trees: TreeBatch, images: Tensor | Inputs | None, chains: bool = False, count: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Negative log-likelihood of the targets.

        Args:
            images: (images, N, d) of the tower, `Inputs` of it where it learns, or (images, N, D); None without images.
            chains: whether every tree is one conversation, which needs no mask of its own.
            count: targets to divide the sum by; those of these trees, for a mean, unless given.
        """
        features = self.features(images) if images is not None and self.project else images
        log_probs = target_log_probs(self.model, trees, features, plain_causal=self._attend(chains))
        loss = -log_probs.sum() / (len(log_probs) if count is None else count)
        if images is None and self.project:
            nothing = torch.zeros(self.nothing, device=log_probs.device)
            loss = loss + 0.0 * self.features(Inputs(nothing, None) if self.live else nothing).sum()
        return {"loss": loss}

    def features(self, images: Tensor | Inputs) -> Tensor:
        """Images to tokens in the LLM's width: (images, N, D)."""
        if self.live:
            images = self.model.model.vision_tower.tower.visual_tokens(*images)
        return self.model.model.multi_modal_projector(images.float())

    def _attend(self, chains: bool) -> bool:
        """Whether the LLM's own causal mask will do for this batch, without which SDPA's flash kernel and flash-attention do not run."""
        if self.attention == FLASH:
            self.model.model.language_model.config._attn_implementation = FLASH if chains else SDPA
        return self.attention in (FLASH, SDPA) and chains

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Trainable tensors."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse of `state_dict`; always strict."""
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise UserError(
                f"checkpoint does not match the trainable parameters (first mismatch: {sorted(own.keys() ^ state_dict.keys())[0]})"
            )
        for name, tensor in own.items():
            tensor.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


class Collator:
    """Collate function: samples to a batch of what `LossModule` takes, and the samples' names; packed for flash-attention."""

    def __init__(self, vlm: VLM) -> None:
        self.renderer, self.pad_id = vlm.renderer, vlm.tokenizer.pad_token_id
        self.preprocessor = Preprocessor.of(vlm.tower.config)
        self.attention = vlm.model.model.language_model.config._attn_implementation

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A batch; images that come as pixels share a canvas.

        Raises:
            UserError: a sample whose placeholders and images do not match.
        """
        for sample in samples:
            self.renderer.check_count(sample.tree.ids, len(sample.images), sample.name)
        trees = [sample.tree for sample in samples]
        chains = all(map(is_chain, trees))
        return {
            "trees": pack(trees) if chains and self.attention == FLASH else collate(trees, self.pad_id),
            "images": self._together([image for sample in samples for image in sample.images]),
            "chains": chains,
            "names": [sample.name for sample in samples],
        }

    def _together(self, images: Sequence[Tensor]) -> Tensor | Inputs | None:
        if not images:
            return None
        return self.preprocessor.batch(images) if images[0].ndim == 3 else torch.stack(list(images))


class VLMTrainer(Trainer):
    """A Trainer with parameter groups, samples in their order, and no update from steps that are not finite."""

    groups: list[Group]
    finite: FiniteSteps

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss of a part is divided by the targets of the whole
        if not self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = 1  # and not by the number of parts, as transformers 5.3 lets accelerate do

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, a group a learning rate."""
        if self.optimizer is None:
            groups = [{"params": list(group.parameters), "lr": group.lr} for group in self.groups if group.lr is not None]
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=self.args.weight_decay, fused=True)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss; one that is not finite in some process raises in all."""
        names = inputs.pop("names")
        out = model(**inputs, count=kwargs.get("num_items_in_batch"))
        self.finite.check(out["loss"], names)
        return (out["loss"], out) if return_outputs else out["loss"]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Targets of a step, of all parts of its batch in all processes, as a share of one process: each target counts the same."""
        count = torch.tensor(float(sum(len(batch["trees"].target_ids) for batch in batch_samples)), device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(count)
            count /= dist.get_world_size()
        return count

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A step without an update where the loss is not finite."""
        try:
            return super().training_step(*args, **kwargs)
        except NotFinite as error:
            return error.loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing where DeepSpeed is the engine: its own checkpoint holds what is trained, and would hold all that is frozen besides."""
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.args.device) if hasattr(value, "to") else value for name, value in inputs.items()}
