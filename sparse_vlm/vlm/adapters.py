"""PEFT's adapters on a VLM: made, written and read; the LLM's and the tower's are two PEFT models, each in a folder of PEFT's own layout.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.hub.pretrained import model_errors, refuse_code
from sparse_vlm.hub.weights import check_shapes, read_tensors
from sparse_vlm.vlm.files import write_tensors

CONFIG = "adapter_config.json"
MOST_RANK = 4096
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
    """PEFT's wrapper, without its warnings about a property that transformers has renamed since, and about the tower's own adapters.

    Its layers take no second adapter: PEFT would write that over the first one where the two meet, and save a mixture of both.
    """
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = {id(module) for module in model.modules() if isinstance(module, BaseTunerLayer)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time.*")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        peft = get_peft_model(model, config)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and id(module) not in before:
            module.update_layer = _no_second
    peft.own_config = copy.deepcopy(config)  # PEFT keeps one for all that wrap a model, and changes it before it asks a layer
    return peft


def _no_second(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "the model has adapters of its own, and PEFT would write a second one over them; train those (`vlm.peft`, `sparse-vlm train`), or "
        "fold them into the weights before (`vlm.merge_adapter()`, or VLM.from_pretrained(FOLDER), which does)"
    )


@dataclass(frozen=True)
class Folded:
    """Adapters that were added to a model's weights, as they are saved."""

    config: Any
    state: dict[str, Tensor]


def fold(peft: Any) -> Folded:
    """Add adapters to the weights; what PEFT wrapped is plain layers again."""
    from peft import get_peft_model_state_dict

    state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(peft, save_embedding_layers=False).items()}
    model = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return Folded(peft.own_config, state)


def has_any(module: nn.Module) -> bool:
    """Whether a layer of PEFT is inside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(inner, BaseTunerLayer) for inner in module.modules())


def read(model: nn.Module, folder: Path, trainable: bool) -> Any:
    """The adapters of a folder on a model.

    Raises:
        UserError: they cannot be read, or are not those of this model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = _config(folder)
    config.inference_mode = not trainable
    state = read_tensors(folder / WEIGHTS)
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_A.weight") and tensor.ndim == 2}
    if ranks != {config.r} and not config.rank_pattern:  # before anything of that rank is allocated
        raise UserError(
            f"{folder / CONFIG}: says rank {config.r}, the tensors beside it are of {', '.join(map(str, sorted(ranks))) or 'none'}"
        )
    with model_errors(folder / CONFIG, "adapters of this model"):
        peft = wrapped(model, config)
        own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    check_shapes(folder / WEIGHTS, shapes(own), shapes(state))
    set_peft_model_state_dict(peft, state)
    return peft


def _config(folder: Path) -> Any:
    """PEFT's configuration of a folder's adapters: such as it makes weights of, and nothing that it would import or begin them with."""
    from peft import LoraConfig, PeftConfig

    refuse_code(folder)
    with model_errors(folder / CONFIG, "PEFT's configuration of adapters"):
        config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise UserError(f"{folder / CONFIG}: is of {type(config).__name__}; only LoRA's adapters can be read")
    if type(config.r) is not int or not 1 <= config.r <= MOST_RANK or not isinstance(config.target_modules, str | set | list):
        raise UserError(f"{folder / CONFIG}: r {config.r!r} and target_modules {config.target_modules!r:.40} are not those of adapters")
    if not isinstance(config.lora_alpha, int | float) or not math.isfinite(config.lora_alpha):
        raise UserError(f"{folder / CONFIG}: lora_alpha is {config.lora_alpha!r:.40}, and must be a finite number")
    config.base_model_name_or_path, config.init_lora_weights = None, True
    return config


def write(adapters: Any, folder: Path, tensors: Mapping[str, Tensor], base: str, dtype: torch.dtype | None) -> None:
    """Write a folder that `read` and PEFT itself load.

    Args:
        adapters: PEFT's wrapper, or `Folded`.
        tensors: the adapters', by their names in the model that PEFT wraps; of `Folded` there are none.
        base: what the model without adapters is called.
        dtype: store the tensors so; as they are by default.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapters, Folded):
        config, state = adapters.config, adapters.state
    else:
        config = vars(adapters).get("own_config", adapters.peft_config["default"])
        named = {f"{INNER}{name}": tensor for name, tensor in tensors.items()}
        state = get_peft_model_state_dict(adapters, state_dict=named, save_embedding_layers=False)
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    write_tensors(state, folder / WEIGHTS, dtype)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
