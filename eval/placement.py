"""Controls for towers with a focus: the same weights on a grid, on random cells, or on cells placed by the teacher's features.

Shape legend: B batch, S scales and M x M places of a map, n cells.

Notable: each control replaces the tower's focus, so that whatever the tower does with cells (regions, aspects, area bias) stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.roi import crop_rois
from sparse_vlm.teachers import Teacher
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.config import FocusConfig
from sparse_vlm.tower.focus import MAP, SCALES, Focus, plain_grid, variation

PLACEMENTS = ("grid", "random", "teacher")  # keys of `TOWER_CONTROLS`


class UniformGrid(nn.Module):
    """The grid that an image of an even map gets."""

    def forward(self, pixels: Tensor, region: Tensor | None = None, extent: Tensor | None = None) -> None:
        """A grid needs no map."""

    def place(self, maps: None, aspects: Tensor, num_tokens: int) -> Tensor:
        """(B, n, 4)."""
        return plain_grid(num_tokens, aspects)


class RandomFocus(Focus):
    """Cells of the same sizes, split at random: the same noise for the i-th image of every batch."""

    def forward(self, pixels: Tensor, region: Tensor | None = None, extent: Tensor | None = None) -> Tensor:
        """Noise, (B, S, M, M), too uneven for the plain grid."""
        noise = torch.randn(pixels.shape[0], len(SCALES), MAP, MAP, generator=torch.Generator().manual_seed(0))
        return 3 * noise.to(pixels.device)


class TeacherFocus(Focus):
    """Cells where the teacher's own features vary: an upper bound for the predicted placement."""

    def __init__(self, config: FocusConfig, teacher: Teacher) -> None:
        super().__init__(config)
        self._teacher = (teacher,)  # no part of the tower

    def forward(self, pixels: Tensor, region: Tensor | None = None, extent: Tensor | None = None) -> Tensor:
        """The map that a focus learns to predict, (B, S, M, M)."""
        (teacher,) = self._teacher
        whole = pixels.new_tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float32).expand(pixels.shape[0], 4)
        box = whole if region is None else region.float()
        patches = teacher(crop_rois(pixels, box.unsqueeze(1), teacher.spec.image_size, extent)[:, 0]).patches.float()
        # a common factor of all variances changes no placement, so the scale need not be that of the training photos
        return variation(patches, (patches - patches.mean((0, 1))).square().sum(-1).mean())


def replace_focus(tower: SparseFormer, name: str, control: str, teacher: Teacher | None) -> None:
    """Replace how a tower places its cells, in place.

    Args:
        name: of the tower, for messages.
        control: one of `PLACEMENTS`.

    Raises:
        UserError: a tower without focus, or no teacher (or one of another normalisation) where its features are to place the cells.
    """
    config = tower.config
    if config.focus is None:
        raise UserError(f"{name} has no focus, so {control} is not a control of it; leave that control out")
    if control == "grid":
        tower.focus = UniformGrid()
    elif control == "random":
        tower.focus = RandomFocus(config.focus)
    else:
        if teacher is None:
            raise UserError("control teacher places cells by the teacher's features; name it with --teacher")
        if (teacher.spec.image_mean, teacher.spec.image_std) != (config.image_mean, config.image_std):
            raise UserError(f"{name} normalises images otherwise than {teacher.spec.name}, which cannot place its cells")
        tower.focus = TeacherFocus(config.focus, teacher)
