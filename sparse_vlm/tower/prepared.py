"""Layers of a tower that is optimized for inference, in torch: drop-in replacements for `tower.layers`, equal up to rounding.

Shape legend: B batch, n latent tokens, N tokens with CLS, P sampling points, C channels of the map, O points after mixing, d width,
H x W pixels, p pixels a side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.roi import (
    Padding,
    adjust_rois,
    crop_level,
    encode_rois,
    points_on_canvas,
    roi_average_weights,
    sample_bilinear,
)
from sparse_vlm.tower.layers import AdaptiveMixing, Attention, Mlp, RoIPatchEmbedding, Unit, _add_to_latents
from sparse_vlm.tower.packed import PackedLinear, pack

if TYPE_CHECKING:
    from sparse_vlm.tower.config import Activation

QUICK_GELU_FACTOR = 1.702
Evaluate = Callable[..., Tensor]  # (function, *arguments) to its value


@dataclass
class _InitialRoIs:
    """Initial RoIs of images of one size, and what follows from them alone.

    Attributes:
        rois, seen: (n, 4), as in `RoIPatchEmbedding.forward`.
        grid: rows and columns where `seen` is a regular grid over the image; else None.
        halvings: of the image before it is cropped, as in `crop_rois`.
        positions: (n, d), averaged position embeddings.
        pooling: (n, G * G); None where each token is one patch.
    """

    rois: Tensor
    seen: Tensor
    grid: tuple[int, int] | None
    halvings: int
    positions: Tensor
    pooling: Tensor | None


class PreparedRoIPatchEmbedding(RoIPatchEmbedding):
    """A RoI patch embedding that caches the initial RoIs of each image size; other RoIs are embedded as before."""

    def __init__(self, plain: RoIPatchEmbedding) -> None:
        nn.Module.__init__(self)
        self.config = plain.config
        self.patch_embed, self.pos_embed, self.norm_pre = plain.patch_embed, plain.pos_embed, plain.norm_pre
        self.embed = PackedLinear(plain.patch_embed.weight.flatten(1))  # (d, 3 * p * p)
        self._initial: dict[tuple[int, int, int], _InitialRoIs] = {}

    def forward(self, pixels: Tensor, rois: Tensor, seen: Tensor, extent: Tensor | None = None) -> Tensor:
        """As `RoIPatchEmbedding.forward`."""
        initial = self._find_initial(pixels, rois, seen) if extent is None else None
        if initial is None or initial.grid is None:
            return super().forward(pixels, rois, seen, extent)
        p, (rows, columns) = self.config.patch_size, initial.grid
        for _ in range(initial.halvings):
            pixels = F.avg_pool2d(pixels, 2, ceil_mode=True, count_include_pad=False)
        if pixels.shape[-2:] != (rows * p, columns * p):
            pixels = F.interpolate(pixels.float(), (rows * p, columns * p), mode="bilinear")
        cells = pixels.to(self.pos_embed.dtype).unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, 3, rows, p, columns, p)
        patches = self.embed(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # (B, rows * columns, d)
        return (patches if initial.pooling is None else initial.pooling @ patches) + initial.positions

    def _find_initial(self, pixels: Tensor, rois: Tensor, seen: Tensor) -> _InitialRoIs | None:
        """The cache entry of these RoIs; None where they are not the initial ones of this image size."""
        key = seen.shape[1], *pixels.shape[-2:]
        if key not in self._initial:
            if rois.ndim != 2 or not bool((seen == seen[:1]).all()):
                return None
            self._initial[key] = self._prepare(pixels, rois, seen[0])
        initial = self._initial[key]
        same = rois.shape == initial.rois.shape and torch.equal(rois, initial.rois) and bool((seen == initial.seen).all())
        return initial if same else None

    def _prepare(self, pixels: Tensor, rois: Tensor, seen: Tensor) -> _InitialRoIs:
        config, dtype = self.config, self.pos_embed.dtype
        pooling = roi_average_weights(rois, config.grid, config.grid, config.points_per_side)  # (n, G * G)
        positions = (pooling @ self.pos_embed.float()).to(dtype)
        height, width = pixels.shape[-2:]
        if config.kind == "crop":
            grid = _grid(seen)
            halvings = 0 if grid is None else crop_level(height / grid[0], width / grid[1], config.patch_size)
            # if halving rounds up a side, the cells do not end on pixel borders
            grid = None if height % 2**halvings or width % 2**halvings else grid
            return _InitialRoIs(rois, seen, grid, halvings, positions, None)
        side = config.grid * config.patch_size
        whole = (config.grid, config.grid) if (height, width) == (side, side) else None
        one_each = pooling.shape[0] == pooling.shape[1] and torch.allclose(pooling, torch.eye(len(pooling)), atol=1e-6)
        return _InitialRoIs(rois, seen, whole, 0, positions, None if one_each else pooling.to(dtype))


def _grid(rois: Tensor) -> tuple[int, int] | None:
    """Rows and columns of a regular grid over the image in reading order; None if the RoIs are not such a grid."""
    rows = int((rois[:, 0].abs() < 1e-6).sum())
    if rows == 0 or len(rois) % rows:
        return None
    columns = len(rois) // rows
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    cells = torch.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], dim=-1)
    return (rows, columns) if torch.allclose(rois, cells, rtol=0, atol=1e-6) else None


class PreparedAttention(Attention):
    """Attention of packed layers; the scale is folded into the query weights."""

    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, width = plain.heads, plain.proj.in_features
        scale = torch.ones_like(plain.qkv.bias)
        scale[:width] = (width // plain.heads) ** -0.5
        self.qkv, self.proj = PackedLinear(plain.qkv.weight * scale[:, None], plain.qkv.bias * scale), pack(plain.proj)

    def forward(self, x: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
        """residual + attention of (B, N, d); `bias` (B, n) is added to the scores of the last n keys."""
        return self.proj(self._attend(self.qkv(x), bias), residual)

    def _attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head size)
        mask = None if bias is None else F.pad(bias, (qkv.shape[1] - bias.shape[1], 0))[:, None, None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(-2)


class PreparedMlp(Mlp):
    """An MLP of packed layers with a fused activation.

    Attributes:
        factor: by which the input must be multiplied; 1 unless the activation is quick_gelu.
    """

    def __init__(self, plain: Mlp, activation: Activation) -> None:
        nn.Module.__init__(self)
        self.factor = QUICK_GELU_FACTOR if activation == "quick_gelu" else 1.0
        self.fc1 = PackedLinear(plain.fc1.weight, plain.fc1.bias * self.factor, activation)
        self.fc2 = PackedLinear(plain.fc2.weight, plain.fc2.bias * self.factor)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + MLP of (B, N, d), which is `factor` times the input of `Mlp.forward`."""
        return self.fc2(self.fc1(x), residual, 1 / self.factor)


