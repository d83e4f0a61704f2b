"""Which parts of a VLM are trained, at which learning rates, and how the LLM computes attention.

Frozen parameters have no gradient, are in no checkpoint and keep their dtype; trained ones are float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from sparse_vlm.errors import UserError
from sparse_vlm.tower import SparseFormer
from sparse_vlm.utils.devices import native_dtype
from sparse_vlm.vlm import VLM


@dataclass(frozen=True)
class Rates:
    """Learning rates of the parts; None leaves a part as it is.

    Attributes:
        lr_projector: of the projector.
        lr_lora, lr_full: of the LLM, through adapters or itself.
        lr_tower_lora, lr_tower_full: of the tower, where it is asked to learn.
    """

    lr_projector: float | None
    lr_lora: float | None
    lr_full: float | None
    lr_tower_lora: float | None = None
    lr_tower_full: float | None = None


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate; `lr` is None if they are frozen."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    lr: float | None

    @property
    def size(self) -> int:
        """Stored elements of all tensors; two 4-bit weights are one."""
        return sum(parameter.numel() for parameter in self.parameters)


def prepare(
    vlm: VLM, rates: Rates, lora_rank: int | None, seed: int = 0, tune_tower: bool = False, tower_rank: int | None = None
) -> list[Group]:
    """Make the trained parts trainable, in float32.

    Args:
        lora_rank: of the LLM's adapters, where it has none yet; None trains the LLM itself.
        seed: of new adapters.
        tune_tower: train the tower itself.
        tower_rank: train adapters of this rank on the tower, where it has none yet.

    Returns:
        Groups that cover every parameter once.

    Raises:
        UserError: adapters and full training of the same part at once, or full training of a quantised LLM.
    """
    vlm.model.requires_grad_(False)
    # PEFT freezes all of a model that it puts adapters on, so the LLM comes first
    llm_lr = _prepare_llm(vlm, rates, lora_rank, seed)
    tower_lr = _prepare_tower(vlm, rates, seed, tune_tower, tower_rank)
    vlm.projector.float().requires_grad_(rates.lr_projector is not None)
    tower, llm = tuple(vlm.tower.parameters()), _llm_parameters(vlm)
    learns = "tower" if tune_tower else "tower adapters"
    groups = [
        Group("tower", _where(tower, False), None),
        Group(learns, _where(tower, True), tower_lr),
        Group("projector", tuple(vlm.projector.parameters()), rates.lr_projector),
        Group("LLM", _where(llm, False), None),
        Group("LLM" if lora_rank is None else "LLM adapters", _where(llm, True), llm_lr),
    ]
    return [group for group in groups if group.parameters]


def _where(parameters: Iterable[nn.Parameter], learns: bool) -> tuple[nn.Parameter, ...]:
    return tuple(parameter for parameter in parameters if parameter.requires_grad == learns)


def _llm_parameters(vlm: VLM) -> tuple[nn.Parameter, ...]:
    """With those of a head of its own."""
    modules = (vlm.model.model.language_model, vlm.model.lm_head)
    return tuple({id(parameter): parameter for module in modules for parameter in module.parameters()}.values())


def _prepare_llm(vlm: VLM, rates: Rates, lora_rank: int | None, seed: int) -> float | None:
    if rates.lr_lora is not None and lora_rank is not None:
        if vlm.peft is None:
            vlm.add_adapters(lora_rank, seed)
        _adapters_alone(vlm.model.model.language_model)
        return rates.lr_lora
    if rates.lr_full is None:
        return None
    if vlm.peft is not None:
        raise UserError("the model to start from has adapters, and full training would lose them; leave --full out")
    if vlm.quantized is not None:
        raise UserError(f"--full: an LLM in {vlm.quantized} cannot be trained itself; leave --full or --quantize out")
    for module in (vlm.model.model.language_model, vlm.model.lm_head):
        module.float().requires_grad_(True)
    vlm.llm_changed = True
    return rates.lr_full


def _prepare_tower(vlm: VLM, rates: Rates, seed: int, tune: bool, rank: int | None) -> float | None:
    if tune:
        if vlm.tower_peft is not None:
            raise UserError("--tune-tower: the model to start from has adapters on its tower; go on with --tower-lora")
        vlm.tower.float()
        for parameter in read_by_llm(vlm.tower):
            parameter.requires_grad_(True)
        vlm.tower_changed = True
        return rates.lr_tower_full
    if rank is not None:
        if vlm.tower_changed:
            raise UserError("--tower-lora: the model to start from has a tower that was tuned itself; go on with --tune-tower")
        if vlm.tower_peft is None:
            vlm.add_tower_adapters(rank, seed)
        _adapters_alone(vlm.tower)
        read = {id(parameter) for parameter in read_by_llm(vlm.tower)}
        for parameter in vlm.tower.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in read)
        return rates.lr_tower_lora
    return None


def read_by_llm(tower: SparseFormer) -> list[nn.Parameter]:
    """Parameters that an image's tokens depend on: not the head, nor the RoI update of the last unit.

    Distributed training waits for the gradient of each trainable tensor, so tensors without one must be frozen.
    """
    before = {name: parameter.requires_grad for name, parameter in tower.named_parameters()}
    tower.requires_grad_(True)
    if tower.config.budgets is not None:  # begins from a grid, at each of its numbers of tokens
        tower.initial_roi.requires_grad_(False)
    parameters = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    device, size = parameters[0].device, tower.config.image_size
    half = tower.norm.weight.dtype == torch.bfloat16  # under adapters in float32
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        total = tower.visual_tokens(torch.zeros(1, 3, size, size, device=device)).float().sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(before[name])
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _adapters_alone(module: nn.Module) -> None:
    """Train adapters alone, and keep PEFT from casting every activation to float32: autocast decides the dtype."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False


