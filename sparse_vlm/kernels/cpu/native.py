"""C++ CPU kernels for inference: sampling and mixing, early convolution, cells, focus, attention, small-batch linear layers.

Shape legend: B images, n tokens, P points a token, C channels of the map, O points after mixing, d width of a token, H x W the map.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.kernels.cpu.library import TYPES, call, load
from sparse_vlm.roi import Padding, crop_level

PADDING = 16  # as in vectors.h
PANEL = 32  # as in linear.h
MAX_TOKENS = 128  # up to which this attention is faster than torch's
MAX_TOKENS_AVX512 = 1025  # the same with AVX-512 (bfloat16: AVX-512 BF16); more tokens were not measured


def is_supported(dtype: torch.dtype, channels: int) -> bool:
    """Whether the kernels support tokens of this dtype and a map of C channels; compiles them at the first call."""
    return dtype in TYPES and channels % PADDING == 0 and load() is not None


@functools.cache
def linear_is_supported(dtype: torch.dtype) -> bool:
    """Whether `Linear` supports this CPU and dtype: AVX-512 for float32; AVX-512 BF16 without AMX for bfloat16."""
    return dtype in TYPES and load() is not None and bool(getattr(load(), f"linear_is_supported_{TYPES[dtype]}")())


def attention_is_supported(qkv: Tensor, heads: int) -> bool:
    """Whether `attention` supports queries, keys and values (B, N, 3 d) and is faster than torch."""
    return _attention_is_supported(qkv.dtype, qkv.shape[1], qkv.shape[2] // 3 // heads)


def _attention_is_supported(dtype: torch.dtype, tokens: int, size: int) -> bool:
    return tokens <= (MAX_TOKENS_AVX512 if linear_is_supported(dtype) else MAX_TOKENS) and size % PADDING == 0


class Convolution:
    """The early convolution with pooling, ReLU and norm.

    Args:
        convolution: 7 x 7, stride 2, from 3 to C channels.
        eps: of the norm over the C channels.
    """

    def __init__(self, convolution: nn.Conv2d, eps: float) -> None:
        # each row of the window is contiguous, padded to an even length for bfloat16 pairs
        weight = convolution.weight.detach().permute(2, 3, 1, 0).flatten(1, 2)  # (7, 21, C)
        self.weight, self.bias, self.eps = F.pad(weight, (0, 0, 0, 1)).contiguous(), _float32(convolution.bias), eps

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) to the map (B, C, ceil(ceil(h / 2) / 2), ceil(ceil(w / 2) / 2)), channels last in memory.

        Raises:
            RuntimeError: the dtype differs from the weight's.
        """
        _check_dtype(pixels.dtype, self.weight.dtype)
        batch, _, height, width = pixels.shape
        channels = self.weight.shape[2]
        out = torch.empty(batch, -(-height // 4), -(-width // 4), channels, dtype=pixels.dtype)
        given = pixels.contiguous(), self.weight, self.bias, self.eps
        call("convolve", pixels.dtype, *given, batch, height, width, channels, out)
        return out.permute(0, 3, 1, 2)


class Focus:
    """The network of a `sparse_vlm.tower.focus.Focus`.

    Args:
        focus: supported (see `is_supported`).
    """

    def __init__(self, focus: nn.Module) -> None:
        layers = [*focus.stem, *focus.body, focus.coarse]
        self.size, self.eps, self.channels = focus.config.size, focus.norm.eps, focus.config.channels
        # each row of a window is contiguous
        self.weight = torch.cat([_float32(layer.weight.permute(2, 3, 1, 0)).flatten() for layer in layers])
        parts = [
            *(layer.bias for layer in focus.stem), focus.norm.weight, focus.norm.bias, *(layer.bias for layer in focus.body),
            focus.context.bias, focus.context.weight.mT, focus.coarse.bias, focus.head.weight, focus.head.bias,
        ]  # fmt: skip
        self.numbers, self.scales = torch.cat([_float32(part).flatten() for part in parts]), len(focus.head.bias)

    @staticmethod
    def is_supported(focus: nn.Module) -> bool:
        """Whether all channel counts are multiples of 16."""
        return all(channels % PADDING == 0 for channels in focus.config.channels)

    def predict(self, pixels: Tensor, boxes: Tensor, extent: Tensor | None, side: int) -> Tensor:
        """Images (B, 3, H, W) and one box in each (B, 1, 4) to maps (B, S, side, side) float32."""
        thumbnails = crop_rois(pixels, boxes, self.size, extent).float()
        out = torch.empty(len(pixels), self.scales, side, side)
        given = thumbnails, self.weight, self.numbers, self.eps
        call("focus", torch.float32, *given, len(pixels), self.size, *self.channels, side, self.scales, out)
        return out


def place_cells(maps: Tensor, aspects: Tensor, num_tokens: int, coarse: int, evenness: float) -> Tensor:
    """`sparse_vlm.tower.focus.Focus.place`: maps (B, S, M, M), aspects (B,) to cells (B, n, 4), splits of a grid of `coarse` cells."""
    batch, scales, side = maps.shape[:3]
    out = torch.empty(batch, num_tokens, 4)
    call("place_cells", torch.float32, _float32(maps), _float32(aspects), evenness, batch, num_tokens, coarse, side, scales, out)
    return out


class Linear:
    """A linear layer for few rows.

    Args:
        weight, bias: (outer, inner) and (outer), not modified; inner is even.
        activation: a key of `ACTIVATIONS`.
        norm: applied to the input before the layer.
    """

    ACTIVATIONS: ClassVar[dict[str | None, int]] = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None, norm: nn.LayerNorm | None = None) -> None:
        self.dtype, self.outer, self.inner = weight.dtype, *weight.shape
        panels = -(-self.outer // PANEL)
        padded = F.pad(weight.detach(), (0, 0, 0, panels * PANEL - self.outer))
        together = 2 if weight.dtype == torch.bfloat16 else 1  # bfloat16 is multiplied in pairs
        self.weight = padded.view(panels, PANEL, self.inner // together, together).transpose(1, 2).contiguous()
        self.bias = torch.zeros(panels * PANEL)
        if bias is not None:
            self.bias[: self.outer] = bias.detach().float()
        self.activation = self.ACTIVATIONS[activation]
        self.norm = (None, None, 0.0) if norm is None else _norm_arguments(norm)

    def __call__(self, x: Tensor, residual: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """(..., inner) to (..., outer); with a residual, residual + factor * output.

        Raises:
            RuntimeError: the dtype differs from the weight's.
        """
        _check_dtype(x.dtype, self.dtype)
        out = torch.empty(*x.shape[:-1], self.outer, dtype=x.dtype)
        x, rows = x.contiguous(), x.numel() // self.inner
        if residual is not None:
            _check_dtype(residual.dtype, self.dtype)
            residual = residual.expand_as(out).contiguous()
        scratch = None if self.norm[0] is None else torch.empty_like(x)
        layer = self.weight, self.bias, residual, factor, self.activation
        call("linear", x.dtype, x, *self.norm, *layer, rows, self.inner, self.outer, scratch, out)
        return out


class Points:
    """Sampling points of tokens, as `sparse_vlm.tower.layers.Unit.points`.

    Args:
        norm: of tokens (d); its affine part is folded into the layer.
        weight, bias: (2 P, d) and (2 P,).
    """

    def __init__(self, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> None:
        self.count, self.eps = len(bias) // 2, norm.eps
        rows = -(-len(bias) // PADDING) * PADDING
        self.weight = torch.zeros(weight.shape[1], rows)
        self.bias = torch.zeros(rows)
        self.weight[:, : len(bias)] = (weight.float() * norm.weight.float()).T
        self.bias[: len(bias)] = bias.float() + weight.float() @ norm.bias.float()

    def __call__(self, latents: Tensor, rois: Tensor) -> Tensor:
        """Latents (B, n, d) and RoIs (B or 1, n, 4) to points (B, n, P, 2)."""
        batch, n, width = latents.shape
        out = torch.empty(batch, n, self.count, 2)
        latents, image_stride = _contiguous_rows(latents)
        rois = _float32(rois.expand(batch, n, 4))
        call("points", latents.dtype, latents, image_stride, rois, self.weight, self.bias, self.eps, batch, n, width, self.count, out)
        return out


class Positions:
    """Position encodings of RoIs, normalised.

    Args:
        norm: of the encodings (d).
        frequencies: (d / 4), as `roi.encoding_frequencies` returns them.
    """

    def __init__(self, norm: nn.LayerNorm, frequencies: Tensor) -> None:
        self.gain, self.shift, self.eps, self.frequencies = _float32(norm.weight), _float32(norm.bias), norm.eps, frequencies

    def __call__(self, rois: Tensor, out: Tensor) -> None:
        """Encode RoIs (B, n, 4) into the last d columns of `out`, contiguous (B, n, at least d)."""
        batch, n, stride = out.shape
        width = len(self.gain)
        given = _float32(rois.expand(batch, n, 4)), self.frequencies, self.gain, self.shift, self.eps, batch * n, width
        call("positions", out.dtype, *given, out[..., -width:], stride)


class _Block:
    """A pre-norm residual block of two linear layers, x + f(norm(x)), as one call; x is (B, N, d).

    Args:
        norm: of the tokens, of any dtype.
        first, last: linear layers; the last output is as wide as the first input.

    Raises:
        RuntimeError: when called with a dtype that differs from the layers'.
    """

    def __init__(self, norm: nn.LayerNorm, first: Linear, last: Linear) -> None:
        self.norm, self.first, self.last = _norm_arguments(norm), first, last

    def _compute(self, name: str, x: Tensor, scratch: int, *given: Tensor | float) -> Tensor:
        """Call the C++ function `name` on x (B, N, d) with `scratch` numbers of working memory a token."""
        _check_dtype(x.dtype, self.first.dtype)
        x = x.contiguous()
        out, buffer = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1] * scratch, dtype=x.dtype)
        call(name, x.dtype, x, *self.norm, *given, buffer, out)
        return out


class Attention(_Block):
    """The attention block: norm, queries (scaled by the layer), keys and values, attention, output projection, residual addition.

    Args:
        heads: of a size that is a multiple of 16.
    """

    def __init__(self, norm: nn.LayerNorm, qkv: Linear, proj: Linear, heads: int) -> None:
        super().__init__(norm, qkv, proj)
        self.heads, self.size = heads, proj.inner // heads

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, d) to (B, N, d); `bias` (B, n) is added to the scores of the last n keys."""
        layers = self.first.weight, self.first.bias, self.last.weight, self.last.bias
        return self._compute("attention_block", x, 4 * x.shape[2], *layers, *_key_bias(bias), *x.shape[:2], self.heads, self.size)

    def is_supported(self, tokens: int) -> bool:
        """Whether this is faster than torch at this number of tokens."""
        return _attention_is_supported(self.first.dtype, tokens, self.size)


class Mlp(_Block):
    """The MLP block: norm, two layers, residual addition.

    Args:
        factor: of the output before the addition.
    """

    def __init__(self, norm: nn.LayerNorm, fc1: Linear, fc2: Linear, factor: float) -> None:
        super().__init__(norm, fc1, fc2)
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N, d) to (B, N, d)."""
        first, last = self.first, self.last
        rows, scratch = x.shape[0] * x.shape[1], x.shape[2] + first.outer
        layers = first.weight, first.bias, first.activation, last.weight, last.bias
        return self._compute("mlp_block", x, scratch, *layers, self.factor, rows, first.inner, first.outer)


def crop_rois(pixels: Tensor, rois: Tensor, size: int, extent: Tensor | None = None) -> Tensor:
    """`sparse_vlm.roi.crop_rois` for three channels: (B, 3, H, W) and RoIs (B, n, 4) to (B, n, 3, size, size)."""
    (batch, _, height, width), n = pixels.shape, rois.shape[1]
    out = torch.empty(batch, n, 3, size, size, dtype=pixels.dtype)
    whole = torch.tensor([[width, height]], dtype=torch.float32)
    whole = (whole.expand(batch, 2) if extent is None else (whole * extent).round()).contiguous()
    levels = crop_level(height, width, size)
    call("crop_rois", pixels.dtype, pixels.contiguous(), _float32(rois), whole, batch, n, height, width, size, levels, out)
    return out


def average_positions(rois: Tensor, positions: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """Average position embeddings (G * G, d) float32 over RoIs (B, n, 4) with `roi_average_weights`: (B, n, d)."""
    (count, width), n = positions.shape, rois.shape[:-1].numel()
    out = torch.empty(*rois.shape[:-1], width, dtype=dtype)
    call("average_positions", dtype, _float32(rois), positions, n, math.isqrt(count), samples, width, out)
    return out


def attention(qkv: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention without projections: scaled queries, keys and values (B, N, 3 d) to (B, N, d).

    Args:
        heads: of a size that is a multiple of 16.
        bias: (B, n), added to the scores of the last n keys.
    """
    batch, n, width = qkv.shape
    out = torch.empty(batch, n, width // 3, dtype=qkv.dtype)
    call("attention_core", qkv.dtype, qkv.contiguous(), *_key_bias(bias), batch, n, heads, width // 3 // heads, out)
    return out


def adjust_rois(hidden: Tensor, weight: Tensor, rois: Tensor) -> Tensor:
    """`sparse_vlm.roi.adjust_rois` of RoIs (B or 1, n, 4) by a linear layer `weight` (4, d) float32 on hidden tokens (B, n, d)."""
    batch, n, width = hidden.shape
    out = torch.empty(batch, n, 4)
    hidden, image_stride = _contiguous_rows(hidden)
    call("adjust_rois", hidden.dtype, hidden, image_stride, weight, _float32(rois.expand(batch, n, 4)), batch, n, width, out)
    return out


def sample_and_mix(
    feature_map: Tensor,
    points: Tensor,
    generated: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    padding: Padding,
    padding_columns: int = 0,
) -> Tensor:
    """Sample a map at points and mix the samples with generated parameters: over channels, then over points.

    Args:
        feature_map: (B, C, H, W); not copied where it is channels last in memory.
        points: (B, n, P, 2), or (1, n, P, 2) for all images.
        generated: (B, n, C * C + O * P), or (1, n, ...) for all images.
        m_beta, s_beta: (C,) and (O,), or both None.
        padding_columns: columns appended to each row and left uninitialised.

    Returns:
        (B, n, O * C + padding_columns) in the dtype of `generated`, after the last GELU.
    """
    batch, channels, height, width = feature_map.shape
    n, count = points.shape[1:3]
    stride = out_points * channels + padding_columns
    out = torch.empty(batch, n, stride, dtype=generated.dtype)
    cells = feature_map.permute(0, 2, 3, 1).to(generated.dtype).contiguous()
    betas = (None if beta is None else _float32(beta) for beta in (m_beta, s_beta))
    call(
        "sample_and_mix", generated.dtype, cells, _float32(points), len(points) == 1, generated.contiguous(), len(generated) == 1, *betas,
        batch, n, count, channels, out_points, height, width, padding == "border", out, stride,
    )  # fmt: skip
    return out


def _check_dtype(given: torch.dtype, expected: torch.dtype) -> None:
    if given != expected:
        raise RuntimeError(f"expected {expected}, not {given}")


def _float32(given: Tensor) -> Tensor:
    return given.detach().float().contiguous()


def _key_bias(bias: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if bias is None else (_float32(bias), bias.shape[1])


def _norm_arguments(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return _float32(norm.weight), _float32(norm.bias), norm.eps


def _contiguous_rows(tokens: Tensor) -> tuple[Tensor, int]:
    """Tokens whose rows are contiguous within each image, and the stride between two images."""
    if tokens.stride()[1:] != (tokens.shape[2], 1):
        tokens = tokens.contiguous()
    return tokens, tokens.stride(0)
