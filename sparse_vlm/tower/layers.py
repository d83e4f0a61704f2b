"""Layers of a SparseFormer: early convolution, RoI patch embedding, sampling and mixing, attention.

Shape legend: B batch, n latent tokens, P sampling points, C channels of the map, O points after spatial mixing, d width of the unit,
g inner width of the generator, H x W the map, G x G the teacher's patch grid. A trailing comment gives the shape of a line's result.
Module and parameter names are those of the released state dicts.
Sources: SparseFormer (arXiv 2304.03768) section 3; Bootstrapping SparseFormers (arXiv 2312.01987) section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm import kernels
from sparse_vlm.roi import (
    Padding,
    adjust_rois,
    crop_rois,
    encode_rois,
    points_in_rois,
    points_on_canvas,
    roi_average_weights,
    sample_bilinear,
    standardize_offsets,
)
from sparse_vlm.tower.config import Activation, RoIPatchConfig, SparseFormerConfig, UnitConfig

MAP_EPS = 1e-5  # of the norm over the map's channels


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def is_plain(module: nn.Module) -> bool:
    """Whether a layer computes with its own weight alone, so that its weight may be used instead of calling it.

    False for layers of PEFT, bitsandbytes or a parametrization, and for layers with hooks or a replaced forward.
    """
    return type(module) in (nn.Linear, nn.Conv2d, nn.Embedding) and not (
        module._forward_hooks or module._forward_pre_hooks or vars(module).get("forward") is not None
    )


def embedding_rows(table: nn.Embedding) -> Tensor:
    """All rows of an embedding, (rows, width)."""
    if is_plain(table):
        return table.weight
    return table(torch.arange(len(table.weight), device=table.weight.device))


class EarlyConvolution(nn.Module):
    """The feature map that tokens sample: 7x7 convolution, ReLU, max pool, norm over channels; a quarter of the image's resolution."""

    def __init__(self, conv_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, conv_dim, kernel_size=7, stride=2, padding=3)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, h, w) to (B, C, h / 4, w / 4)."""
        x = kernels.convolve(pixels, self.conv1.weight, self.conv1.bias) if is_plain(self.conv1) else None
        if x is None:
            # with channels last, pooling and the norm run along memory: a third of the time on a CPU
            x = self.conv1(pixels.contiguous(memory_format=torch.channels_last))
        x = F.relu(F.max_pool2d(x, kernel_size=3, stride=2, padding=1))  # the order does not matter to the result
        # over the last dimension of memory: a quarter of the time of taking mean and variance over dim 1
        return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=MAP_EPS).permute(0, 3, 1, 2)


class RoIPatchEmbedding(nn.Module):
    """The initial tokens: the teacher's patch embedding and position embedding, averaged over each token's RoI.

    Kind `pool` embeds the image at the teacher's resolution and averages patches over each RoI: a fixed cost, on the patches that the
    teacher saw. Kind `crop` scales each RoI, read from the image at its own resolution, to one patch: it supports any number and size of
    RoIs, at the cost of one patch each.
    """

    def __init__(self, config: RoIPatchConfig, width: int, ln_eps: float) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, width, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(config.grid**2, width))
        self.norm_pre = nn.LayerNorm(width, eps=ln_eps) if config.norm_pre else nn.Identity()

    def forward(self, pixels: Tensor, rois: Tensor, seen: Tensor, extent: Tensor | None = None) -> Tensor:
        """(B, 3, h, w) to tokens (B, n, d), before `norm_pre`.

        Args:
            rois: (n, 4) or (B, n, 4), for the position embeddings.
            seen: (B, n, 4), the same RoIs within the encoded region, relative to the image.
            extent: (B, 2), as in `crop_rois`.
        """
        positions = roi_average_weights(rois, self.config.grid, self.config.grid, self.config.points_per_side)  # (..., n, G * G)
        if self.config.kind == "crop":
            crops = crop_rois(pixels, seen, self.config.patch_size, extent)
            if is_plain(self.patch_embed):
                patches = crops.flatten(2) @ self.patch_embed.weight.flatten(1).T  # (B, n, d)
            else:
                patches = self.patch_embed(crops.flatten(0, 1)).flatten(1).unflatten(0, crops.shape[:2])
            return patches + positions.to(patches.dtype) @ self.pos_embed
        side = self.config.patch_size * self.config.grid
        if extent is not None:
            pixels = crop_rois(pixels, rois.new_tensor([[0, 0, 1, 1]]).expand(len(pixels), 1, 4), side, extent)[:, 0]
        elif pixels.shape[-2:] != (side, side):
            # in float32: there is no bfloat16 kernel on a CPU
            pixels = F.interpolate(pixels.float(), size=(side, side), mode="bilinear", antialias=True).to(pixels.dtype)
        patches = self.patch_embed(pixels).flatten(2).mT + self.pos_embed  # (B, G * G, d)
        return positions.to(patches.dtype) @ patches


class _ClampedCoordinates(torch.autograd.Function):
    """Identity whose gradient is clamped to +-1/H: v1's guard against diverging RoIs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, points: Tensor, height: int) -> Tensor:  # type: ignore[override]
        ctx.limit = 1.0 / height  # type: ignore[attr-defined]
        return points.view_as(points)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.clamp(-ctx.limit, ctx.limit), None  # type: ignore[attr-defined]


