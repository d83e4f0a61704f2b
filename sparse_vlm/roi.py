"""Geometry of regions of interest (RoIs): grids, sampling points, crops, and averages over RoIs.

Shape legend: B batch, N latent tokens, P sampling points a token, C channels, H x W a feature map.
RoIs are (x0, y0, x1, y1) and points are (x, y), both relative to the image: (0, 0) is its top-left corner, (1, 1) its bottom-right
one. Both may leave [0, 1]; the padding of the sampler decides what lies outside.

Notable: coordinates are float32 in a tower of any dtype; bfloat16 resolves one pixel in 256.
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

    49 gives 7 x 7 cells; a number that is not a square gives rows of unequal length (48: 6 rows of 7 and one of 6), so no two RoIs are
    equal.

    Args:
        aspect: width of the image by its height; 18 tokens on an image twice as wide as high are 3 rows of 6.

    Returns:
        (N, 4) float32, on the CPU whatever the default device, so that a tower can be built on the meta device.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; a tower needs at least one token")
    rows = min(num_tokens, max(1, round(math.sqrt(num_tokens / aspect))))
    boxes = []
    for row in range(rows):
        columns = (num_tokens * (row + 1)) // rows - (num_tokens * row) // rows
        boxes += [(c / columns, row / rows, (c + 1) / columns, (row + 1) / rows) for c in range(columns)]
    return torch.tensor(boxes, dtype=torch.float32, device="cpu")


def grid_rois_for(num_tokens: int, aspects: Tensor) -> Tensor:
    """`grid_rois` of several images of different aspects, without control flow that depends on values.

    Args:
        aspects: (B,) width by height.

    Returns:
        (B, N, 4) float32, on the device of `aspects`.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; a tower needs at least one token")
    rows = (num_tokens / aspects.float()).sqrt().round().clamp(1, num_tokens).long().unsqueeze(-1)  # (B, 1)
    token = torch.arange(num_tokens, device=aspects.device)
    row = ((token + 1) * rows - 1) // num_tokens  # (B, N): row i holds the tokens from N * i // rows on
    first = (num_tokens * row) // rows
    columns = (num_tokens * (row + 1)) // rows - first
    column = token - first
    return torch.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], dim=-1)


