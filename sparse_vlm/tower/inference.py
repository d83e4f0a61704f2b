"""A tower folded for inference on a CPU: weights laid out for its matrix library, and what never changes computed once.

Shape legend: B batch, n latent tokens, N tokens with CLS, P sampling points, C channels of the map, O points after mixing, d width,
H x W pixels, p pixels a side of a patch.

Notable: each part below says what the part of `sparse_vlm.tower.layers` that it stands for says, within rounding. What is folded:
* Weights of linear layers are laid out once as products read them, instead of at every call, with an activation in the same pass.
* quick_gelu(x) = silu(1.702 x) / 1.702: the first factor goes into the norm before the layer, the second into the residual addition.
* Up to its first look a tower without a glance knows nothing of the image: where it looks first, and with what weights, is constant.
* The cells of a grid that covers the image are cut out of it, or of the image scaled as a whole, and others by a compiled function,
  instead of being sampled one by one.
* Sampling and mixing, the early convolution, cells, the focus, attention and products of few rows run in C++ where there is a compiler
  (`sparse_vlm.kernels.cpu.native`): for one image, calling torch's many small operators takes longer than what they compute.
Measured, with what did not help: docs/speed.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm import kernels
from sparse_vlm.kernels.cpu import native
from sparse_vlm.roi import (
    Padding,
    adjust_rois,
    crop_level,
    encode_rois,
    encoding_frequencies,
    points_on_canvas,
    roi_average_weights,
    sample_bilinear,
)
from sparse_vlm.tower.focus import MAP, Focus, coarse_cells
from sparse_vlm.tower.layers import (
    MAP_EPS,
    AdaptiveMixing,
    Attention,
    EarlyConvolution,
    Mlp,
    RoIPatchEmbedding,
    Unit,
    _add_to_latents,
    plain,
)
from sparse_vlm.tower.packed import PackedLinear, pack

if TYPE_CHECKING:
    from sparse_vlm.tower.config import Activation
    from sparse_vlm.tower.model import SparseFormer

QUICK = 1.702
Find = Callable[..., Tensor]  # of a function and its arguments, what it returns


def optimize(tower: SparseFormer) -> None:
    """Fold a tower in place; see `SparseFormer.optimize_for_inference`."""
    if any(isinstance(module, PackedLinear) for module in tower.modules()):
        raise RuntimeError("this tower is optimized already")
    for name, module in tower.named_modules():  # what is folded is weights, and such a layer computes more than its own
        inner = isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
        if (inner and not plain(module)) or any(hasattr(module, mark) for mark in ("base_layer", "parametrizations")):
            raise RuntimeError(
                f"{name} is a {type(module).__name__} with weights beside its own, or hooks, which folding would leave out; merge and "
                "unload adapters before (PEFT's merge_and_unload)"
            )
    units = iter(tower.config.units)
    prepared, glance = PreparedUnit, PreparedRoIPatchEmbedding
    if kernels.compiled(tower.norm.weight.dtype, tower.config.conv_dim):
        prepared, glance = CompiledUnit, CompiledRoIPatchEmbedding
        if tower.feat_extractor is not None:
            tower.feat_extractor = CompiledEarlyConvolution(tower.feat_extractor)
        if type(tower.focus) is Focus and native.Focus.takes(tower.focus):  # what derives from it predicts otherwise
            tower.focus = CompiledFocus(tower.focus)
    if tower.glance is not None:
        tower.glance = glance(tower.glance)
    for index, layer in enumerate(tower.layers):
        if isinstance(layer, Unit):
            tower.layers[index] = prepared(layer, next(units).activation, first=index == 0 and tower.glance is None and tower.focus is None)
        else:
            tower.layers[index] = pack(layer)
    tower.proj = pack(tower.proj)


@dataclass
class _Start:
    """Where tokens begin in images of one size, and what of the glance follows from that alone.

    Attributes:
        rois, seen: (n, 4), as `RoIPatchEmbedding.forward` takes them.
        grid: rows and columns, where `seen` are cells that cover the image in reading order; else None.
        halvings: of the image before cells are cut out of it, as `crop_rois` reads them.
        positions: (n, d).
        pooling: (n, G * G); None where each token is one patch.
    """

    rois: Tensor
    seen: Tensor
    grid: tuple[int, int] | None
    halvings: int
    positions: Tensor
    pooling: Tensor | None


class PreparedRoIPatchEmbedding(RoIPatchEmbedding):
    """A glance that knows where tokens begin in images of the sizes that it has seen; elsewhere it does what it did."""

    def __init__(self, plain: RoIPatchEmbedding) -> None:
        nn.Module.__init__(self)
        self.config = plain.config
        self.patch_embed, self.pos_embed, self.norm_pre = plain.patch_embed, plain.pos_embed, plain.norm_pre
        self.embed = PackedLinear(plain.patch_embed.weight.flatten(1))  # (d, 3 * p * p)
        self._starts: dict[tuple[int, int, int], _Start] = {}

    def forward(self, pixels: Tensor, rois: Tensor, seen: Tensor, extent: Tensor | None = None) -> Tensor:
        """As `RoIPatchEmbedding.forward`."""
        start = self._start(pixels, rois, seen) if extent is None else None
        if start is None or start.grid is None:
            return super().forward(pixels, rois, seen, extent)
        p, (rows, columns) = self.config.patch_size, start.grid
        for _ in range(start.halvings):
            pixels = F.avg_pool2d(pixels, 2, ceil_mode=True, count_include_pad=False)
        if pixels.shape[-2:] != (rows * p, columns * p):
            pixels = F.interpolate(pixels.float(), (rows * p, columns * p), mode="bilinear")
        cells = pixels.to(self.pos_embed.dtype).unflatten(3, (columns, p)).unflatten(2, (rows, p))  # (B, 3, rows, p, columns, p)
        patches = self.embed(cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # (B, rows * columns, d)
        return (patches if start.pooling is None else start.pooling @ patches) + start.positions

    def _start(self, pixels: Tensor, rois: Tensor, seen: Tensor) -> _Start | None:
        """What is known of these RoIs; None where they are not those that images of this size begin with."""
        key = seen.shape[1], *pixels.shape[-2:]
        if key not in self._starts:
            if rois.ndim != 2 or not bool((seen == seen[:1]).all()):
                return None
            self._starts[key] = self._prepare(pixels, rois, seen[0])
        start = self._starts[key]
        same = rois.shape == start.rois.shape and torch.equal(rois, start.rois) and bool((seen == start.seen).all())
        return start if same else None

    def _prepare(self, pixels: Tensor, rois: Tensor, seen: Tensor) -> _Start:
        config, dtype = self.config, self.pos_embed.dtype
        pooling = roi_average_weights(rois, config.grid, config.grid, config.points_per_side)  # (n, G * G)
        positions = (pooling @ self.pos_embed.float()).to(dtype)
        height, width = pixels.shape[-2:]
        if config.kind == "crop":
            grid = _grid(seen)
            halvings = 0 if grid is None else crop_level(height / grid[0], width / grid[1], config.patch_size)
            # an image whose sides halving rounds up has no cells on the borders of its pixels
            grid = None if height % 2**halvings or width % 2**halvings else grid
            return _Start(rois, seen, grid, halvings, positions, None)
        side = config.grid * config.patch_size
        whole = (config.grid, config.grid) if (height, width) == (side, side) else None
        one_each = pooling.shape[0] == pooling.shape[1] and torch.allclose(pooling, torch.eye(len(pooling)), atol=1e-6)
        return _Start(rois, seen, whole, 0, positions, None if one_each else pooling.to(dtype))


class CompiledRoIPatchEmbedding(PreparedRoIPatchEmbedding):
    """A prepared glance that cuts cells of any place and size by a compiled function."""

    def __init__(self, plain: RoIPatchEmbedding) -> None:
        super().__init__(plain)
        self._positions = self.pos_embed.float()

    def forward(self, pixels: Tensor, rois: Tensor, seen: Tensor, extent: Tensor | None = None) -> Tensor:
        """As `RoIPatchEmbedding.forward`."""
        start = self._start(pixels, rois, seen) if rois.ndim == 2 and extent is None else None
        if self.config.kind != "crop" or (start is not None and start.grid is not None):
            return super().forward(pixels, rois, seen, extent)
        positions = native.average(rois, self._positions, self.config.points_per_side, self.pos_embed.dtype)
        return self.embed(native.cut(pixels, seen, self.config.patch_size, extent).flatten(2), positions)


def _grid(rois: Tensor) -> tuple[int, int] | None:
    """Rows and columns of cells of one size that cover the image in reading order; None where RoIs are not such."""
    rows = int((rois[:, 0].abs() < 1e-6).sum())
    if rows == 0 or len(rois) % rows:
        return None
    columns = len(rois) // rows
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    cells = torch.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], dim=-1)
    return (rows, columns) if torch.allclose(rois, cells, rtol=0, atol=1e-6) else None


class PreparedAttention(Attention):
    """Attention of packed layers, whose queries come scaled."""

    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, width = plain.heads, plain.proj.in_features
        scale = torch.ones_like(plain.qkv.bias)
        scale[:width] = (width // plain.heads) ** -0.5
        self.qkv, self.proj = PackedLinear(plain.qkv.weight * scale[:, None], plain.qkv.bias * scale), pack(plain.proj)

    def forward(self, x: Tensor, onto: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, d) to what it adds onto (B, N, d), with that; `bias` (B, n) is of the last n keys."""
        return self.proj(self._attend(self.qkv(x), bias), onto)

    def _attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head size)
        mask = None if bias is None else F.pad(bias, (qkv.shape[1] - bias.shape[1], 0))[:, None, None].to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(-2)


