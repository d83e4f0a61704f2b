"""The kernels as torch operators, so that torch.compile, CUDA graphs, checkpointing and `torch.library.opcheck` know them.

Shape legend: B images of h x w pixels, n tokens, P points a token, C channels, O points after mixing, G width of the hidden vector,
J = C * C + O * P parameters a token, H x W the map.

Notable: triton is imported when an operator first runs. Inputs are contiguous and of the dtypes that `dispatch` sees to: points float32,
the map float32 or bfloat16, all else of one dtype of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LOOK = (
    "(Tensor feature_map, Tensor points, Tensor hidden, Tensor weight, Tensor bias, Tensor? m_beta, Tensor? s_beta, int out_points, "
    "bool border, bool save) -> (Tensor, Tensor, Tensor)"
)
_MIXING_BACKWARD = (
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor? m_beta, Tensor? s_beta, Tensor sampled, Tensor mixed, bool "
    "parameters) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_SAMPLING_BACKWARD = (
    "(Tensor grad_sampled, Tensor feature_map, Tensor points, bool border, bool of_map, bool of_points) -> (Tensor, Tensor)"
)


@torch.library.custom_op("sparse_vlm::look", mutates_args=(), schema=_LOOK)
def look(
    feature_map: Tensor,
    points: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    border: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One look.

    Args:
        feature_map: (B, H, W, C).
        points: (B, n, P, 2) relative to the image.
        hidden: (B, n, G), of which weight (J, G) and bias (J,) make the channel matrix (C, C) and the point matrix (O, P) of each token.
        m_beta, s_beta: (C,) and (O,); both or none. With them there is a GELU between the two products.
        out_points: O.
        border: what lies outside the map: its border, or zeros.
        save: whether to return what the backward pass needs.

    Returns:
        (B, n, O * C); what was sampled and what channel mixing made of it, each (B, n, P, C), or empty.
    """
    from sparse_vlm.kernels.triton import launch

    return launch.forward(feature_map, points, hidden, weight, bias, m_beta, s_beta, out_points, border, save)


@look.register_fake
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, count, _ = points.shape
    channels = feature_map.shape[-1]
    kept = (batch, tokens, count, channels) if save else (0,)
    return hidden.new_empty(batch, tokens, out_points * channels), hidden.new_empty(kept), hidden.new_empty(kept)


@torch.library.custom_op("sparse_vlm::mixing_backward", mutates_args=(), schema=_MIXING_BACKWARD)
def mixing_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    sampled: Tensor,
    mixed: Tensor,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of mixing.

    Args:
        grad: (B, n, O * C), of the result of `look`; sampled and mixed are its other results.
        parameters: whether to make those of weight, bias and betas, which are empty otherwise.

    Returns:
        Gradients of what was sampled, hidden, weight, bias, m_beta and s_beta.
    """
    from sparse_vlm.kernels.triton import launch

    return launch.mixing_backward(grad, hidden, weight, bias, m_beta, s_beta, sampled, mixed, parameters)


@mixing_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    sampled: Tensor,
    mixed: Tensor,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_parameters = [
        torch.empty_like(each) if parameters and each is not None else hidden.new_empty(0) for each in (weight, bias, m_beta, s_beta)
    ]
    return torch.empty_like(sampled), torch.empty_like(hidden), *of_parameters


@torch.library.custom_op("sparse_vlm::sampling_backward", mutates_args=(), schema=_SAMPLING_BACKWARD)
def sampling_backward(
    grad_sampled: Tensor, feature_map: Tensor, points: Tensor, border: bool, of_map: bool, of_points: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the feature map and of the points, each empty where it is not asked for; equal to the last bit on each run."""
    from sparse_vlm.kernels.triton import launch

    return launch.sampling_backward(grad_sampled, feature_map, points, border, of_map, of_points)


@sampling_backward.register_fake
def _(grad_sampled: Tensor, feature_map: Tensor, points: Tensor, border: bool, of_map: bool, of_points: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(feature_map) if of_map else feature_map.new_empty(0),
        torch.empty_like(points) if of_points else points.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    feature_map, points, hidden, weight, bias, m_beta, s_beta, _, ctx.border, _ = inputs
    _, sampled, mixed = output
    ctx.mark_non_differentiable(sampled, mixed)
    ctx.save_for_backward(feature_map, points, hidden, weight, bias, m_beta, s_beta, sampled, mixed)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    feature_map, points, hidden, weight, bias, m_beta, s_beta, sampled, mixed = ctx.saved_tensors
    of_map, of_points = ctx.needs_input_grad[:2]
    parameters = any(ctx.needs_input_grad[3:7])
    grad_sampled, grad_hidden, *grads = torch.ops.sparse_vlm.mixing_backward(
        grad.contiguous(), hidden, weight, bias, m_beta, s_beta, sampled, mixed, parameters
    )
    grad_map = grad_points = None
    if of_map or of_points:
        grad_map, grad_points = torch.ops.sparse_vlm.sampling_backward(grad_sampled, feature_map, points, ctx.border, of_map, of_points)
    made = [grad_map, grad_points, grad_hidden, *grads]
    return *(each if needed else None for each, needed in zip(made, ctx.needs_input_grad[:7], strict=True)), None, None, None


look.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "sparse_vlm::sample", mutates_args=(), schema="(Tensor feature_map, Tensor points, bool border, ScalarType dtype) -> Tensor"
)
def sample(feature_map: Tensor, points: Tensor, border: bool, dtype: torch.dtype) -> Tensor:
    """A map (B, H, W, C) at points (B, n, P, 2) to (B, n, P, C) of a dtype."""
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
    wanted = ctx.needs_input_grad[:2]
    made = torch.ops.sparse_vlm.sampling_backward(grad.contiguous(), feature_map, points, ctx.border, *wanted)
    return *(each if needed else None for each, needed in zip(made, wanted, strict=True)), None, None


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
    """By torch: a library has these gradients; those of pixels nobody asks for."""
    pixels, weight = ctx.saved_tensors
    made = torch.ops.aten.convolution_backward(
        grad.permute(0, 3, 1, 2), pixels, weight, [weight.shape[0]], [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [False, True, True]
    )
    return None, *(each if needed else None for each, needed in zip(made[1:], ctx.needs_input_grad[1:], strict=True))


early_convolution.register_autograd(_convolution_backward, setup_context=_convolution_context)