def released_rois(num_tokens: int) -> Tensor:
    """Initial RoIs of the published models: a floor(sqrt(N)) grid of half-size boxes over the image; the rest are the whole image.

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
    """Sample a feature map at points bilinearly, with half-pixel centres.

    Args:
        feature_map: (B, C, H, W).
        points: (B, N, P, 2) relative to the image.
        padding: what lies outside: the border value, or zeros.

    Returns:
        (B, N, P, C) in the dtype of `feature_map`.
    """
    values = F.grid_sample(feature_map.float(), points.float() * 2 - 1, mode="bilinear", padding_mode=padding, align_corners=False)
    return values.permute(0, 2, 3, 1).to(feature_map.dtype)


def points_on_canvas(points: Tensor, extent: Tensor, height: int, width: int, padding: Padding = "border") -> Tensor:
    """Convert points relative to images to points relative to their canvases.

    Args:
        points: (B, N, P, 2), relative to the image.
        extent: (B, 2), the share of the canvas's width and height that each image fills, at its top left.
        height, width: of the map that is sampled at the points.
        padding: with `border`, points outside of an image are moved to its last cells, as `sample_bilinear` does for the canvas.
    """
    extent = extent[:, None, None]
    points = points * extent
    return points if padding == "zeros" else torch.minimum(points, extent - 0.5 / extent.new_tensor([width, height]))


def image_pyramid(image: Tensor, levels: int, sides: Tensor | None = None) -> Tensor:
    """A mip map: an image and its halves, quarters and so on in one tensor, so that one call can sample any of them.

    Level 0 lies at the top left; level k >= 1 begins at column W and at row `pyramid_row(H, k)`. Each is the mean of 2 x 2 pixels of
    the level before.

    Args:
        image: (B, C, H, W).
        levels: number of halvings; 0 returns the image.
        sides: (B, 2), width and height in pixels of each image at the top left of its canvas; pixels beyond are ignored.

    Returns:
        (B, C, H, W + ceil(W / 2)) in the dtype of `image`, or `image` itself.
    """
    if sides is not None:
        image = _copy_last(_copy_last(image, -1, sides[:, 0]), -2, sides[:, 1])  # rounding may read one pixel beyond the last
    if levels == 0:
        return image
    height, width = image.shape[-2:]
    column, level, used = [], image, 0
    for _ in range(levels):
        level = F.avg_pool2d(level, 2, ceil_mode=True, count_include_pad=False)
        if sides is not None:
            # the mean of a last column and its copy is that column, as on a canvas that ends there
            sides = (sides + 1) // 2
            level = _copy_last(_copy_last(level, -1, sides[:, 0]), -2, sides[:, 1])
        column.append(F.pad(level, (0, -(-width // 2) - level.shape[-1], 0, 0)))
        used += level.shape[-2]
    # H / 2 + H / 4 + ... is less than H, except for rounding up in small images
    beside = torch.cat(column, dim=-2)
    tall = max(height, used)
    return torch.cat([F.pad(image, (0, 0, 0, tall - height)), F.pad(beside, (0, 0, 0, tall - used))], dim=-1)


def _copy_last(image: Tensor, dim: int, sides: Tensor) -> Tensor:
    """Copy the last column (`dim` -1) or row (-2) of each image onto the one beyond, where its canvas has one; `sides` are (B,)."""
    shape = list(image.shape)
    shape[dim] = 1
    last = (sides - 1).view(-1, 1, 1, 1).expand(shape)
    beyond = sides.clamp_max(image.shape[dim] - 1).view(-1, 1, 1, 1).expand(shape)
    return image.scatter(dim, beyond, image.gather(dim, last))


def crop_level(height: float, width: float, size: int) -> int:
    """The pyramid level from which `crop_rois` reads a RoI of height x width pixels."""
    return max(0, math.floor(math.log2(height * width) / 2 - math.log2(size) + 0.5))


def crop_rois(image: Tensor, rois: Tensor, size: int, extent: Tensor | None = None) -> Tensor:
    """Scale each RoI to `size` x `size` pixels.

    Each RoI is read from the pyramid level at which it is nearest to `size` pixels a side (0.7 to 1.4 times as many), with one bilinear
    sample a pixel, so the cost does not depend on the sizes of image and RoIs. A RoI on pixel borders of `size` pixels a side is
    copied exactly. Differentiable in the RoIs. Compare mip maps (Williams, 1983).

    Args:
        image: (B, C, H, W).
        rois: (B, N, 4) relative to the image.
        extent: (B, 2) float32, the share of the canvas's width and height that each image fills, at its top left; all by default.
            Pixels beyond are not read.

    Returns:
        (B, N, C, size, size) in the dtype of `image`.
    """
    height, width = image.shape[-2:]
    levels = crop_level(height, width, size)  # of the whole image; a larger RoI reads the last level
    # in pixels of level 0, (x, y)
    whole = rois.new_tensor([width, height], dtype=torch.float32).expand(image.shape[0], 2)
    if extent is not None:
        whole = (whole * extent).round()
    atlas = image_pyramid(image, levels, None if extent is None else whole.long())
    whole = whole[:, None]  # (B, 1, 2)
    low, high = rois[..., :2].float() * whole, rois[..., 2:].float() * whole
    sides = (high - low).detach().abs().clamp_min(1e-3)
    # geometric mean: an elongated RoI is read a little too finely along one side and too coarsely along the other
    level = (sides.log2().mean(-1, keepdim=True) - math.log2(size) + 0.5).floor().clamp(0, levels)  # (B, N, 1)
    shrunk = torch.exp2(-level)
    steps = (torch.arange(size, device=rois.device, dtype=torch.float32) + 0.5) / size
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).view(1, 1, -1, 2)
    points = (low.unsqueeze(-2) + (high - low).unsqueeze(-2) * offsets) * shrunk.unsqueeze(-2)  # (B, N, size^2, 2)
    points = torch.minimum(points.clamp_min(0.5), (whole * shrunk - 0.5).clamp_min(0.5).unsqueeze(-2))
    # position of the level in the atlas
    starts = torch.tensor([0.0, *(pyramid_row(height, k) for k in range(1, levels + 1))], device=rois.device)
    corner = torch.stack([(level[..., 0] > 0) * float(width), starts[level[..., 0].long()]], dim=-1)  # (B, N, 2)
    points = (points + corner.unsqueeze(-2)) / rois.new_tensor([atlas.shape[-1], atlas.shape[-2]], dtype=torch.float32)
    return sample_bilinear(atlas, points).mT.unflatten(-1, (size, size))


def pyramid_row(height: int, level: int) -> int:
    """The row at which level >= 1 of a pyramid begins."""
    row = 0
    for _ in range(level - 1):
        height = -(-height // 2)
        row += height
    return row


def span_weights(low: Tensor, high: Tensor, cells: int, parts: int, samples: int) -> Tensor:
    """Weights that average a row of cells over equal parts of a span, as linear interpolation at evenly spaced samples would.

    Args:
        low, high: (...), ends of the span relative to the row.
        samples: in each part.

    Returns:
        (..., parts, cells) float32, each row summing to 1 (border padding).
    """
    steps = (torch.arange(parts * samples, device=low.device, dtype=torch.float32) + 0.5) / (parts * samples)
    at = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
    at = (at * cells - 0.5).clamp(0, cells - 1)
    index = torch.arange(cells, device=low.device, dtype=torch.float32)
    return (1 - (at.unsqueeze(-1) - index).abs()).clamp_min(0).unflatten(-2, (parts, samples)).mean(-2)


def crop_boxes(images: Tensor, boxes: Tensor, size: int, samples: int) -> Tensor:
    """Crop one box of each image to `size` x `size` pixels by two matrix products.

    A regular grid in an axis-parallel box is separable into rows and columns. This is more arithmetic than bilinear sampling, but all of
    it in matrix products, and the samples are not stored.

    Args:
        images: (B, 3, H, W) float32.
        boxes: (B, 4) relative to the image.
        samples: a side, of which each pixel of the result is the mean.

    Returns:
        (B, 3, size, size).
    """
    left, top, right, bottom = boxes.float().unbind(-1)
    across = span_weights(left, right, images.shape[-1], size, samples)
    down = span_weights(top, bottom, images.shape[-2], size, samples)
    return down.unsqueeze(1) @ images @ across.mT.unsqueeze(1)


def roi_average_weights(rois: Tensor, height: int, width: int, points_per_side: int = 4) -> Tensor:
    """Weights that average an H x W map over each RoI, as bilinear sampling on a regular grid of points in it would.

    The weights of a regular grid in an axis-parallel box are separable: an outer product of two one-dimensional averages. Pooling a map
    is one matrix product: `weights @ map.flatten(2).mT`. Differentiable in the RoIs.

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


