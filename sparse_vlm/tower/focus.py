"""Content-dependent initial RoIs: small cells where the image has detail, large ones elsewhere, at the same number of tokens.

A small convolutional network predicts from a thumbnail the variance of the teacher's patch features around each place, at three scales.
A coarse grid of cells is then split into quarters where the predicted variance is highest, until the number of tokens is reached; an
image of even variance gets the regular grid. The network is trained on the teacher's features while the tower is bootstrapped
(`variation` is its target), so it needs no labels.

Shape legend: B batch, n cells (latent tokens), b cells of the coarse grid, k splits, S scales, M x M the predicted map,
G x G the teacher's patches, d their width. Cells are (x0, y0, x1, y1) relative to the image, or to the encoded region.

Notable: shapes and control flow do not depend on values, so it batches, compiles and exports: the k splits are the k highest scores,
because a quarter never scores above its parent.
Source: quadtrees by feature saliency as in Quadformer (arXiv 2304.00287); a selector that is taught by the teacher's
features as in LookWhere (arXiv 2505.18051). Measured: docs/looking.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.roi import crop_rois, grid_rois_for
from sparse_vlm.tower.config import FOCUS_MAP as MAP
from sparse_vlm.tower.config import FOCUS_SCALES as SCALES
from sparse_vlm.tower.config import FocusConfig

MIDDLE = 1  # the scale at which evenness is measured
ELONGATED = 2.0  # sides of a cell, one by the other, in pixels: up to it cells have the image's own aspect, so that their grid is regular
MIN_VARIANCE = 1e-4  # lower bound of a window's variance, relative to the mean variance


class Focus(nn.Module):
    """The network that predicts variance, and the placement of cells."""

    def __init__(self, config: FocusConfig) -> None:
        super().__init__()
        self.config = config
        first, second, third, width = config.channels
        self.stem = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1) for i, o in ((3, first), (first, second), (second, third)))
        self.norm = nn.GroupNorm(1, third)
        self.body = nn.ModuleList([nn.Conv2d(third, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.context = nn.Linear(width, width)
        self.coarse = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, len(SCALES), 1)

    def forward(self, pixels: Tensor, region: Tensor | None = None, extent: Tensor | None = None) -> Tensor:
        """Predict the log variance of the teacher's features, relative to that over all images.

        Args:
            pixels: (B, 3, h, w), normalised.
            region: (B, 4), the part of the image to encode; all of it by default.
            extent: (B, 2), as in `crop_rois`.

        Returns:
            (B, S, M, M) float32; channel s is of windows of side `SCALES[s]`.
        """
        whole = pixels.new_tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float32).expand(pixels.shape[0], 1, 4)
        box = whole if region is None else region.float().unsqueeze(1)
        x = crop_rois(pixels, box, self.config.size, extent)[:, 0].to(self.head.weight.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.stem:
            x = F.gelu(conv(x))
        x = self.norm(F.adaptive_avg_pool2d(x, MAP))
        for conv in self.body:
            x = F.gelu(conv(x))
        x = x + self.context(x.mean((2, 3)))[:, :, None, None]
        x = x + F.gelu(self.coarse(x))
        return self.head(x).float()

    def place(self, maps: Tensor, aspects: Tensor, num_tokens: int) -> Tensor:
        """Place the cells of each image.

        Args:
            maps: (B, S, M, M), the output of `forward`.
            aspects: (B,), width by height of the encoded region.

        Returns:
            (B, n, 4) float32, cells that tile the region; in the order of the coarse grid, quarters in Z order.
        """
        grid = plain_grid(num_tokens, aspects)
        count = coarse_cells(num_tokens)
        splits = (num_tokens - count) // 3
        if splits == 0:
            return grid
        base = plain_grid(count, aspects).unsqueeze(2)  # (B, b, 1, 4)
        quarters = _quarters(base)  # (B, b, 4, 4)
        sixteenths = _quarters(quarters)  # (B, b, 16, 4)
        score = _gain(maps, base)  # (B, b, 1)
        # quarters score strictly below their parent and rise with their variance, so that there are no ties
        of_quarters = _gain(maps, quarters)  # (B, b, 4)
        of_quarters = torch.minimum(of_quarters, score * (1 - 1e-3 * score / of_quarters.clamp_min(1e-30)))
        scores = torch.cat([score, of_quarters], dim=-1)  # (B, b, 5)
        chosen = torch.zeros_like(scores).flatten(1)
        chosen = chosen.scatter(1, scores.flatten(1).topk(splits).indices, 1.0).view_as(scores)
        split, split_again = chosen[..., :1], chosen[..., 1:]
        # all candidate cells in order: a coarse cell, then each of its quarters followed by its sixteenths
        cells = torch.cat([quarters.unsqueeze(3), sixteenths.unflatten(2, (4, 4))], dim=3).flatten(2, 3)  # (B, b, 20, 4)
        cells = torch.cat([base, cells], dim=2).flatten(1, 2)  # (B, 21 b, 4)
        kept = torch.cat([(split - split_again).unsqueeze(-1), split_again.unsqueeze(-1).expand(-1, -1, -1, 4)], dim=-1).flatten(2)
        kept = torch.cat([1 - split, kept], dim=-1).flatten(1)  # (B, 21 b)
        order = torch.arange(kept.shape[1], device=kept.device, dtype=torch.float32)
        index = (kept * 2 * kept.shape[1] - order).topk(num_tokens).indices
        tree = cells.gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        even = maps[:, MIDDLE].flatten(1).std(1) < self.config.evenness  # (B,)
        return torch.where(even[:, None, None], grid, tree)


def plain_grid(num_tokens: int, aspects: Tensor) -> Tensor:
    """The grid of a tower with a focus, (B, n, 4): cells are elongated rather than rows uneven, because the teacher sees a square.

    Cells that have the image's own aspect are nearer to the teacher than square ones in rows of unequal length (docs/looking.md).
    """
    return grid_rois_for(num_tokens, aspects / aspects.clamp(1 / ELONGATED, ELONGATED))


def coarse_cells(num_tokens: int) -> int:
    """Cells of the grid that is split: about a third of the tokens, so that each split, which adds three, makes their number.

    A number of full rows is taken where one is within a factor of 2 of a third: rows of unequal length cost 0.010 of cosine at 25 tokens
    (docs/looking.md).
    """
    third = num_tokens / 3
    full_rows = [rows * columns for rows in range(1, math.isqrt(num_tokens) + 1) for columns in (rows, rows + 1)]
    fitting = [cells for cells in full_rows if (num_tokens - cells) % 3 == 0 and third / 2 < cells < 2 * third]
    return min(fitting, key=lambda cells: abs(math.log(cells / third)), default=num_tokens - 3 * round(2 * num_tokens / 9))


def area_bias(cells: Tensor, strength: float) -> Tensor:
    """The bias of attention scores for each key, so that many small cells do not outweigh a large one.

    Args:
        cells: (B, n, 4).
        strength: 0 weights cells equally, 1 by their area.

    Returns:
        (B, n) float32: strength * log(area / mean area).
    """
    area = (cells[..., 2:] - cells[..., :2]).prod(-1)
    return strength * (area / area.mean(-1, keepdim=True)).log()


@torch.no_grad()
def variation(patches: Tensor, scale: Tensor) -> Tensor:
    """The target of `Focus.forward`: the log variance of a teacher's features in windows of each scale around each place of the map.

    Args:
        patches: (B, G * G, d), the teacher's patch features.
        scale: (), their mean variance over all images.

    Returns:
        (B, S, M, M) float32.
    """
    grid = math.isqrt(patches.shape[1])
    features = patches.float().unflatten(1, (grid, grid)).permute(0, 3, 1, 2)  # (B, d, G, G)
    square = features.square().sum(1, keepdim=True)
    maps = []
    for side in SCALES:
        window = max(2, round(side * grid))
        mean, of_square = (_window_mean(x, window) for x in (features, square))
        maps.append(of_square - mean.square().sum(1, keepdim=True))
    return (torch.cat(maps, dim=1) / scale).clamp_min(MIN_VARIANCE).log()


def _window_mean(x: Tensor, window: int) -> Tensor:
    """(B, C, G, G) to means over windows of `window` cells a side around each place of the map, (B, C, M, M); windows stay inside."""
    x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    x = F.avg_pool2d(x, min(max(1, window // 2), x.shape[-1]), stride=1)
    return F.interpolate(x, size=(MAP, MAP), mode="bilinear", align_corners=True)


def _quarters(cells: Tensor) -> Tensor:
    """(B, b, m, 4) to (B, b, 4 m, 4), each cell's quarters in reading order."""
    low, high = cells[..., :2], cells[..., 2:]
    half = (high - low) / 2
    corners = torch.stack([half.new_zeros(half.shape), half * half.new_tensor([1, 0]), half * half.new_tensor([0, 1]), half], dim=-2)
    low = low.unsqueeze(-2) + corners  # (B, b, m, 4, 2)
    return torch.cat([low, low + half.unsqueeze(-2)], dim=-1).flatten(2, 3)


def _log_variance(maps: Tensor, cells: Tensor) -> Tensor:
    """Predicted log variance within each cell, (B, ...), interpolated from the maps at its centre and size."""
    shape = cells.shape[:-1]
    cells = cells.flatten(1, -2)  # (B, m, 4)
    centres = (cells[..., :2] + cells[..., 2:]) / 2
    at = F.grid_sample(maps, centres.unsqueeze(1) * 2 - 1, mode="bilinear", padding_mode="border", align_corners=False)[
        :, :, 0
    ]  # (B, S, m)
    area = (cells[..., 2:] - cells[..., :2]).prod(-1).clamp_min(1e-9)
    step = (-area.log2() / 2 - 1).clamp(0, 3)  # scales finer than the first; extrapolated beyond the last
    low = step.floor().clamp(0, len(SCALES) - 2)
    fine, coarse = (at.gather(1, (low + i).long().unsqueeze(1))[:, 0] for i in (1, 0))
    return torch.lerp(coarse, fine, step - low).view(shape)


def _gain(maps: Tensor, cells: Tensor) -> Tensor:
    """Gain of splitting each cell: the variance within it times its area."""
    return _log_variance(maps, cells).exp() * (cells[..., 2:] - cells[..., :2]).prod(-1)