class AdaptiveMixing(nn.Module):
    """Mix sampled features with weights that each token generates: over channels, then over points (arXiv 2304.03768, 3.2)."""

    def __init__(self, config: SparseFormerConfig, width: int) -> None:
        super().__init__()
        self.channels, self.in_points, self.out_points = config.conv_dim, config.num_points, config.mixing_out_points
        inner = config.generator_width(width)
        self.parameter_generator = nn.Sequential(
            nn.LayerNorm(width, eps=1e-5),  # in both families, whatever the eps of the other norms
            nn.Linear(width, inner),
            nn.Linear(inner, self.channels**2 + self.in_points * self.out_points),
        )
        if config.mixing_bias:
            self.m_beta = nn.Parameter(torch.zeros(self.channels))
            self.s_beta = nn.Parameter(torch.zeros(self.out_points))
        else:
            self.m_beta = self.s_beta = None
        self.out_proj = nn.Linear(self.out_points * self.channels, width)

    def forward(self, tokens: Tensor, sampled: Tensor) -> Tensor:
        """Tokens (B, n, d) and their samples (B, n, P, C) to a residual of the tokens (B, n, d)."""
        generated = self.parameter_generator(tokens)
        over_channels, over_points = generated.split([self.channels**2, self.in_points * self.out_points], dim=-1)
        over_channels = over_channels.unflatten(-1, (self.channels, self.channels))
        over_points = over_points.unflatten(-1, (self.out_points, self.in_points))
        x = sampled @ over_channels  # (B, n, P, C)
        # bootstrapped models have no bias and no activation between channels and points
        if self.m_beta is not None:
            x = F.gelu(x + self.m_beta)
        x = over_points @ x  # (B, n, O, C)
        if self.s_beta is not None:
            x = x + self.s_beta.unsqueeze(-1)
        return self.out_proj(F.gelu(x).flatten(-2))

    def sample_and_mix(self, tokens: Tensor, feature_map: Tensor, points: Tensor, padding: Padding) -> Tensor:
        """Sample a map (B, C, H, W) at points (B, n, P, 2) and mix; by one kernel where it is supported."""
        norm, inner, last = self.parameter_generator
        trained = torch.is_grad_enabled() and any(each.requires_grad for each in self.parameters())
        if is_plain(last) and kernels.is_supported(feature_map, points, tokens, trained):
            mixed = kernels.sample_and_mix(
                feature_map, points, inner(norm(tokens)), last.weight, last.bias, self.m_beta, self.s_beta, self.out_points, padding
            )
            return self.out_proj(mixed)
        sampled = kernels.sample(feature_map, points, padding, tokens.dtype)
        if sampled is None:
            sampled = sample_bilinear(feature_map, points, padding).to(tokens.dtype)
        return self(tokens, sampled)


