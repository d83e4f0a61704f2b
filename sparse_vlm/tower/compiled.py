"""Layers of a tower that is optimized for inference, by the C++ kernels: drop-in replacements for `tower.layers`, equal up to rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_vlm.kernels.cpu import native
from sparse_vlm.roi import encoding_frequencies
from sparse_vlm.tower.focus import MAP, Focus, coarse_cells
from sparse_vlm.tower.layers import MAP_EPS, EarlyConvolution, RoIPatchEmbedding, Unit
from sparse_vlm.tower.packed import PackedLinear, pack
from sparse_vlm.tower.prepared import PreparedAttention, PreparedRoIPatchEmbedding, PreparedUnit, fuse_hidden

if TYPE_CHECKING:
    from sparse_vlm.tower.config import Activation


class CompiledRoIPatchEmbedding(PreparedRoIPatchEmbedding):
    """A `PreparedRoIPatchEmbedding` that crops any RoIs by a C++ kernel."""

    def __init__(self, plain: RoIPatchEmbedding) -> None:
        super().__init__(plain)
        self._positions = self.pos_embed.float()

    def forward(self, pixels: Tensor, rois: Tensor, seen: Tensor, extent: Tensor | None = None) -> Tensor:
        """As `RoIPatchEmbedding.forward`."""
        initial = self._find_initial(pixels, rois, seen) if rois.ndim == 2 and extent is None else None
        if self.config.kind != "crop" or (initial is not None and initial.grid is not None):
            return super().forward(pixels, rois, seen, extent)
        positions = native.average_positions(rois, self._positions, self.config.points_per_side, self.pos_embed.dtype)
        return self.embed(native.crop_rois(pixels, seen, self.config.patch_size, extent).flatten(2), positions)


class CompiledEarlyConvolution(EarlyConvolution):
    """The early convolution with pooling, ReLU and norm as one C++ kernel."""

    def __init__(self, plain: EarlyConvolution) -> None:
        nn.Module.__init__(self)
        self._kernel = native.Convolution(plain.conv1, MAP_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """As `EarlyConvolution.forward`."""
        return self._kernel(pixels)


class CompiledFocus(Focus):
    """A focus module whose network and placement are one C++ kernel each."""

    def __init__(self, plain: Focus) -> None:
        nn.Module.__init__(self)
        self.config, self._kernel = plain.config, native.Focus(plain)

    def forward(self, pixels: Tensor, region: Tensor | None = None, extent: Tensor | None = None) -> Tensor:
        """As `Focus.forward`."""
        box = torch.tensor([0.0, 0.0, 1.0, 1.0]) if region is None else region.unsqueeze(1)
        return self._kernel.predict(pixels, box.expand(len(pixels), 1, 4), extent, MAP)

    def place(self, maps: Tensor, aspects: Tensor, num_tokens: int) -> Tensor:
        """As `Focus.place`."""
        return native.place_cells(maps, aspects, num_tokens, coarse_cells(num_tokens), self.config.evenness)


class CompiledAttention(PreparedAttention):
    """Attention by a C++ kernel for numbers of tokens for which it is faster than torch."""

    def _attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        return native.attention(qkv, self.heads, bias) if native.attention_is_supported(qkv, self.heads) else super()._attend(qkv, bias)


class CompiledUnit(PreparedUnit):
    """A `PreparedUnit` of C++ kernels.

    PE_INJECT right after SAMPLING_M shares its linear layer. Attention and MLP are one call each where linear layers are C++ kernels.
    """

    attention = CompiledAttention

    def __init__(self, plain: Unit, activation: Activation, constant: bool) -> None:
        super().__init__(plain, activation, constant)
        self._attention = self._mlp = None
        if "ATTN" in self.ops and self.attn.qkv.native is not None:
            self._attention = native.Attention(self.norm1, self.attn.qkv.native, self.attn.proj.native, self.attn.heads)
        if "MLP" in self.ops and self.mlp.fc1.native is not None:
            self._mlp = native.Mlp(self.norm2, self.mlp.fc1.native, self.mlp.fc2.native, 1 / self.mlp.factor)

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        supported = self._attention is not None and self._attention.is_supported(x.shape[1])
        return self._attention(x, bias) if supported else super()._attend(x, bias)

    def _run_mlp(self, x: Tensor) -> Tensor:
        return super()._run_mlp(x) if self._mlp is None else self._mlp(x)

    def _prepare_sampling(self, plain: Unit) -> None:
        mixing, (norm, layer) = plain.adaptive_mixing, plain.roi_offset_module
        self.generate = pack(mixing.parameter_generator)
        self.m_beta, self.s_beta, self.out_points = mixing.m_beta, mixing.s_beta, mixing.out_points
        self._points, self._positions = native.Points(norm, layer.weight, plain.roi_offset_bias), None
        weight, bias = mixing.out_proj.weight, mixing.out_proj.bias
        after = self.ops.index("SAMPLING_M") + 1
        if self.ops[after : after + 1] == ("PE_INJECT",):
            self.ops = (*self.ops[:after], *self.ops[after + 1 :])
            norm, layer = plain.pe_transition
            self._positions = native.Positions(norm, encoding_frequencies(self.width))
            weight, bias = torch.cat([weight, layer.weight], dim=1), bias + layer.bias
        self.out_proj = PackedLinear(weight, bias)

    def _prepare_adjustment(self, norm: nn.LayerNorm, *layers: nn.Module) -> None:
        *hidden, last = layers
        self.roi_adjust_module = fuse_hidden(norm, *hidden)
        self._adjust_weight = last.weight.float()

    def points(self, latents: Tensor, rois: Tensor) -> Tensor:
        """As `Unit.points`."""
        return self._points(latents, rois)

    def _sample_and_mix(self, feature_map: Tensor, points: Tensor, generated: Tensor, rois: Tensor) -> Tensor:
        padding_columns = 0 if self._positions is None else self.width
        rows = native.sample_and_mix(
            feature_map, points, generated, self.m_beta, self.s_beta, self.out_points, self.padding, padding_columns
        )
        if self._positions is not None:
            self._positions(rois, rows)
        return self.out_proj(rows)

    def _adjust(self, x: Tensor, rois: Tensor) -> Tensor:
        return native.adjust_rois(self.roi_adjust_module(x[:, -rois.shape[1] :]), self._adjust_weight, rois)