class PreparedMlp(Mlp):
    """An MLP of packed layers with its activation in the first one's pass.

    Attributes:
        factor: what the input has to be multiplied with; 1 unless the activation is quick_gelu.
    """

    def __init__(self, plain: Mlp, activation: Activation) -> None:
        nn.Module.__init__(self)
        self.factor = QUICK if activation == "quick_gelu" else 1.0
        self.fc1 = PackedLinear(plain.fc1.weight, plain.fc1.bias * self.factor, activation)
        self.fc2 = PackedLinear(plain.fc2.weight, plain.fc2.bias * self.factor)

    def forward(self, x: Tensor, onto: Tensor) -> Tensor:
        """(B, N, d), `factor` times what it is elsewhere, to what it adds onto (B, N, d), with that."""
        return self.fc2(self.fc1(x), onto, 1 / self.factor)


class PreparedMixing(AdaptiveMixing):
    """Sampling and adaptive mixing; what it mixes with, the token alone decides, and that is generated before."""

    def __init__(self, plain: AdaptiveMixing, padding: Padding) -> None:
        nn.Module.__init__(self)
        self.channels, self.in_points, self.out_points = plain.channels, plain.in_points, plain.out_points
        self.padding: Padding = padding
        self.parameter_generator, self.out_proj = pack(plain.parameter_generator), pack(plain.out_proj)
        self.m_beta, self.s_beta = plain.m_beta, plain.s_beta

    def forward(self, feature_map: Tensor, points: Tensor, generated: Tensor) -> Tensor:
        """A map (B, C, H, W) to what tokens gain (B, n, d).

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
class _Memory:
    """What a unit found without the image, in the order in which it is asked for, and the RoIs (1, n, 4) that it holds for."""

    rois: Tensor
    values: list[Tensor] = field(default_factory=list)

    def recall(self) -> Find:
        """What answers with the values in order instead of finding them."""
        values = iter(self.values)
        return lambda *_: next(values)

    def learn(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Find the next value, and keep it."""
        self.values.append(function(*args))
        return self.values[-1]


