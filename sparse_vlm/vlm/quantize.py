"""LLMs in 4 or 8 bits: bitsandbytes quantizes the weights of linear layers; adapters, embeddings and norms are not quantized.

Sources: QLoRA (arXiv 2305.14314), NF4 with double quantization, for 4 bits; LLM.int8() (arXiv 2208.07339) for 8.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparse_vlm.errors import UserError

# at import it warns of missing kernels, and later of every cast
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _nf4(compute: torch.dtype) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": compute,
    }


def _int8(compute: torch.dtype) -> dict[str, Any]:
    return {"load_in_8bit": True}


# arguments of transformers' BitsAndBytesConfig, by compute dtype
FORMATS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {"4bit": _nf4, "8bit": _int8}


def quantization(name: str, compute: torch.dtype) -> Any:
    """transformers' quantization configuration for a format in `FORMATS`.

    Raises:
        UserError: no such format, or no bitsandbytes.
    """
    if name not in FORMATS:
        raise UserError(f"quantize {name}: no such format; known are {', '.join(FORMATS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"quantize {name}: bitsandbytes is not installed; pip install 'sparse-vlm[quantize]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**FORMATS[name](compute))


def keep_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first forward pass on a CPU: repacked weights have no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
