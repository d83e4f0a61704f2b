"""Linear layers for inference on a CPU, with weights packed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm import kernels
from sparse_vlm.kernels.cpu import native
from sparse_vlm.tower.layers import ACTIVATIONS

if TYPE_CHECKING:
    from sparse_vlm.tower.config import Activation

# oneDNN's names of fused activations: (operation, algorithm)
FUSED: dict[Activation, tuple[str, str]] = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "quick_gelu": ("swish", "")}


def onednn_is_supported(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, with kernels of this dtype for this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


class PackedLinear(nn.Module):
    """A linear layer with weights packed for the C++ kernel or for oneDNN, where one of them is supported.

    Args:
        weight, bias: (outer, inner) and (outer), not modified.
        activation: fused; for `quick_gelu` only silu is applied, and the caller applies its factors.
        norm: applied to the input; fused in the C++ kernel.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: Activation | None = None, norm: nn.LayerNorm | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.native = self.packed = None
        self.fused = ("none", "") if activation is None else FUSED[activation]
        self.activation = {None: None, "quick_gelu": F.silu}.get(activation, ACTIVATIONS.get(activation))
        # attributes, not buffers: a packed tensor cannot be saved, moved or converted
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        if kernels.has_cpu_linear(weight):
            self.native = native.Linear(weight, bias, "silu" if activation == "quick_gelu" else activation, norm)
            self.weight = self.bias = self.norm = None
        elif onednn_is_supported(weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
            self.weight = None

    def forward(self, x: Tensor, residual: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """(..., inner) to (..., outer); with a residual, residual + factor * output."""
        if self.native is not None:
            return self.native(x, residual, factor)
        x = x if self.norm is None else self.norm(x)
        if self.packed is not None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, self.fused[0], [], self.fused[1])
        else:
            y = F.linear(x, self.weight, self.bias)
            y = y if self.activation is None else self.activation(y)
        return y if residual is None else torch.add(residual, y, alpha=factor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        raise RuntimeError("this tower is optimized for inference and cannot be moved or converted; do that before optimizing it")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise RuntimeError("this tower is optimized for inference and cannot be saved; save it before optimizing it")


def pack(module: nn.Module) -> nn.Module:
    """Replace the linear layers of a module; a layer right after a norm is fused with it."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module.weight, module.bias)
    if isinstance(module, nn.Sequential):
        packed: list[nn.Module] = []
        for child in module:
            if packed and isinstance(packed[-1], nn.LayerNorm) and isinstance(child, nn.Linear):
                packed[-1] = PackedLinear(child.weight, child.bias, norm=packed[-1])
            else:
                packed.append(pack(child))
        return nn.Sequential(*packed)
    for name, child in module.named_children():
        setattr(module, name, pack(child))
    return module
