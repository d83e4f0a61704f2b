"""Compute teacher outputs: to fill a cache, or at every step of a run that never shows a view twice.

Shape legend: B views, N student tokens, G x G the teacher's patch grid, d width, E embedding, S side in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.images.preprocess import normalize
from sparse_vlm.roi import roi_average_weights
from sparse_vlm.teachers import Teacher
from sparse_vlm.utils.devices import native_dtype


class PatchLinear(nn.Module):
    """A convolution with stride equal to kernel size as one matrix product: a tenth of cuDNN's time on an H100.

    Args:
        convolution: without padding.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.side = convolution.weight, convolution.bias, convolution.kernel_size[0]

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, G * side, G * side) to (B, d, G, G)."""
        cells = pixels.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side)).permute(0, 2, 4, 1, 3, 5)  # (B, G, G, 3, side, side)
        return F.linear(cells.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def replace_patch_convolutions(model: nn.Module) -> None:
    """Replace each patch-embedding convolution of a model by a `PatchLinear`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and child.stride == child.kernel_size == child.kernel_size[::-1] and child.padding == (0, 0):
                setattr(parent, name, PatchLinear(child))


class LiveTeacher:
    """A copy of a teacher on a device, in its native dtype, whose outputs are as the loss takes them.

    Args:
        teacher: not changed.
        rois: (N, 4), cells over which patch tokens are averaged; None keeps all patches (N = G * G).
        device: that computes.
    """

    def __init__(self, teacher: Teacher, rois: Tensor | None, device: str | torch.device = "cpu") -> None:
        self.spec, self.device, self.dtype = teacher.spec, torch.device(device), native_dtype(device)
        self._teacher = teacher.cast(self.dtype).to(self.device)
        if self.device.type == "cuda":
            replace_patch_convolutions(self._teacher)
        grid = self.spec.grid
        self._weights = None if rois is None else roi_average_weights(rois, grid, grid).to(self.device)

    def compile(self) -> None:
        """Compile the copy."""
        self._teacher.compile()

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, E) and patch tokens (B, N, d) of views (B, 3, S, S) uint8 at the teacher's size; float32, on its device."""
        images = normalize(pixels.to(self.device), self.spec.image_mean, self.spec.image_std).to(self.dtype)
        out = self._teacher(images)
        patches = out.patches.float()
        return out.embeds.float(), patches if self._weights is None else self._weights @ patches