class PreparedMixing(AdaptiveMixing):
    """Sampling and adaptive mixing with parameters that were generated before."""

    def __init__(self, plain: AdaptiveMixing, padding: Padding) -> None:
        nn.Module.__init__(self)
        self.channels, self.in_points, self.out_points = plain.channels, plain.in_points, plain.out_points
        self.padding: Padding = padding
        self.parameter_generator, self.out_proj = pack(plain.parameter_generator), pack(plain.out_proj)
        self.m_beta, self.s_beta = plain.m_beta, plain.s_beta

    def forward(self, feature_map: Tensor, points: Tensor, generated: Tensor) -> Tensor:
        """A map (B, C, H, W) to a residual of the tokens (B, n, d).

        Args:
            points: (B, n, P, 2), or (1, n, P, 2) for all images.
            generated: parameters (B, n, C * C + P * O), or (1, n, ...) for all images.
        """
        points = points.expand(len(feature_map), -1, -1, -1)
        sampled = sample_bilinear(feature_map, points, self.padding).to(generated.dtype)
        over_channels, over_points = generated.split([self.channels**2, self.in_points * self.out_points], dim=-1)
        x = sampled @ over_channels.unflatten(-1, (self.channels, self.channels))  # (B, n, P, C)
        if self.m_beta is not None:
            x = F.gelu(x + self.m_beta)
        x = over_points.unflatten(-1, (self.out_points, self.in_points)) @ x  # (B, n, O, C)
        if self.s_beta is not None:
            x = x + self.s_beta.unsqueeze(-1)
        return self.out_proj(F.gelu(x).flatten(-2))


