"""`optimize_for_inference`: layers are replaced in place by equivalents for a CPU, equal up to rounding.

Notable: what is changed:
* Linear weights are packed once for the matrix library, with activations fused, instead of at every call.
* quick_gelu(x) = silu(1.702 x) / 1.702: the first factor is folded into the norm before the layer, the second into the residual addition.
* A tower without a patch embedding and a focus knows nothing of the image before its first sampling: its first sampling points and mixing
  parameters are constant and computed once.
* RoIs that are a regular grid are cropped by reshaping the image, or a scaled image, instead of being sampled one by one.
* Sampling and mixing, early convolution, cells, focus, attention and small-batch linear layers run as C++ kernels where there is a compiler
  (`sparse_vlm.kernels.cpu.native`): for one image, calling torch's many small operators takes longer than what they compute.
Measured, with what did not help: lab/speed.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sparse_vlm import kernels
from sparse_vlm.kernels.cpu import native
from sparse_vlm.tower.compiled import CompiledEarlyConvolution, CompiledFocus, CompiledRoIPatchEmbedding, CompiledUnit
from sparse_vlm.tower.focus import Focus
from sparse_vlm.tower.layers import Unit, is_plain
from sparse_vlm.tower.packed import PackedLinear, pack
from sparse_vlm.tower.prepared import PreparedRoIPatchEmbedding, PreparedUnit

if TYPE_CHECKING:
    from sparse_vlm.tower.model import SparseFormer


def optimize(tower: SparseFormer) -> None:
    """Optimize a tower in place; see `SparseFormer.optimize_for_inference`."""
    if any(isinstance(module, PackedLinear) for module in tower.modules()):
        raise RuntimeError("this tower is optimized already")
    for name, module in tower.named_modules():  # layers are replaced by their weights, which must be all that they compute with
        inner = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
        if (inner and not is_plain(module)) or any(hasattr(module, mark) for mark in ("base_layer", "parametrizations")):
            raise RuntimeError(
                f"{name} is a {type(module).__name__} with adapters, parametrizations or hooks, which optimizing would drop; merge and "
                "unload adapters first (PEFT's merge_and_unload)"
            )
    units = iter(tower.config.units)
    unit, embedding = PreparedUnit, PreparedRoIPatchEmbedding
    if kernels.has_cpu_kernels(tower.norm.weight.dtype, tower.config.conv_dim):
        unit, embedding = CompiledUnit, CompiledRoIPatchEmbedding
        if tower.feat_extractor is not None:
            tower.feat_extractor = CompiledEarlyConvolution(tower.feat_extractor)
        if type(tower.focus) is Focus and native.Focus.is_supported(tower.focus):  # a subclass may predict differently
            tower.focus = CompiledFocus(tower.focus)
    if tower.glance is not None:
        tower.glance = embedding(tower.glance)
    for index, layer in enumerate(tower.layers):
        if isinstance(layer, Unit):
            constant = index == 0 and tower.glance is None and tower.focus is None
            tower.layers[index] = unit(layer, next(units).activation, constant)
        else:
            tower.layers[index] = pack(layer)
    tower.proj = pack(tower.proj)