def sizes_on(canvases: Tensor, fit: str = "whole") -> Tensor | None:
    """Recover image sizes from canvases: up to the last row and column that are not all zero. For hosts that pass pixels alone.

    No normalised pixel is zero where a channel's mean times 255 is not an integer, as for CLIP's and ImageNet's means and for 0.5. A
    canvas of zeros counts as full.

    Args:
        canvases: (B, 3, H, W), normalised.
        fit: of the tower; with `crop`, images fill their input.

    Returns:
        (B, 2) int64, height and width; None with `crop`.
    """
    if fit == "crop":
        return None
    some = (canvases != 0).any(1)  # (B, H, W)
    sides = []
    for across, side in ((2, some.shape[1]), (1, some.shape[2])):
        place = torch.arange(1, side + 1, device=some.device)
        last = (some.any(across) * place).amax(1)
        sides.append(torch.where(last == 0, side, last))
    return torch.stack(sides, dim=1)


def image_extent(image_sizes: Tensor, pixels: Tensor) -> Tensor:
    """The share of its canvas's width and height that each image fills, (B, 2) float32.

    Args:
        image_sizes: (B, 2), height and width in pixels of each image at the top left of its canvas.
        pixels: (B, 3, h, w), the canvases.

    Raises:
        ValueError: sizes of another shape, or an image larger than its canvas.
    """
    sizes = torch.as_tensor(image_sizes, device=pixels.device)
    canvas = torch.tensor(pixels.shape[-2:], device=pixels.device)
    if sizes.shape != (pixels.shape[0], 2):
        raise ValueError(f"image_sizes are {tuple(sizes.shape)}, expected ({pixels.shape[0]}, 2): height and width of each image")
    if not torch.compiler.is_compiling() and not bool(((sizes >= 1) & (sizes <= canvas)).all()):
        raise ValueError(f"image_sizes {sizes.tolist()}: expected 1 to {pixels.shape[-2]} rows and 1 to {pixels.shape[-1]} columns")
    return (sizes.float() / canvas).flip(-1)


def image_aspects(pixels: Tensor, extent: Tensor | None) -> Tensor:
    """Width by height of each image, (B,) float32; arguments as in `crop_rois`."""
    height, width = pixels.shape[-2:]
    if extent is None:
        return torch.full((pixels.shape[0],), width / height, device=pixels.device)
    sides = (extent * extent.new_tensor([width, height])).round()  # whole pixels, so that rounding does not depend on the canvas
    return sides[:, 0] / sides[:, 1]


def image_mask(extent: Tensor, pixels: Tensor) -> Tensor:
    """1 inside each image and 0 beyond it on its canvas, (B, 1, h, w)."""
    height, width = pixels.shape[-2:]
    across, down = ((torch.arange(side, device=pixels.device) + 0.5) / side < extent[:, i, None] for i, side in enumerate((width, height)))
    return (down[:, None, :, None] & across[:, None, None, :]).to(pixels.dtype)
