"""DeepSpeed ZeRO: named configurations (`CONFIGS`), and access to partitioned parameters.

    torchrun --nproc-per-node 8 --no-python sparse-vlm bootstrap --deepspeed zero3 --recipe paper-clip-large ...

Notable: weights stay float32 and matrix products are bfloat16 under DeepSpeed's autocast, because a coordinate in bfloat16 has a resolution
of one pixel in 256. Under stage 3 each process holds a partition of each tensor; `gathered_parameters` gives whole tensors.
Source: ZeRO (arXiv 1910.02054), ZeRO-Offload (arXiv 2101.06840).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.tower.layers import RoIPatchEmbedding
from sparse_vlm.utils.devices import native_dtype, own_device, rank


def _config(stage: int, offload: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "zero_optimization": zero,
        # the Trainer's own AdamW, with parameter groups
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "zero1": _config(1),
    "zero2": _config(2),
    "zero3": _config(3),
    "zero2-offload": _config(2, offload=True),
    "zero3-offload": _config(3, offload=True),
}


def shares_weights(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration partitions weights over processes (stage 3); None is no DeepSpeed."""
    return config is not None and config.get("zero_optimization", {}).get("stage") == 3


def find_config(name: str, verb: str = "bootstrap") -> dict[str, Any]:
    """A configuration by its name in `CONFIGS`, or from a json file in DeepSpeed's format; `torch_autocast` is added if it is missing.

    Args:
        verb: of the command line, for the message.

    Raises:
        UserError: no DeepSpeed, no such configuration, or not started by torchrun.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"--deepspeed {name}: DeepSpeed is not installed; pip install 'sparse-vlm[deepspeed]'")
    if "LOCAL_RANK" not in os.environ:
        raise UserError(f"--deepspeed {name}: start it with torchrun, as torchrun --nproc-per-node 8 --no-python sparse-vlm {verb} ...")
    if name in CONFIGS:
        config = copy.deepcopy(CONFIGS[name])
    else:
        try:
            config = json.loads(Path(name).read_text())
        except FileNotFoundError as error:
            raise UserError(f"--deepspeed {name}: no such file, and no such configuration; there are {', '.join(CONFIGS)}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"--deepspeed {name}: not a json file ({error})") from error
        if not isinstance(config, dict):
            raise UserError(f"--deepspeed {name}: the file holds no json object")
        _check_config(name, config)
    native = native_dtype(own_device()) == torch.bfloat16
    modules = ["torch.nn.Linear", "torch.nn.Conv2d"]
    config.setdefault("torch_autocast", {"enabled": native, "dtype": "bfloat16", "lower_precision_safe_modules": modules})
    return config


# Sizes that a configuration may leave "auto", by the model's width, as transformers sets them.
_BY_WIDTH = {
    "reduce_bucket_size": lambda width: width * width,
    "stage3_prefetch_bucket_size": lambda width: int(0.9 * width * width),
    "stage3_param_persistence_threshold": lambda width: 10 * width,
}


def with_sizes(config: Mapping[str, Any] | None, width: int) -> dict[str, Any] | None:
    """A configuration with its `"auto"` sizes set for a model of this width; None is no DeepSpeed."""
    if config is None:
        return None
    zero = dict(config.get("zero_optimization", {}))
    zero |= {name: size(width) for name, size in _BY_WIDTH.items() if zero.get(name) == "auto"}
    return {**config, "zero_optimization": zero}


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse entries that a run would not follow.

    Raises:
        UserError: naming the entry.
    """
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or not (isinstance(zero.get("stage", 0), int) and 0 <= zero.get("stage", 0) <= 3):
        raise UserError(f"--deepspeed {name}: zero_optimization must be an object whose stage is 0, 1, 2 or 3")
    for key in ("optimizer", "scheduler"):
        if key in config:
            article = "an" if key[0] == "o" else "a"
            raise UserError(f"--deepspeed {name}: names {article} {key}, but a run has its own; remove {key} from it")
    for key in ("fp16", "bf16"):
        section = config.get(key, {})
        if not isinstance(section, dict) or section.get("enabled", False) not in ("auto", False):
            raise UserError(
                f"--deepspeed {name}: {key}.enabled must be auto or false: weights stay float32; set the dtype of matrix products in "
                "torch_autocast"
            )
    fillable = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    open_ones = [key for key, value in config.items() if value == "auto" and key not in fillable]
    open_ones += [f"zero_optimization.{key}" for key, value in zero.items() if value == "auto" and key not in _BY_WIDTH]
    if open_ones:
        raise UserError(f"--deepspeed {name}: {open_ones[0]} is auto, which is not filled in here; give it a value")


@contextlib.contextmanager
def gathered_parameters(tensors: Iterable[Tensor], change: bool = False) -> Any:
    """Whole tensors inside the `with` block, also if each process holds a partition (ZeRO-3).

    Small tensors, which DeepSpeed keeps whole between steps, are gathered again afterwards in float32. `GatheredParameters` partitions
    them, and the next pass would gather them in the autocast dtype: a step after a checkpoint would differ from one without.

    Args:
        change: whether the block writes to them, equally in all processes.
    """
    parts = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if change else None):
        yield
    if kept := [part for part in parts if part.ds_persist]:
        kept[0].all_gather(kept)


def gather_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU in the first process; empty in the others, which must call it as well."""
    kept = {}
    for name, tensor in tensors.items():
        with gathered_parameters([tensor]):
            if rank() == 0:
                kept[name] = tensor.detach().to("cpu", copy=True)
    return kept


def register_external_parameters(model: nn.Module) -> None:
    """Register parameters that a module reads from a child without calling it, so that DeepSpeed gathers them: embedding tables, and the
    patch embedding inside `RoIPatchEmbedding`."""
    import deepspeed

    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.Embedding) or (isinstance(module, RoIPatchEmbedding) and isinstance(child, nn.Conv2d)):
                deepspeed.zero.register_external_parameter(module, child.weight)


@contextlib.contextmanager
def processes_without_gpu() -> Any:
    """Lets accelerate start DeepSpeed on CPUs over gloo, which it does not support: for tests."""
    if torch.cuda.is_available():
        yield
        return
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    foreseen = PartialState._prepare_backend
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = foreseen
