"""PEFT's adapters on a VLM: made, written and read; the LLM's and the tower's are two PEFT models, each in a folder of PEFT's own layout.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.vlm.files import check_tensors, read_tensors, write_tensors

WEIGHTS = "adapter_model.safetensors"
INNER = "base_model.model."  # how PEFT calls the model that it wraps


def language_layers(model: nn.Module) -> str:
    """A pattern for PEFT: every linear layer of a LLaVA model's LLM, none of tower and projector."""
    names = {name.rpartition(".")[2] for name, module in model.model.language_model.named_modules() if isinstance(module, nn.Linear)}
    return rf".*language_model\..*\.({'|'.join(sorted(names))})"


def tower_layers(tower: nn.Module) -> str:
    """A pattern for PEFT: every linear layer of the tower's units and transitions, and none of its head, which no LLM reads."""
    names = [f"layers.{name}" for name, module in tower.layers.named_modules() if isinstance(module, nn.Linear)]
    return "|".join(map(re.escape, names))


def fresh(model: nn.Module, layers: str, rank: int, seed: int, task: str | None = None) -> Any:
    """PEFT's wrapper with an adapter of this rank on each of the layers, trainable and without effect.

    Args:
        layers: a pattern, as `language_layers` and `tower_layers` make it.
        seed: of the adapters' weights.
        task: PEFT's name of what the model is for, where it has one.
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, lora_dropout=0.0, task_type=task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrapped(model, config)


def wrapped(model: nn.Module, config: Any) -> Any:
    """PEFT's wrapper, without its warnings about a property that transformers has renamed since, and about the tower's own adapters."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, config)


def read(model: nn.Module, folder: Path, trainable: bool) -> Any:
    """The adapters of a folder on a model.

    Raises:
        UserError: they cannot be read, or are not those of this model.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = not trainable
    config.base_model_name_or_path = None
    peft = wrapped(model, config)
    state = read_tensors(folder / WEIGHTS)
    own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    check_tensors(folder / WEIGHTS, {name: tuple(tensor.shape) for name, tensor in own.items()}, state)
    set_peft_model_state_dict(peft, state)
    return peft


def write(peft: Any, folder: Path, tensors: Mapping[str, Tensor], base: str, dtype: torch.dtype | None) -> None:
    """Write a folder that `read` and PEFT itself load.

    Args:
        tensors: the adapters', by their names in the model that PEFT wraps.
        base: what the model without adapters is called.
        dtype: store the tensors so; as they are by default.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    config = peft.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    named = {f"{INNER}{name}": tensor for name, tensor in tensors.items()}
    write_tensors(get_peft_model_state_dict(peft, state_dict=named, save_embedding_layers=False), folder / WEIGHTS, dtype)


def save_plainly(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """transformers' `save_pretrained`, which alone would write PEFT's names of layers, and its `from_pretrained` would begin those anew.

    Raises:
        UserError: adapters that are not merged into the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) and not module.merged for module in model.modules()):
        raise UserError(
            "the model's adapters stand beside its weights, and transformers' save_pretrained would lose them; load it for use with "
            "VLM.from_pretrained(FOLDER), which merges them, or keep them apart with VLM.save_pretrained"
        )
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    type(model).save_pretrained(model, folder, **{"state_dict": state, **options})