def _find(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args)


class PreparedUnit(Unit):
    """A unit of packed layers.

    Args:
        first: whether it is given the same tokens whatever the image is, so that all up to its first look is found once.
    """

    attention: type[PreparedAttention] = PreparedAttention

    def __init__(self, plain: Unit, activation: Activation, first: bool) -> None:
        nn.Module.__init__(self)
        self.ops, self.repeats, self.width, self.padding = plain.ops, plain.repeats, plain.width, plain.padding
        self.first = first
        self.stage_embedding = plain.stage_embedding
        if "SAMPLING_M" in self.ops:
            self._prepare_looks(plain)
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
            self._prepare_moves(*plain.roi_adjust_module)
        self._memories: dict[int, _Memory] = {}

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
        known, memory = self._known(rois) if self.first else (None, None)
        tokens = boxes = _find  # how to find what depends on tokens, and what on RoIs
        if known is not None:
            x, rois, tokens, boxes = x[:1], rois[:1], known, known
        for repeat in range(self.repeats):
            if self.stage_embedding is not None:
                x = x + self.stage_embedding.weight[repeat]
            for op in self.ops:
                if op == "ATTN":
                    x = tokens(self._attend, x, bias)
                elif op == "MLP":
                    x = tokens(self._feed, x)
                elif op == "SAMPLING_M":
                    latents = x[:, -n:]
                    points = tokens(self.points, latents, rois)
                    generated = tokens(self.generate, latents)
                    if points_seen is not None:
                        points_seen.append(points.expand(batch, -1, -1, -1))
                    if extent is not None:
                        points = points_on_canvas(points, extent, *feature_map.shape[-2:], self.padding)
                    x = _add_to_latents(x, self._look(feature_map, points, generated, rois))
                    tokens = _find
                elif op == "PE_INJECT":
                    x = _add_to_latents(x, boxes(self._inject, rois, x.dtype))
                else:
                    rois = tokens(self._adjust, x, rois)
                    boxes = tokens
        if memory is not None:
            self._memories[n] = memory
        return x.expand(batch, -1, -1), rois.expand(batch, -1, -1)

    def _prepare_looks(self, plain: Unit) -> None:
        self.roi_offset_bias, self.roi_offset_module = plain.roi_offset_bias, pack(plain.roi_offset_module)
        self.adaptive_mixing = PreparedMixing(plain.adaptive_mixing, plain.padding)
        self.generate = self.adaptive_mixing.parameter_generator

    def _prepare_moves(self, norm: nn.LayerNorm, *layers: nn.Module) -> None:
        *hidden, last = layers
        self.roi_adjust_module = nn.Sequential(_hidden(norm, *hidden), pack(last))

    def _look(self, feature_map: Tensor, points: Tensor, generated: Tensor, rois: Tensor) -> Tensor:
        return self.adaptive_mixing(feature_map, points, generated)

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.attn(self.norm1(x), x, bias)

    def _feed(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x), x)

    def _inject(self, rois: Tensor, dtype: torch.dtype) -> Tensor:
        return self.pe_transition(encode_rois(rois, self.width).to(dtype))

    def _adjust(self, x: Tensor, rois: Tensor) -> Tensor:
        return adjust_rois(rois, self.roi_adjust_module(x[:, -rois.shape[1] :]).float())

    def _known(self, rois: Tensor) -> tuple[Find | None, _Memory | None]:
        """How to find what is the same for all images, and where it is kept if it is found for the first time; None for other RoIs."""
        memory = self._memories.get(rois.shape[1])
        if memory is None:
            if not bool((rois == rois[:1]).all()):
                return None, None
            memory = _Memory(rois[:1].clone())
            return memory.learn, memory
        return (memory.recall(), None) if bool((rois == memory.rois).all()) else (None, None)


