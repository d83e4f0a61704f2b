"""LoRA adapters of a VLM, by PEFT: create, save, load and merge. LLM and tower have one PEFT model each, in folders of PEFT's layout.

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
from sparse_vlm.hub.weights import check_shapes, read_tensors, write_tensors

CONFIG = "adapter_config.json"
MAX_RANK = 4096
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # of tensor names under PEFT's wrapper


def language_layers(model: nn.Module) -> str:
    """Pattern of target modules for PEFT: every linear layer of a LLaVA model's LLM, none of the tower or projector."""
    names = {name.rpartition(".")[2] for name, module in model.model.language_model.named_modules() if isinstance(module, nn.Linear)}
    return rf".*language_model\..*\.({'|'.join(sorted(names))})"


def tower_layers(tower: nn.Module) -> str:
    """Pattern of target modules for PEFT: the linear layers of the tower's units and transitions, not of its head."""
    names = [f"layers.{name}" for name, module in tower.layers.named_modules() if isinstance(module, nn.Linear)]
    return "|".join(map(re.escape, names))


def create(model: nn.Module, layers: str, rank: int, seed: int, task: str | None = None) -> Any:
    """Wrap a model with a new, trainable adapter on each of the layers; it changes no output until it is trained.

    Args:
        layers: pattern of target modules, from `language_layers` or `tower_layers`.
        seed: of the adapters' weights.
        task: PEFT's task type, such as "CAUSAL_LM".
    """
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, lora_dropout=0.0, task_type=task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return wrap(model, config)


def wrap(model: nn.Module, config: Any) -> Any:
    """`get_peft_model`, without its warnings about a property that transformers renamed and about the tower's adapters.

    The wrapped layers refuse a second adapter: PEFT would overwrite the first where both target a layer, and save a mixture of the two.
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
            module.update_layer = _refuse_second
    peft.own_config = copy.deepcopy(config)  # PEFT shares one object among all wrappers of a model, and modifies it before it asks a layer
    return peft


def _refuse_second(*_: Any, **__: Any) -> NoReturn:
    raise UserError(
        "the model already has adapters, and PEFT would overwrite them with a second one; train those (`vlm.peft`, `sparse-vlm train`), or "
        "merge them into the weights first (`vlm.merge_adapter()`; VLM.from_pretrained(FOLDER) does it)"
    )


@dataclass(frozen=True)
class Merged:
    """Adapters that were merged into a model's weights, kept for saving."""

    config: Any
    state: dict[str, Tensor]


def merge(peft: Any) -> Merged:
    """Merge adapters into the weights and remove PEFT's layers."""
    from peft import get_peft_model_state_dict

    state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(peft, save_embedding_layers=False).items()}
    model = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config
    return Merged(peft.own_config, state)


def refuse_foreign(part: str, module: nn.Module) -> None:
    """Check that a part of a VLM to which the VLM added no adapters has none.

    Raises:
        UserError: it contains layers of PEFT.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(inner, BaseTunerLayer) for inner in module.modules()):
        raise UserError(
            f"the {part} has adapters that were not added by this VLM; save them with PEFT's save_pretrained (to be loaded onto "
            "VLM.from_pretrained(FOLDER).model), or merge and unload them first"
        )


def read(model: nn.Module, folder: Path, trainable: bool) -> Any:
    """Load the adapters of a folder onto a model.

    Raises:
        UserError: they cannot be read, or do not fit this model.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = _config(folder)
    config.inference_mode = not trainable
    state = read_tensors(folder / WEIGHTS)
    ranks = {tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_A.weight") and tensor.ndim == 2}
    if ranks != {config.r} and not config.rank_pattern:  # before anything of that rank is allocated
        raise UserError(
            f"{folder / CONFIG}: rank {config.r}, but the tensors beside it have rank {', '.join(map(str, sorted(ranks))) or 'none'}"
        )
    with model_errors(folder / CONFIG, "adapters of this model"):
        peft = wrap(model, config)
        own = get_peft_model_state_dict(peft, save_embedding_layers=False)
    check_shapes(folder / WEIGHTS, shapes(own), shapes(state))
    set_peft_model_state_dict(peft, state)
    return peft


def _config(folder: Path) -> Any:
    """PEFT's configuration of a folder's adapters, reduced to what shapes them: nothing that PEFT would import or initialize from."""
    from peft import LoraConfig, PeftConfig

    refuse_code(folder)
    with model_errors(folder / CONFIG, "PEFT's configuration of adapters"):
        config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise UserError(f"{folder / CONFIG}: {type(config).__name__} is not supported; only LoRA adapters are")
    if type(config.r) is not int or not 1 <= config.r <= MAX_RANK or not isinstance(config.target_modules, str | set | list):
        raise UserError(f"{folder / CONFIG}: r {config.r!r} and target_modules {config.target_modules!r:.40} are not valid")
    if not isinstance(config.lora_alpha, int | float) or not math.isfinite(config.lora_alpha):
        raise UserError(f"{folder / CONFIG}: lora_alpha is {config.lora_alpha!r:.40}, and must be a finite number")
    config.base_model_name_or_path, config.init_lora_weights = None, True
    return config


def write(adapters: Any, folder: Path, tensors: Mapping[str, Tensor], base: str, dtype: torch.dtype | None) -> None:
    """Write a folder that both `read` and PEFT load.

    Args:
        adapters: PEFT's wrapper, or `Merged`.
        tensors: the adapters' tensors by their names in the wrapped model; empty for `Merged`.
        base: name of the model without adapters.
        dtype: to store tensors in; their own by default.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapters, Merged):
        config, state = adapters.config, adapters.state
    else:
        config = vars(adapters).get("own_config", adapters.peft_config["default"])
        named = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in tensors.items()}
        state = get_peft_model_state_dict(adapters, state_dict=named, save_embedding_layers=False)
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    write_tensors(state, folder / WEIGHTS, dtype)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def save_merged(model: nn.Module, folder: str | Path, **options: Any) -> None:
    """transformers' `save_pretrained` without PEFT's layer names, which its `from_pretrained` would not recognize.

    Raises:
        UserError: adapters that are not merged into the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) and not module.merged for module in model.modules()):
        raise UserError(
            "the model's adapters are not merged, and transformers' save_pretrained would lose them; load it with "
            "VLM.from_pretrained(FOLDER), which merges them, or save them with VLM.save_pretrained"
        )
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    type(model).save_pretrained(model, folder, **{"state_dict": state, **options})
