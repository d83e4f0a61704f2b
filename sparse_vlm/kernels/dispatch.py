"""Choosing how sampling, mixing and the early convolution are computed: by torch, or by Triton kernels where these are faster.

Sampling and mixing as one kernel is for inference: it takes half of torch's time on an H100 (lab/kernels.md) and has no gradients. In
training, sampling alone takes an eighth of torch's time for many points, and mixing stays with torch. An uncompiled tower with few images
is limited by Python, and torch needs fewer calls.

Shape legend: B images, n tokens, P points a token, C channels, O points after mixing, g width of the hidden vector, d width of a token,
H x W the map.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from sparse_vlm.kernels.triton.tiles import MAX_CHANNELS, MAX_POINTS
from sparse_vlm.roi import Padding

Path = Literal["auto", "plain", "kernels"]
ENVIRONMENT_VARIABLE = "SPARSE_VLM_KERNELS"
MIN_IMAGES = 64  # from which the kernels are faster in an uncompiled tower
MIN_POINTS = 200_000  # from which sampling with gradients is faster
_DTYPES = (torch.float32, torch.bfloat16)
_path: Path = "plain" if os.environ.get(ENVIRONMENT_VARIABLE) == "plain" else "auto"


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Choose how towers compute inside the block.

    Args:
        path: `plain` for torch alone (SPARSE_VLM_KERNELS=plain in the environment does this for the whole process). `auto`, the default,
            for the kernels on NVIDIA GPUs of compute capability 8.0 or above with triton installed: in inference where the tower is
            compiled, captured or given at least 64 images; in training for the early convolution of at least 64 images and for
            sampling of at least 200,000 points. `kernels` for the kernels wherever they exist, or an error; on CPU tensors through
            Triton's interpreter (TRITON_INTERPRET=1 in the environment before triton is imported).
    """
    global _path
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def is_supported(feature_map: Tensor, points: Tensor, tokens: Tensor, requires_grad: bool = False) -> bool:
    """Whether a tower should call `sample_and_mix`.

    Args:
        feature_map: (B, C, H, W).
        points: (B, n, P, 2).
        tokens: (B, n, d); unless autocast chooses another, their dtype is that of mixing.
        requires_grad: whether a parameter of mixing needs a gradient.

    Raises:
        RuntimeError: not supported inside `using("kernels")`; the message gives the reason.
    """
    kind, tensors = tokens.device.type, (feature_map, points, tokens)
    # shape[0] and not len() here and below: an export traces the batch size as unknown, and len() would fix it
    if requires_grad or _need_grad(tensors) or not _is_chosen(kind, points.shape[0], tensors):
        return False  # first, because the meta device has no autocast to ask for
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    reason = _unsupported_input(feature_map, points, dtype) or _unsupported_device(kind, tokens.device.index or 0)
    if reason is not None and _path == "kernels":
        raise RuntimeError(f"the kernels cannot sample and mix: {reason}")
    return reason is None


def has_cpu_kernels(dtype: torch.dtype, channels: int) -> bool:
    """Whether a tower that is optimized for inference should use the C++ kernels (`sparse_vlm.kernels.cpu.native`).

    Args:
        dtype: of the tower.
        channels: C.
    """
    from sparse_vlm.kernels.cpu import native

    return _path == "auto" and native.is_supported(dtype, channels)


def has_cpu_linear(weight: Tensor) -> bool:
    """Whether a linear layer of this weight (outer, inner) should be a `sparse_vlm.kernels.cpu.native.Linear` for small batches."""
    from sparse_vlm.kernels.cpu import native

    return _path == "auto" and weight.shape[1] % 2 == 0 and native.linear_is_supported(weight.dtype)


def sample_and_mix(
    feature_map: Tensor,
    points: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    m_beta: Tensor | None,
    s_beta: Tensor | None,
    out_points: int,
    padding: Padding,
) -> Tensor:
    """Sample a map at points and mix the samples with generated parameters: over channels, then over points. Has no gradients.

    Args:
        feature_map: (B, C, H, W); not copied where it is channels last in memory.
        points: (B, n, P, 2) relative to the image.
        hidden: (B, n, g). Its dtype, which autocast may have chosen, is that of mixing.
        weight, bias: (C * C + O * P, g) and (C * C + O * P,), the generator's last layer: a channel matrix (C, C) and a point matrix
            (O, P) of each token.
        m_beta, s_beta: (C,) and (O,), or both None. With them there is a GELU after channel mixing as well.
        out_points: O.
        padding: what lies outside the map.

    Returns:
        (B, n, O * C) in the dtype of `hidden`, after the last GELU.

    Raises:
        RuntimeError: unsupported shapes, dtypes or device; `is_supported` checks before.
    """
    reason = _unsupported_input(feature_map, points, hidden.dtype) or _unsupported_device(hidden.device.type, hidden.device.index or 0)
    if reason is not None:
        raise RuntimeError(f"the kernels cannot sample and mix: {reason}")
    dtype = hidden.dtype
    inputs = feature_map.permute(0, 2, 3, 1), points.float(), hidden, weight.to(dtype), bias.to(dtype)
    betas = [None if beta is None else beta.to(dtype) for beta in (m_beta, s_beta)]
    return torch.ops.sparse_vlm.sample_and_mix(*(each.contiguous() for each in inputs), *betas, out_points, padding == "border")


