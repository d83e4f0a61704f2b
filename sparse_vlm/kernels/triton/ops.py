"""The kernels as torch operators, for torch.compile, CUDA graphs, checkpointing and `torch.library.opcheck`.

Shape legend: B images of h x w pixels, n tokens, P points a token, C channels, O points after mixing, G width of the hidden vector,
J = C * C + O * P parameters a token, H x W the map.

Notable: triton is imported when an operator first runs. `dispatch` makes the inputs contiguous and sets their dtypes: float32 points, a map
of float32 or bfloat16, all others of one of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SAMPLE_AND_MIX = (
    "(Tensor feature_map, Tensor points, Tensor hidden, Tensor weight, Tensor bias, Tensor? m_beta, Tensor? s_beta, int out_points, "
    "bool border) -> Tensor"
)
_SAMPLING_BACKWARD = (
    "(Tensor grad_sampled, Tensor feature_map, Tensor points, bool border, bool of_map, bool of_points) -> (Tensor, Tensor)"
)


@torch.library.custom_op("sparse_vlm::sample_and_mix", mutates_args=(), schema=_SAMPLE_AND_MIX)
def sample_and_mix(
    feature_map: Tensor,
    points: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    border: bool,
) -> Tensor:
    """Sampling and mixing, for inference.

    Args:
        feature_map: (B, H, W, C).
        points: (B, n, P, 2) relative to the image.
        hidden: (B, n, G); weight (J, G) and bias (J,) generate the channel matrix (C, C) and the point matrix (O, P) of each token from it.
        m_beta, s_beta: (C,) and (O,), or both None. With them there is a GELU between the two products.
        out_points: O.
        border: outside the map its border is read, else zeros.

    Returns:
        (B, n, O * C).
    """
    from sparse_vlm.kernels.triton import launch

    return launch.sample_and_mix(feature_map, points, hidden, weight, bias, m_beta, s_beta, out_points, border)


@sample_and_mix.register_fake
def _(
    feature_map: Tensor,
    points: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    border: bool,
) -> Tensor:
    return hidden.new_empty(*hidden.shape[:2], out_points * feature_map.shape[-1])


@torch.library.custom_op("sparse_vlm::sampling_backward", mutates_args=(), schema=_SAMPLING_BACKWARD)
def sampling_backward(
    grad_sampled: Tensor, feature_map: Tensor, points: Tensor, border: bool, of_map: bool, of_points: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the feature map and of the points, each empty where it is not requested; bitwise reproducible."""
    from sparse_vlm.kernels.triton import launch

    return launch.sampling_backward(grad_sampled, feature_map, points, border, of_map, of_points)


@sampling_backward.register_fake
def _(grad_sampled: Tensor, feature_map: Tensor, points: Tensor, border: bool, of_map: bool, of_points: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(feature_map) if of_map else feature_map.new_empty(0),
        torch.empty_like(points) if of_points else points.new_empty(0),
    )


@torch.library.custom_op(
    "sparse_vlm::sample", mutates_args=(), schema="(Tensor feature_map, Tensor points, bool border, ScalarType dtype) -> Tensor"
)
def sample(feature_map: Tensor, points: Tensor, border: bool, dtype: torch.dtype) -> Tensor:
    """Sample a map (B, H, W, C) at points (B, n, P, 2) to (B, n, P, C) of a dtype."""
    from sparse_vlm.kernels.triton import launch

    return launch.sample(feature_map, points, border, dtype)


@sample.register_fake
def _(feature_map: Tensor, points: Tensor, border: bool, dtype: torch.dtype) -> Tensor:
    return feature_map.new_empty(*points.shape[:3], feature_map.shape[-1], dtype=dtype)


def _sample_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feature_map, points, ctx.border, _ = inputs
    ctx.save_for_backward(feature_map, points)


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    feature_map, points = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    grads = torch.ops.sparse_vlm.sampling_backward(grad.contiguous(), feature_map, points, ctx.border, *needed)
    return *(each if one else None for each, one in zip(grads, needed, strict=True)), None, None


sample.register_autograd(_sample_backward, setup_context=_sample_context)


@torch.library.custom_op("sparse_vlm::early_convolution", mutates_args=(), schema="(Tensor pixels, Tensor weight, Tensor bias) -> Tensor")
def early_convolution(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pixels (B, 3, h, w) with weight (C, 3, 7, 7) and bias (C,) to (B, ceil(h / 2), ceil(w / 2), C): stride 2, padding 3."""
    from sparse_vlm.kernels.triton import launch

    return launch.early_convolution(pixels, weight, bias)


@early_convolution.register_fake
def _(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = pixels.shape
    return pixels.new_empty(batch, (height + 1) // 2, (width + 1) // 2, weight.shape[0])


def _convolution_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _convolution_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By torch, with cuDNN; pixels get no gradient."""
    pixels, weight = ctx.saved_tensors
    grads = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), pixels, weight, [weight.shape[0]], [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [False, True, True]
    )
    return None, *(each if needed else None for each, needed in zip(grads[1:], ctx.needs_input_grad[1:], strict=True))


early_convolution.register_autograd(_convolution_backward, setup_context=_convolution_context)