def _hidden(norm: nn.LayerNorm, *layers: nn.Module) -> nn.Module:
    """A norm, a linear layer and its GELU as one; the norm alone where there is nothing else."""
    return PackedLinear(layers[0].weight, layers[0].bias, "gelu", norm) if layers else norm


class CompiledEarlyConvolution(EarlyConvolution):
    """An early convolution that is one compiled function, with its pooling, ReLU and norm."""

    def __init__(self, plain: EarlyConvolution) -> None:
        nn.Module.__init__(self)
        self._whole = native.Convolution(plain.conv1, MAP_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        """As `EarlyConvolution.forward`."""
        return self._whole(pixels)


class CompiledFocus(Focus):
    """A focus whose network is one compiled function, and its placement another."""

    def __init__(self, plain: Focus) -> None:
        nn.Module.__init__(self)
        self.config, self._whole = plain.config, native.Focus(plain)

    def forward(self, pixels: Tensor, region: Tensor | None = None, extent: Tensor | None = None) -> Tensor:
        """As `Focus.forward`."""
        box = torch.tensor([0.0, 0.0, 1.0, 1.0]) if region is None else region.unsqueeze(1)
        return self._whole.predict(pixels, box.expand(len(pixels), 1, 4), extent, MAP)

    def place(self, maps: Tensor, aspects: Tensor, num_tokens: int) -> Tensor:
        """As `Focus.place`."""
        return native.place(maps, aspects, num_tokens, coarse_cells(num_tokens), self.config.evenness)


class CompiledAttention(PreparedAttention):
    """Attention whose core is a compiled function, for as many tokens as that is faster for than torch's."""

    def _attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        return native.attend(qkv, self.heads, bias) if native.attends(qkv, self.heads) else super()._attend(qkv, bias)


class CompiledUnit(PreparedUnit):
    """A prepared unit of compiled functions; positions that are told right after a look are told with it.

    Attention and MLP are one call each, where products are our own.
    """

    attention = CompiledAttention

    def __init__(self, plain: Unit, activation: Activation, first: bool) -> None:
        super().__init__(plain, activation, first)
        self._attention = self._mlp = None
        if "ATTN" in self.ops and self.attn.qkv.ours is not None:
            self._attention = native.Attention(self.norm1, self.attn.qkv.ours, self.attn.proj.ours, self.attn.heads)
        if "MLP" in self.ops and self.mlp.fc1.ours is not None:
            self._mlp = native.Feed(self.norm2, self.mlp.fc1.ours, self.mlp.fc2.ours, 1 / self.mlp.factor)

    def _attend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        whole = self._attention is not None and self._attention.takes(x.shape[1])
        return self._attention(x, bias) if whole else super()._attend(x, bias)

    def _feed(self, x: Tensor) -> Tensor:
        return super()._feed(x) if self._mlp is None else self._mlp(x)

    def _prepare_looks(self, plain: Unit) -> None:
        mixing, (norm, layer) = plain.adaptive_mixing, plain.roi_offset_module
        self.generate = pack(mixing.parameter_generator)
        self.m_beta, self.s_beta, self.out_points = mixing.m_beta, mixing.s_beta, mixing.out_points
        self._where, self._places = native.Points(norm, layer.weight, plain.roi_offset_bias), None
        weight, bias = mixing.out_proj.weight, mixing.out_proj.bias
        after = self.ops.index("SAMPLING_M") + 1
        if self.ops[after : after + 1] == ("PE_INJECT",):
            self.ops = (*self.ops[:after], *self.ops[after + 1 :])
            norm, layer = plain.pe_transition
            self._places = native.Positions(norm, encoding_frequencies(self.width))
            weight, bias = torch.cat([weight, layer.weight], dim=1), bias + layer.bias
        self.gain = PackedLinear(weight, bias)

    def _prepare_moves(self, norm: nn.LayerNorm, *layers: nn.Module) -> None:
        *hidden, last = layers
        self.roi_adjust_module = _hidden(norm, *hidden)
        self._move = last.weight.float()

    def points(self, latents: Tensor, rois: Tensor) -> Tensor:
        """As `Unit.points`."""
        return self._where(latents, rois)

    def _look(self, feature_map: Tensor, points: Tensor, generated: Tensor, rois: Tensor) -> Tensor:
        beside = 0 if self._places is None else self.width
        rows = native.mix(feature_map, points, generated, self.m_beta, self.s_beta, self.out_points, self.padding, beside)
        if self._places is not None:
            self._places(rois, rows)
        return self.gain(rows)

    def _adjust(self, x: Tensor, rois: Tensor) -> Tensor:
        return native.adjust(self.roi_adjust_module(x[:, -rois.shape[1] :]), self._move, rois)