def computes_in_bfloat16(vlm: VLM) -> bool:
    """Whether a step computes in bfloat16: if the LLM is in bfloat16, or is trained itself on a device that supports it."""
    if vlm.llm_changed:
        return native_dtype(vlm.model.device) == torch.bfloat16
    return vlm.model.get_input_embeddings().weight.dtype == torch.bfloat16


# ---- attention

FLASH = "flash_attention_2"
SDPA = "sdpa"
ATTENTION_ALONE = {"full_attention", "sliding_attention"}  # kinds of layers, as transformers names them


def packable(language: PreTrainedModel) -> bool:
    """Whether tokens interact in attention alone (no recurrence, no convolution), so that packed sequences can be kept apart."""
    kinds = getattr(language.config, "layer_types", None) or ATTENTION_ALONE
    return not language._is_stateful and set(kinds) <= ATTENTION_ALONE


def choose_attention(vlm: VLM) -> str:
    """Set how the LLM computes attention.

    A token tree needs its own mask, which flash-attention does not take: batches of single conversations are packed into one row for it,
    trees use SDPA (`train.loss_module`).

    Returns:
        A description of the choice.
    """
    language = vlm.model.model.language_model
    if vlm.model.device.type == "cpu":
        # at a few hundred tokens a tree, plain attention takes a quarter less of a step than the fused kernel
        language.set_attn_implementation("eager")
        return "plain (on a CPU faster than SDPA at these lengths)"
    if is_flash_attn_2_available() and language._supports_flash_attn and packable(language) and computes_in_bfloat16(vlm):
        language.set_attn_implementation(FLASH)
        return (
            "flash-attention 2 for single conversations, packed without padding; SDPA where several share a photo, as their tree needs a "
            "mask of its own"
        )
    language.set_attn_implementation(SDPA)
    return "SDPA (flash-attention 2 is used where flash-attn is installed and the LLM computes in bfloat16)"


def save_memory(vlm: VLM, shared_weights: bool = False) -> None:
    """Gradient checkpointing of the LLM and of a tower that is trained.

    Args:
        shared_weights: weights are partitioned (ZeRO-3). DeepSpeed gathers them in the backward pass only for reentrant checkpointing; the
            tower, which has the other kind, then keeps its few activations.
    """
    language = vlm.model.model.language_model
    # its name before transformers 6
    enable = getattr(language, "activation_checkpointing_enable", None) or language.gradient_checkpointing_enable
    enable({"use_reentrant": shared_weights})
    if shared_weights:
        language.enable_input_require_grads()  # else no gradient flows through reentrant checkpoints
    else:
        vlm.tower.set_grad_checkpointing()