@dataclass
class _Constants:
    """Values of a unit that do not depend on the image, in the order of evaluation, and the RoIs (1, n, 4) that they hold for."""

    rois: Tensor
    values: list[Tensor] = field(default_factory=list)

    def replay(self) -> Evaluate:
        """An `Evaluate` that returns the recorded values in order."""
        values = iter(self.values)
        return lambda *_: next(values)

    def record(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Evaluate the next value and keep it."""
        self.values.append(function(*args))
        return self.values[-1]


def _evaluate(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


class PreparedUnit(Unit):
    """A unit of packed layers.

    Args:
        constant: whether its input tokens do not depend on the image, so that all before its first sampling is computed once.
    """

    attention: type[PreparedAttention] = PreparedAttention

    def __init__(self, plain: Unit, activation: Activation, constant: bool) -> None:
        nn.Module.__init__(self)
        self.ops, self.repeats, self.width, self.padding = plain.ops, plain.repeats, plain.width, plain.padding
        self.constant = constant
        self.stage_embedding = plain.stage_embedding
        if "SAMPLING_M" in self.ops:
            self._prepare_sampling(plain)
        if "PE_INJECT" in self.ops:
            self.pe_transition = pack(plain.pe_transition)
        if "ATTN" in self.ops:
            self.norm1, self.attn = plain.norm1, self.attention(plain.attn)
        if "MLP" in self.ops:
            self.norm2, self.mlp = plain.norm2, PreparedMlp(plain.mlp, activation)
            if self.mlp.factor != 1:
                # a new norm, in float32 also in a bfloat16 tower, so that the factor changes nothing but the output's scale
                self.norm2 = nn.LayerNorm(self.width, eps=plain.norm2.eps)
                self.norm2.load_state_dict({name: self.mlp.factor * value.float() for name, value in plain.norm2.state_dict().items()})
                self.norm2.requires_grad_(False)
        if "ROI_ADJ" in self.ops:
            self._prepare_adjustment(*plain.roi_adjust_module)
        self._recorded: dict[int, _Constants] = {}

    def forward(
        self,
        x: Tensor,
        rois: Tensor,
        feature_map: Tensor | None,
        points_seen: list[Tensor] | None,
        extent: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Unit.forward`; without gradients."""
        batch, n = rois.shape[:2]
        constants, recorded = self._find_constants(rois) if self.constant else (None, None)
        tokens = boxes = _evaluate  # how to evaluate functions of tokens, and of RoIs
        if constants is not None:
            x, rois, tokens, boxes = x[:1], rois[:1], constants, constants
        for repeat in range(self.repeats):
            if self.stage_embedding is not None:
                x = x + self.stage_embedding.weight[repeat]
            for op in self.ops:
                if op == "ATTN":
                    x = tokens(self._attend, x, bias)
                elif op == "MLP":
                    x = tokens(self._run_mlp, x)
                elif op == "SAMPLING_M":
                    latents = x[:, -n:]
                    points = tokens(self.points, latents, rois)
                    generated = tokens(self.generate, latents)
                    if points_seen is not None:
                        points_seen.append(points.expand(batch, -1, -1, -1))
                    if extent is not None:
                        points = points_on_canvas(points, extent, *feature_map.shape[-2:], self.padding)
                    x = _add_to_latents(x, self._sample_and_mix(feature_map, points, generated, rois))
                    tokens = _evaluate
                elif op == "PE_INJECT":
                    x = _add_to_latents(x, boxes(self._inject, rois, x.dtype))
                else:
                    rois = tokens(self._adjust, x, rois)
                    boxes = tokens
        if recorded is not None:
            self._recorded[n] = recorded
        return x.expand(batch, -1, -1), rois.expand(batch, -1, -1)

    def _prepare_sampling(self, plain: Unit) -> None:
        self.roi_offset_bias, self.roi_offset_module = plain.roi_offset_bias, pack(plain.roi_offset_module)
        self.adaptive_mixing = PreparedMixing(plain.adaptive_mixing, plain.padding)
        self.generate = self.adaptive_mixing.parameter_generator

    def _prepare_adjustment(self, norm: nn.LayerNorm, *layers: nn.Module) -> None:
        *hidden, last = layers
        self.roi_adjust_module = nn.Sequential(fuse_hidden(norm, *hidden), pack(last))

    def _sample_and_mix(self, feature_map: Tensor, points: Tensor, generated: Tensor, rois: Tensor) -> Tensor:
        return self.adaptive_mixing(feature_map, points, generated)

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.attn(self.norm1(x), x, bias)

    def _run_mlp(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x), x)

    def _inject(self, rois: Tensor, dtype: torch.dtype) -> Tensor:
        return self.pe_transition(encode_rois(rois, self.width).to(dtype))

    def _adjust(self, x: Tensor, rois: Tensor) -> Tensor:
        return adjust_rois(rois, self.roi_adjust_module(x[:, -rois.shape[1] :]).float())

    def _find_constants(self, rois: Tensor) -> tuple[Evaluate | None, _Constants | None]:
        """How to evaluate what is the same for all images, and the record if this is its first evaluation; (None, None) for other RoIs."""
        constants = self._recorded.get(rois.shape[1])
        if constants is None:
            if not bool((rois == rois[:1]).all()):
                return None, None
            constants = _Constants(rois[:1].clone())
            return constants.record, constants
        return (constants.replay(), None) if bool((rois == constants.rois).all()) else (None, None)


def fuse_hidden(norm: nn.LayerNorm, *layers: nn.Module) -> nn.Module:
    """A norm, a linear layer and GELU as one layer; the norm alone without layers."""
    return PackedLinear(layers[0].weight, layers[0].bias, "gelu", norm) if layers else norm
