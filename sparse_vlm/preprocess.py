"""The one way in for pictures: a PIL image becomes the normalised pixels a tower (or its teacher) was trained on.

Shape legend: B batch, S side of the square input in pixels.
Matches open_clip's and torchvision's evaluation transform: shortest side to S with antialiased bicubic interpolation, centre crop,
then (x / 255 - mean) / std.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Triple = tuple[float, float, float]


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size` pixels, then the centre square."""
    width, height = image.size
    short = min(width, height)
    new = (max(size, int(size * width / short)), max(size, int(size * height / short)))
    if new != image.size:
        image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"), copy=True)).permute(2, 0, 1).contiguous()


def normalize(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    """(..., 3, H, W) uint8 to normalised float32."""
    shape = (3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(shape) * 255
    shift = torch.tensor(mean, device=pixels.device).view(shape) * 255
    return (pixels.float() - shift) / scale


def preprocess(images: Image.Image | Sequence[Image.Image], size: int, mean: Triple, std: Triple) -> Tensor:
    """Pictures of any size to (B, 3, S, S) normalised float32."""
    if isinstance(images, Image.Image):
        images = [images]
    return normalize(torch.stack([to_uint8(resize_and_crop(image, size)) for image in images]), mean, std)