def sample(feature_map: Tensor, points: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor | None:
    """Sample a map at points bilinearly, with deterministic gradients, for training; None where torch should do it.

    Args:
        feature_map: (B, C, H, W); not copied where it is channels last in memory.
        points: (B, n, P, 2) relative to the image.
        dtype: of the result, unless autocast chooses another.

    Returns:
        (B, n, P, C).
    """
    kind = points.device.type
    if _path == "plain" or (_path == "auto" and not _sampling_is_faster(kind, points, _need_grad((feature_map, points)))):
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    if _unsupported_input(feature_map, points, dtype) or _unsupported_device(kind, points.device.index or 0):
        return None
    inputs = feature_map.permute(0, 2, 3, 1).contiguous(), points.float().contiguous()
    return torch.ops.sparse_vlm.sample(*inputs, padding == "border", dtype)


def convolve(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """The early convolution (7 x 7, stride 2, padding 3), or None where torch should compute it.

    bfloat16 only: in float32 libraries multiply in TF32 and are as fast. The pixels get no gradient.

    Args:
        pixels: (B, 3, h, w).
        weight, bias: (C, 3, 7, 7) and (C,), of at most 128 channels.

    Returns:
        (B, C, ceil(h / 2), ceil(w / 2)), channels last in memory.
    """
    kind, tensors = pixels.device.type, (pixels, weight, bias)
    faster = _path == "auto" and kind == "cuda" and pixels.shape[0] >= MIN_IMAGES  # in training, too
    if not (faster or _is_chosen(kind, pixels.shape[0], tensors)) or pixels.requires_grad:
        return None
    if torch.is_autocast_enabled(kind):
        pixels, weight, bias = (each.to(torch.get_autocast_dtype(kind)) for each in tensors)
    if any(each.dtype != torch.bfloat16 for each in (pixels, weight)) or weight.shape[0] > MAX_CHANNELS:
        return None
    if _unsupported_device(kind, pixels.device.index or 0) is not None:
        return None
    return torch.ops.sparse_vlm.early_convolution(pixels.contiguous(), weight.contiguous(), bias).permute(0, 3, 1, 2)


def _sampling_is_faster(kind: str, points: Tensor, needs_grad: bool) -> bool:
    """Whether the sampling kernel is faster than torch."""
    return kind == "cuda" and needs_grad and math.prod(points.shape[:3]) >= MIN_POINTS


def _need_grad(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in tensors)


def _is_chosen(kind: str, images: int, tensors: tuple[Tensor, ...]) -> bool:
    """Whether `using` and the number of images ask for inference kernels."""
    if _path != "auto":
        return _path == "kernels"
    if kind != "cuda" or _need_grad(tensors):
        return False
    return images >= MIN_IMAGES or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _unsupported_input(feature_map: Tensor, points: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels do not support these tensors, or None."""
    if dtype not in _DTYPES or feature_map.dtype not in _DTYPES:
        return f"map and tokens must be float32 or bfloat16, not {feature_map.dtype} and {dtype}"
    if not 1 <= points.shape[2] <= MAX_POINTS or not points.numel():
        return f"the points must be 1 to {MAX_POINTS} of at least one token, not of shape {tuple(points.shape)}"
    return None


def _unsupported_device(kind: str, index: int) -> str | None:
    """Why the kernels do not run on a device; None where they do, and then the operators are registered."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
            return "they need an NVIDIA GPU of compute capability 8.0 or above"
    elif kind != "cpu":
        return f"they do not run on {kind}"
    else:
        from sparse_vlm.kernels.triton.launch import INTERPRETED

        if not INTERPRETED:
            return "on a CPU they need TRITON_INTERPRET=1 in the environment before triton is imported"
    import sparse_vlm.kernels.triton.ops  # noqa: F401

    return None


# what torch.compiler.assume_constant_result sets; that would import all of torch's compiler, and triton, with every tower
_unsupported_device._dynamo_marked_constant = True  # type: ignore[attr-defined]
