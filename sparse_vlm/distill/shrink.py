"""Views that are shown small: a view scaled down and put somewhere on a plain background, taught with what the teacher says of it in full.

A teacher sees little of a small thing; a tower with a focus has as many cells for it as for a large one. So the target is the teacher's
answer to the view alone, as if the teacher looked closer, and it is there already: nothing more is asked of the teacher.

Shape legend: B views, H x W a canvas, N cells, d width, G x G the teacher's patches.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_vlm.roi import grid_rois, roi_average_weights

LONGER_SIDE = (36, 176)  # of a view that is shown small, in pixels
BLURRED = 14  # pixels a side to which another view is scaled before it is a background: no thing can be told in it


def shrink(pixels: Tensor, image_sizes: Tensor, share: float, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Show a share of a batch's views small, on canvases of `side` pixels: plain and graded, some with noise, some a blurred other view.

    Args:
        pixels: (B, 3, H, W) uint8.
        image_sizes: (B, 2), height and width of each view.
        generator: on the CPU; decides all that is random.

    Returns:
        The batch, on canvases of at least `side` pixels; its sizes; and the box (B, 4) in which each view lies, relative to its image.
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
    """Cells (B, N, 4) relative to each view's box (B, 4): the part of each that lies in it, (B, N, 4), and how much that is, (B, N)."""
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    moved = torch.cat([(cells[..., :2] - corner) / size, (cells[..., 2:] - corner) / size], dim=-1)
    part = moved.clamp(0, 1)
    areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (part, moved)]
    return part, areas[0] / areas[1]


def place_patches(patches: Tensor, boxes: Tensor, background: Tensor) -> Tensor:
    """The teacher's patches (B, G * G, d) as they would lie if each view stood in its box (B, 4) before a background (d,)."""
    grid = math.isqrt(patches.shape[1])
    part, inside = clip_to_boxes(grid_rois(grid * grid).to(boxes.device).expand(len(boxes), -1, -1), boxes)
    averages = (roi_average_weights(part, grid, grid) @ patches).to(patches.dtype)  # under autocast a product is bfloat16
    return torch.lerp(background.expand_as(patches), averages, inside.unsqueeze(-1))
