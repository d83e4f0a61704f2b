"""Which way a look, and the early convolution, is computed: by torch alone, or by the Triton kernels where these are faster.

On an H100 they are where nothing learns, in about half the time (docs/kernels.md). With gradients a whole look by them is mostly slower
than torch alone, compiled, and takes half of the memory; sampling by itself takes an eighth of the time for many points. Few images in
an uncompiled tower wait for Python, and torch alone makes fewer calls.

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
VARIABLE = "SPARSE_VLM_KERNELS"
_DTYPES = (torch.float32, torch.bfloat16)
MANY = 64  # images from which on an uncompiled tower waits for the GPU
MANY_POINTS = 200_000  # from which on sampling with its gradients does
_path: Path = "plain" if os.environ.get(VARIABLE) == "plain" else "auto"


@contextmanager
def using(path: Path) -> Iterator[None]:
    """Compute the looks inside so.

    Args:
        path: `auto`, as it is unless told otherwise: the kernels on an NVIDIA GPU that has bfloat16 (compute capability 8.0), where triton
            is installed, shapes and dtypes are theirs, nothing learns, and the tower is compiled, captured or given at least 64 images;
            where something learns, sampling alone, of at least 200,000 points; `plain`, torch alone, also chosen for a whole process by
            SPARSE_VLM_KERNELS=plain in the environment; `kernels`, these or an error, also where something learns, and on CPU tensors
            through Triton's interpreter (TRITON_INTERPRET=1 in the environment before triton is imported).
    """
    global _path
    before, _path = _path, path
    try:
        yield
    finally:
        _path = before


def usable(feature_map: Tensor, points: Tensor, tokens: Tensor) -> bool:
    """Whether `look` is to compute a look.

    Args:
        feature_map: (B, C, H, W).
        points: (B, n, P, 2).
        tokens: (B, n, d); unless autocast chooses another, their dtype is that of mixing.

    Raises:
        RuntimeError: inside `using("kernels")` where it cannot; the message says why.
    """
    kind = tokens.device.type
    # shape[0] and not len() here and below: an export traces the count of images as unknown, and len() would fix it
    if not _wanted(kind, points.shape[0], (feature_map, points, tokens)):
        return False  # first, because the meta device has no autocast to ask for
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    obstacle = _unfit(feature_map, points, dtype) or _absent(kind, tokens.device.index or 0)
    if obstacle is not None and _path == "kernels":
        raise RuntimeError(f"the kernels cannot compute this look: {obstacle}")
    return obstacle is None


def compiled(dtype: torch.dtype, channels: int) -> bool:
    """Whether a tower that is optimized for inference on a CPU is to look by compiled functions (`sparse_vlm.kernels.cpu.native`).

    Args:
        dtype: of the tower.
        channels: C.
    """
    from sparse_vlm.kernels.cpu import native

    return _path == "auto" and native.usable(dtype, channels)


def multiplies(weight: Tensor) -> bool:
    """Whether a linear layer of few rows, whose weight (outer, inner) this is, is to be `sparse_vlm.kernels.cpu.native.Linear`."""
    from sparse_vlm.kernels.cpu import native

    return _path == "auto" and weight.shape[1] % 2 == 0 and native.multiplies(weight.dtype)


def look(
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
    """Sample a map, and mix what was sampled with parameters that each token generates: over channels, then over points. By the kernels.

    Args:
        feature_map: (B, C, H, W); read as it is where it lies channels last.
        points: (B, n, P, 2) relative to the image.
        hidden: (B, n, g). Its dtype, which autocast may have chosen, is that of mixing.
        weight, bias: (C * C + O * P, g) and (C * C + O * P,), the generator's last layer: a channel matrix (C, C) and a point matrix
            (O, P) of each token.
        m_beta, s_beta: (C,) and (O,), or None both. With them there is a GELU after channel mixing as well.
        out_points: O.
        padding: what lies outside the map.

    Returns:
        (B, n, O * C) in the dtype of `hidden`, after the last GELU.

    Raises:
        RuntimeError: shapes, dtypes or the machine are not theirs; `usable` tells before.
    """
    obstacle = _unfit(feature_map, points, hidden.dtype) or _absent(hidden.device.type, hidden.device.index or 0)
    if obstacle is not None:
        raise RuntimeError(f"the kernels cannot compute this look: {obstacle}")
    dtype = hidden.dtype
    given = feature_map.permute(0, 2, 3, 1), points.float(), hidden, weight.to(dtype), bias.to(dtype)
    betas = [None if beta is None else beta.to(dtype) for beta in (m_beta, s_beta)]
    save = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (*given, *betas))
    out, _, _ = torch.ops.sparse_vlm.look(*(each.contiguous() for each in given), *betas, out_points, padding == "border", save)
    return out


def sample(feature_map: Tensor, points: Tensor, padding: Padding, dtype: torch.dtype) -> Tensor | None:
    """A map at points, bilinearly, by a kernel whose gradients are equal to the last bit on each run; None where torch is to compute it.

    It is for where something learns: elsewhere `look` samples as well.

    Args:
        feature_map: (B, C, H, W); read as it is where it lies channels last.
        points: (B, n, P, 2) relative to the image.
        dtype: of the result, unless autocast chooses another.

    Returns:
        (B, n, P, C).
    """
    kind = points.device.type
    if _path == "plain" or (_path == "auto" and not _pays(kind, points, _learns((feature_map, points)))):
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    if _unfit(feature_map, points, dtype) or _absent(kind, points.device.index or 0):
        return None
    given = feature_map.permute(0, 2, 3, 1).contiguous(), points.float().contiguous()
    return torch.ops.sparse_vlm.sample(*given, padding == "border", dtype)


def convolve(pixels: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """The early convolution (7 x 7, stride 2, padding 3) by its kernel, or None where torch is to compute it.

    It is for bfloat16, because in float32 libraries multiply in TF32 and are as fast, and for pixels that need no gradient.

    Args:
        pixels: (B, 3, h, w).
        weight, bias: (C, 3, 7, 7) and (C,), of at most 128 channels.

    Returns:
        (B, C, ceil(h / 2), ceil(w / 2)), channels last in memory.
    """
    kind, given = pixels.device.type, (pixels, weight, bias)
    many = _path == "auto" and kind == "cuda" and pixels.shape[0] >= MANY  # also where something learns
    if not (many or _wanted(kind, pixels.shape[0], given)) or pixels.requires_grad:
        return None
    if torch.is_autocast_enabled(kind):
        pixels, weight, bias = (each.to(torch.get_autocast_dtype(kind)) for each in given)
    if any(each.dtype != torch.bfloat16 for each in (pixels, weight)) or weight.shape[0] > MAX_CHANNELS:
        return None
    if _absent(kind, pixels.device.index or 0) is not None:
        return None
    return torch.ops.sparse_vlm.early_convolution(pixels.contiguous(), weight.contiguous(), bias).permute(0, 3, 1, 2)


def _pays(kind: str, points: Tensor, learns: bool) -> bool:
    """Whether sampling alone by a kernel is faster."""
    return kind == "cuda" and learns and math.prod(points.shape[:3]) >= MANY_POINTS


def _learns(given: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(each.requires_grad for each in given)


def _wanted(kind: str, pictures: int, given: tuple[Tensor, ...]) -> bool:
    """Whether the kernels are to compute something of these tensors, if they can."""
    if _path != "auto":
        return _path == "kernels"
    if kind != "cuda" or _learns(given):
        return False
    return pictures >= MANY or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _unfit(feature_map: Tensor, points: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute a look of these tensors, or None."""
    if dtype not in _DTYPES or feature_map.dtype not in _DTYPES:
        return f"they take a map and tokens of float32 or bfloat16, not {feature_map.dtype} and {dtype}"
    if not 1 <= points.shape[2] <= MAX_POINTS or not points.numel():
        return f"they take 1 to {MAX_POINTS} points of at least one token, not points {tuple(points.shape)}"
    return None


def _absent(kind: str, index: int) -> str | None:
    """What the kernels lack on a device, or None, and then the operators are registered."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if kind == "cuda":
        if torch.version.hip is not None or torch.cuda.get_device_capability(index) < (8, 0):
            return "they take an NVIDIA GPU of compute capability 8.0 or above"
    elif kind != "cpu":
        return f"they do not run on {kind}"
    else:
        from sparse_vlm.kernels.triton.launch import INTERPRETED

        if not INTERPRETED:
            return "on a CPU they need TRITON_INTERPRET=1 in the environment before triton is imported"
    import sparse_vlm.kernels.triton.ops  # noqa: F401

    return None


# what torch.compiler.assume_constant_result sets; that would import all of torch's compiler, and triton, with every tower
_absent._dynamo_marked_constant = True  # type: ignore[attr-defined]
