"""Small-object augmentation: a view is scaled down and pasted on a plain background; its target is the teacher's output for the full view.

A teacher resolves little of a small object, while a tower with a focus can spend as many cells on it as on a large one. So the target is
the output for the view alone, as if the teacher had zoomed in. It exists already: the augmentation costs no teacher pass.

Shape legend: B views, H x W a canvas, N cells, d width, G x G the teacher's patch grid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_vlm.roi import grid_rois, roi_average_weights

LONGER_SIDE = (36, 176)  # of a shrunk view, in pixels
BLURRED = 14  # pixels a side that another view is reduced to before it is a background, so that no object is recognizable


def shrink(pixels: Tensor, image_sizes: Tensor, share: float, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Shrink a share of a batch's views, on canvases of `side` pixels: a colour gradient, with noise on some and a blurred view in others.

    Args:
        pixels: (B, 3, H, W) uint8.
        image_sizes: (B, 2), height and width of each view.
        generator: on the CPU, for all random choices.

    Returns:
        The batch, on canvases of at least `side` pixels; image sizes (B, 2); and the box (B, 4) of each view, relative to its image.
    """
    count, _, height, width = pixels.shape
    shown = F.pad(pixels, (0, max(0, side - width), 0, max(0, side - height)))
    sizes, boxes = image_sizes.clone(), torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1)
    chance = torch.rand(count, 10, generator=generator)
    ramp = torch.linspace(-1, 1, side, device=pixels.device)
    for i in (chance[:, 0] < share).nonzero().flatten().tolist():
        longer, x, y, blend, noise, grade_x, grade_y, noisy, blended = chance[i, 1:].tolist()
        colour = torch.rand(3, generator=generator) * 215 + 20
        h, w = image_sizes[i].tolist()
        low, high = LONGER_SIDE
        scale = min(side, low * (high / low) ** longer) / max(h, w)
        small = max(1, round(h * scale)), max(1, round(w * scale))
        view = F.interpolate(pixels[i : i + 1, :, :h, :w].float(), size=small, mode="bilinear", antialias=True)[0]
        back = colour.to(pixels.device).view(3, 1, 1) + 100 * (
            (grade_y - 0.5) * ramp.view(1, -1, 1) + (grade_x - 0.5) * ramp.view(1, 1, -1)
        )
        if blended < 0.3:
            other = (i + 1) % count
            rows, columns = image_sizes[other].tolist()
            coarse = F.interpolate(
                pixels[other : other + 1, :, :rows, :columns].float(), size=(BLURRED, BLURRED), mode="bilinear", antialias=True
            )
            back = torch.lerp(back, F.interpolate(coarse, size=(side, side), mode="bicubic")[0], 0.3 + 0.7 * blend)
        if noisy < 0.3:
            back = back + 12 * noise * torch.randn(back.shape, generator=generator).to(back.device)
        top, left = round(y * (side - small[0])), round(x * (side - small[1]))
        back = back.clone()
        back[:, top : top + small[0], left : left + small[1]] = view
        shown[i] = 0
        shown[i, :, :side, :side] = back.clamp(0, 255).round().to(torch.uint8)
        sizes[i] = side
        boxes[i] = torch.tensor([left, top, left + small[1], top + small[0]]) / side
    return shown, sizes, boxes.to(pixels.device)


def clip_to_boxes(cells: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Clip cells (B, N, 4) to each view's box (B, 4): cells relative to the box, and the share of their area that is left (B, N)."""
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    moved = torch.cat([(cells[..., :2] - corner) / size, (cells[..., 2:] - corner) / size], dim=-1)
    part = moved.clamp(0, 1)
    areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (part, moved)]
    return part, areas[0] / areas[1]


def place_patches(patches: Tensor, boxes: Tensor, background: Tensor) -> Tensor:
    """The teacher's patches (B, G * G, d) of views, resampled as if each view were in its box (B, 4) on a background (d,)."""
    grid = math.isqrt(patches.shape[1])
    part, inside = clip_to_boxes(grid_rois(grid * grid).to(boxes.device).expand(len(boxes), -1, -1), boxes)
    averages = (roi_average_weights(part, grid, grid) @ patches).to(patches.dtype)  # under autocast a product is in bfloat16
    return torch.lerp(background.expand_as(patches), averages, inside.unsqueeze(-1))