class Attention(nn.Module):
    """Multi-head self-attention with timm's parameter names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N, d) to (B, N, d).

        Args:
            bias: (B, N), added to the attention scores of each key.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, head size)
        mask = None if bias is None else bias[:, None, None].to(q.dtype)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """Two linear layers with timm's parameter names."""

    def __init__(self, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) to (B, N, d)."""
        return self.fc2(self.activation(self.fc1(x)))


class AttentionPool(nn.Module):
    """One learned probe attends to all tokens, then an MLP: SigLIP's head (arXiv 2303.15343; Zhai et al., arXiv 2106.04560, section 3.4).

    Its parameters have the names of a block's, so that they are inherited like a block's.
    """

    def __init__(self, width: int, heads: int, eps: float, activation: Activation) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(width))
        self.attn = Attention(width, heads)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) to (B, d)."""
        probe = self.probe.expand(x.shape[0], 1, -1)
        if is_plain(self.attn.qkv):
            weights, biases = self.attn.qkv.weight.chunk(3), self.attn.qkv.bias.chunk(3)
            qkv = (F.linear(tokens, weight, bias) for tokens, weight, bias in zip((probe, x, x), weights, biases, strict=True))
        else:
            qkv = (self.attn.qkv(tokens).chunk(3, dim=-1)[part] for part, tokens in enumerate((probe, x, x)))
        q, k, v = (each.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2) for each in qkv)  # (B, heads, 1 or N, head size)
        pooled = self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))  # (B, 1, d)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class Unit(nn.Module):
    """A list of operations on (tokens, RoIs), run `repeats` times with the same weights.

    A CLS token has no RoI and takes part in ATTN and MLP only.
    """

    def __init__(self, config: SparseFormerConfig, unit: UnitConfig) -> None:
        super().__init__()
        self.ops, self.repeats, self.width = unit.ops, unit.repeats, unit.width
        self.padding: Padding = config.padding
        self.clamp_coordinate_grad = config.clamp_coordinate_grad
        width, eps = unit.width, config.ln_eps
        if unit.repeats > 1 and config.stage_embedding:
            self.stage_embedding = nn.Embedding(unit.repeats, width)
        else:
            self.stage_embedding = None
        if "SAMPLING_M" in unit.ops:
            self.roi_offset_bias = nn.Parameter(torch.zeros(config.num_points * 2))
            self.roi_offset_module = nn.Sequential(nn.LayerNorm(width, eps=eps), nn.Linear(width, config.num_points * 2, bias=False))
            self.adaptive_mixing = AdaptiveMixing(config, width)
        if "PE_INJECT" in unit.ops:
            self.pe_transition = nn.Sequential(nn.LayerNorm(width, eps=eps), nn.Linear(width, width))
        if "ATTN" in unit.ops:
            self.norm1 = nn.LayerNorm(width, eps=eps)
            self.attn = Attention(width, config.heads(width))
        if "MLP" in unit.ops:
            self.norm2 = nn.LayerNorm(width, eps=eps)
            self.mlp = Mlp(width, unit.activation)
        if "ROI_ADJ" in unit.ops:
            hidden = [nn.Linear(width, width), nn.GELU()] if config.adjust_hidden else []
            self.roi_adjust_module = nn.Sequential(nn.LayerNorm(width, eps=eps), *hidden, nn.Linear(width, 4, bias=False))

    def forward(
        self,
        x: Tensor,
        rois: Tensor,
        feature_map: Tensor | None,
        points_seen: list[Tensor] | None,
        extent: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, d) tokens and (B, n, 4) RoIs to the same; the CLS token is first when N = n + 1.

        Args:
            points_seen: a list to which the sampling points (B, n, P, 2) of each SAMPLING_M are appended.
            extent: (B, 2), the share of the map's width and height that holds each image; all of it by default.
            bias: (B, n), added to the attention scores of each latent token.
        """
        if bias is not None:  # CLS covers no area
            bias = F.pad(bias, (x.shape[1] - bias.shape[1], 0))
        for repeat in range(self.repeats):
            if self.stage_embedding is not None:
                x = x + embedding_rows(self.stage_embedding)[repeat]
            for op in self.ops:
                if op == "ATTN":
                    x = x + self.attn(self.norm1(x), bias)
                elif op == "MLP":
                    x = x + self.mlp(self.norm2(x))
                elif op == "SAMPLING_M":
                    assert feature_map is not None
                    latents = x[:, -rois.shape[1] :]
                    points = self.points(latents, rois)
                    if points_seen is not None:
                        points_seen.append(points.detach())
                    if extent is not None:
                        points = points_on_canvas(points, extent, *feature_map.shape[-2:], self.padding)
                    if self.clamp_coordinate_grad:
                        points = _ClampedCoordinates.apply(points, feature_map.shape[-2])
                    x = _add_to_latents(x, self.adaptive_mixing.sample_and_mix(latents, feature_map, points, self.padding))
                elif op == "PE_INJECT":
                    x = _add_to_latents(x, self.pe_transition(encode_rois(rois, self.width).to(x.dtype)))
                else:
                    delta = self.roi_adjust_module(x[:, -rois.shape[1] :])
                    rois = adjust_rois(rois, delta.float())
        return x, rois

    def points(self, latents: Tensor, rois: Tensor) -> Tensor:
        """Sampling points of each token: (B, n, P, 2) float32, relative to the image."""
        offsets = self.roi_offset_module(latents).float() + self.roi_offset_bias.float()
        return points_in_rois(rois, standardize_offsets(offsets.unflatten(-1, (-1, 2))))


def _add_to_latents(x: Tensor, delta: Tensor) -> Tensor:
    """Add to the last n tokens; a CLS token, which is first, is unchanged."""
    extra = x.shape[1] - delta.shape[1]
    return x + (F.pad(delta, (0, 0, extra, 0)) if extra else delta)
