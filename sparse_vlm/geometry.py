"""Geometry of regions of interest: where tokens stand, where they look, and what they read there.

Shape legend: B batch, N latent tokens, P sampling points a token, C channels, H x W a feature map.
RoIs are (x0, y0, x1, y1) and points are (x, y), both relative to the image: (0, 0) is its top-left corner, (1, 1) its bottom-right
one. Both may leave [0, 1]; what lies outside is decided by the padding of the sampler.

Notable: everything here is float32 whatever the tower runs in, because a coordinate in bfloat16 has a resolution of one pixel in 256.
Source: SparseFormer (arXiv 2304.03768) section 3, and the released checkpoints.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = Literal["border", "zeros"]


def grid_rois(num_tokens: int, aspect: float = 1.0) -> Tensor:
    """A grid of `num_tokens` distinct RoIs, near square in pixels, that tile the image without overlap.

    49 gives 7 x 7 cells; a number that is no square gives rows of unequal length (48: 6 rows of 7 and one of 6), so no two tokens
    start as twins.

    Args:
        aspect: width of the image by its height; 18 tokens on an image twice as wide as high are 3 rows of 6.

    Returns:
        (N, 4) float32, on the CPU also where tensors are made elsewhere by default, so that a tower can be built on the meta device.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; a tower needs at least one token")
    rows = min(num_tokens, max(1, round(math.sqrt(num_tokens / aspect))))
    boxes = []
    for row in range(rows):
        columns = (num_tokens * (row + 1)) // rows - (num_tokens * row) // rows
        boxes += [(c / columns, row / rows, (c + 1) / columns, (row + 1) / rows) for c in range(columns)]
    return torch.tensor(boxes, dtype=torch.float32, device="cpu")


def released_rois(num_tokens: int) -> Tensor:
    """Initial RoIs of the published models: a floor(sqrt(N)) grid of half-size boxes that covers the image; the rest see all of it.

    Returns:
        (N, 4) float32.
    """
    side = math.isqrt(num_tokens)
    corners = torch.linspace(0.0, 0.5, side, device="cpu")
    y, x = torch.meshgrid(corners, corners, indexing="ij")
    top_left = torch.stack([x, y], dim=-1).reshape(-1, 2)
    boxes = torch.cat([top_left, top_left + 0.5], dim=-1)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device="cpu").expand(num_tokens - side * side, 4)
    return torch.cat([boxes, whole])


def points_in_rois(rois: Tensor, offsets: Tensor) -> Tensor:
    """Sampling points: RoI centre + offset * RoI size.

    Args:
        rois: (B, N, 4).
        offsets: (B, N, P, 2), in units of the RoI's size, 0 at its centre.

    Returns:
        (B, N, P, 2) relative to the image.
    """
    centre = (rois[..., :2] + rois[..., 2:]) / 2
    size = rois[..., 2:] - rois[..., :2]
    return centre.unsqueeze(-2) + offsets * size.unsqueeze(-2)


def adjust_rois(rois: Tensor, delta: Tensor) -> Tensor:
    """Move and scale RoIs: centre += delta_xy * size; size *= exp(delta_wh) (SparseFormer, eq. 4).

    Args:
        rois: (B, N, 4).
        delta: (B, N, 4).
    """
    size = rois[..., 2:] - rois[..., :2]
    centre = (rois[..., :2] + rois[..., 2:]) / 2 + delta[..., :2] * size
    half = size * delta[..., 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def standardize_offsets(offsets: Tensor, eps: float = 1e-5) -> Tensor:
    """Spread the P points of each token to a standard deviation of a third of its RoI, around the RoI's centre.

    Args:
        offsets: (..., P, 2); needs P >= 2.
    """
    mean = offsets.mean(dim=-2, keepdim=True)
    std = offsets.std(dim=-2, keepdim=True)
    return (offsets - mean) / (3 * (std + eps))


def sample_bilinear(feature_map: Tensor, points: Tensor, padding: Padding = "border") -> Tensor:
    """Read a feature map at points, bilinearly, with half-pixel centres.

    Args:
        feature_map: (B, C, H, W).
        points: (B, N, P, 2) relative to the image.
        padding: what lies outside: the border value, or zeros.

    Returns:
        (B, N, P, C) in the dtype of `feature_map`.
    """
    values = F.grid_sample(feature_map.float(), points.float() * 2 - 1, mode="bilinear", padding_mode=padding, align_corners=False)
    return values.permute(0, 2, 3, 1).to(feature_map.dtype)


def crop_samples(rois: Tensor, height: int, width: int, size: int) -> int:
    """Samples a side that each pixel of a crop is the mean of, so that the largest of the RoIs skips nothing.

    Args:
        rois: (..., 4) relative to a picture of height x width pixels.
        size: pixels a side of a crop.
    """
    sides = (rois[..., 2:] - rois[..., :2]).detach().abs() * rois.new_tensor([width, height])
    return max(1, math.ceil(sides.max().item() / size - 1e-3))


def crop_rois(picture: Tensor, rois: Tensor, size: int, samples: int | None = None) -> Tensor:
    """Scale what lies in each RoI to `size` x `size` pixels.

    Where a RoI holds more pixels than that, each pixel of the result is the mean of several samples, so that detail is averaged and not
    skipped. A RoI that lies on pixel borders and is `size` pixels wide is returned as it is. Differentiable in the RoIs.

    Args:
        picture: (B, 3, H, W).
        rois: (B, N, 4) relative to the picture.
        samples: `crop_samples` of these RoIs, where it was counted before.

    Returns:
        (B, N, 3, size, size) in the dtype of `picture`.
    """
    samples = samples or crop_samples(rois, *picture.shape[-2:], size)
    steps = (torch.arange(size * samples, device=rois.device, dtype=torch.float32) + 0.5) / (size * samples) - 0.5
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).view(1, 1, -1, 2)
    values = sample_bilinear(picture, points_in_rois(rois.float(), offsets)).mT  # (B, N, 3, points)
    crops = values.unflatten(-1, (size, samples, size, samples))
    return crops.mean((-3, -1)) if samples > 1 else crops[..., :, 0, :, 0]


def span_weights(low: Tensor, high: Tensor, cells: int, parts: int, samples: int) -> Tensor:
    """Weights that average a row of cells over each of the equal parts of a span, as samples read between two cells each would.

    Args:
        low, high: (...), where the span begins and ends, relative to the row.
        samples: evenly in each part.

    Returns:
        (..., parts, cells) float32, each row summing to 1 (border padding).
    """
    steps = (torch.arange(parts * samples, device=low.device, dtype=torch.float32) + 0.5) / (parts * samples)
    at = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
    at = (at * cells - 0.5).clamp(0, cells - 1)
    index = torch.arange(cells, device=low.device, dtype=torch.float32)
    return (1 - (at.unsqueeze(-1) - index).abs()).clamp_min(0).unflatten(-2, (parts, samples)).mean(-2)


def crop_boxes(pictures: Tensor, boxes: Tensor, size: int, samples: int) -> Tensor:
    """What `crop_rois` makes of one box in each picture, as two matrix products.

    A regular grid in an axis-parallel box is read row by row and column by column. That is more arithmetic than reading four cells a
    sample, and all of it in products, with nothing as large as the samples in memory.

    Args:
        pictures: (B, 3, H, W) float32.
        boxes: (B, 4) relative to the picture.
        samples: a side, that each pixel of the result is the mean of.

    Returns:
        (B, 3, size, size).
    """
    left, top, right, bottom = boxes.float().unbind(-1)
    across = span_weights(left, right, pictures.shape[-1], size, samples)
    down = span_weights(top, bottom, pictures.shape[-2], size, samples)
    return down.unsqueeze(1) @ pictures @ across.mT.unsqueeze(1)


def roi_average_weights(rois: Tensor, height: int, width: int, points_per_side: int = 4) -> Tensor:
    """Weights that average an H x W map over each RoI, as bilinear sampling on a regular grid of points inside it would.

    A regular grid in an axis-parallel box makes bilinear weights separable, so the average over points is the outer product of two
    one-dimensional averages, and pooling a map is one matrix product: `weights @ map.flatten(2).mT`. Differentiable in the RoIs.

    Args:
        rois: (..., N, 4).

    Returns:
        (..., N, H * W) float32, each row summing to 1 (border padding).
    """
    left, top, right, bottom = rois.float().unbind(-1)
    across = span_weights(left, right, width, 1, points_per_side)
    down = span_weights(top, bottom, height, 1, points_per_side)
    return (down.mT * across).flatten(-2)


def encoding_frequencies(dim: int, device: torch.device | None = None) -> Tensor:
    """(dim / 4,) float32, from 1 to 128 in log space."""
    return torch.linspace(0, math.log(128), dim // 4, device=device, dtype=torch.float32).exp()


def encode_rois(rois: Tensor, dim: int) -> Tensor:
    """Sine/cosine encoding of the four RoI numbers times pi: dim / 4 frequencies from 1 to 128 in log space.

    For each number the sines of the even frequencies come first, then the cosines of the odd ones. No gradient flows through it, as
    in the released models.

    Args:
        rois: (B, N, 4).
        dim: width of the encoding, a multiple of 8.

    Returns:
        (B, N, dim) float32.
    """
    with torch.no_grad():
        frequencies = encoding_frequencies(dim, rois.device)
        phase = (rois.float() * math.pi).unsqueeze(-1) * frequencies
        return torch.cat([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1).flatten(-2)
