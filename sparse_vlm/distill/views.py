"""Augmented views of photos that are reproducible: the same (seed, photo, number) gives the same pixels.

Shape legend: B views, S side of the square view in pixels.
View 0 is the evaluation transform; the others are random crops, flipped half of the time. Teacher and student get the same crop of a photo,
so that the teacher's outputs can be cached. A student of whole images gets it at its own aspect ratio, the teacher scaled to a square.
A view in a set is identified by its row: `view * P + photo`, with P photos.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.images.decode import Box
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import resize_and_crop, to_uint8
from sparse_vlm.tower.config import Fit
from sparse_vlm.utils.devices import world_size

CROP_AREA = (0.4, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
READ_AT_ONCE = 256  # photos whose bytes are hashed at a time


def choose_crop(width: int, height: int, key: str, view: int, seed: int) -> tuple[Box, bool]:
    """The crop of view `view` >= 1 of the photo `key`: (left, top, right, bottom) in its pixels, and whether it is flipped."""
    rng = np.random.default_rng([seed, view, zlib.crc32(key.encode())])
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        aspect = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        crop_w, crop_h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_w <= width and crop_h <= height:
            break
    else:
        crop_w = crop_h = min(width, height)
    left, top = rng.uniform(0, width - crop_w), rng.uniform(0, height - crop_h)
    return (left, top, left + crop_w, top + crop_h), rng.random() < 0.5


def make_view(image: Image.Image, size: int, key: str, view: int, seed: int, fit: Fit = "crop") -> Image.Image:
    """View `view` of the photo `key`, S x S.

    Args:
        image: the decoded photo, RGB.
        key: part of the seed, so that views do not depend on the order of the photos.
        fit: whether view 0 is the centre square or the whole photo.
    """
    if view == 0 and fit == "crop":
        return resize_and_crop(image, size)
    return _crop(image, key, view, seed, (size, size))


def make_whole_view(image: Image.Image, longest: int, key: str, view: int, seed: int) -> Image.Image:
    """The crop of `make_view` with fit `whole`, at its own aspect ratio and resolution, its longer side at most `longest` pixels."""
    left, top, right, bottom = (0, 0, *image.size) if view == 0 else choose_crop(*image.size, key, view, seed)[0]
    scale = min(1.0, longest / max(right - left, bottom - top))
    return _crop(image, key, view, seed, (max(1, round(scale * (right - left))), max(1, round(scale * (bottom - top)))))


def _crop(image: Image.Image, key: str, view: int, seed: int, size: tuple[int, int]) -> Image.Image:
    """A view of a photo at a size (width, height)."""
    box, flipped = ((0, 0, *image.size), False) if view == 0 else choose_crop(*image.size, key, view, seed)
    out = image.resize(size, Image.Resampling.BICUBIC, box=box)
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else out


def mix(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Mix a share of a batch's views, each with the view before it (mixup, arXiv 1710.09412).

    The teacher encodes mixed images as any others, so no labels have to be mixed (compare arXiv 2106.05237, section 3).

    Args:
        pixels: (B, 3, S, S) uint8.
        generator: on the CPU; draws which views are mixed, and their weights, uniform in [0, 1].

    Returns:
        (B, 3, S, S) uint8.
    """
    count = len(pixels)
    chosen, weights = torch.rand(2, count, generator=generator)
    weights = torch.where(chosen < share, weights, 1.0).to(pixels.device).view(-1, 1, 1, 1)
    values = pixels.float()
    return torch.lerp(values.roll(1, 0), values, weights).round_().to(torch.uint8)


class ViewSet:
    """Views of a photo set, by row.

    Args:
        photos: in a fixed order.
        views: number of views of each photo.
        size: side of the teacher's images in pixels.
        fit: whether view 0 is the centre square or the whole photo.

    Attributes:
        unreadable: index and reason of photos that could not be read so far.
    """

    def __init__(self, photos: Sequence[Photo], views: int, size: int, seed: int = 0, fit: Fit = "crop") -> None:
        self.photos, self.views, self.size, self.seed, self.fit = photos, views, size, seed, fit
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.photos) * self.views

    def pixels(self, row: int) -> Tensor:
        """The teacher's input for a row, (3, S, S) uint8.

        Raises:
            ImageError: the photo cannot be read.
        """
        return self._square(row, self.size, self._photo(row).load())

    def for_student(self, row: int, size: int) -> Tensor:
        """The student's input for a row, uint8: (3, h, w) with its longer side at most `size` pixels, or a square of that size.

        Raises:
            ImageError: the photo cannot be read.
        """
        return self._as_student(row, size, self._photo(row).load())

    def for_both(self, row: int, size: int) -> dict[str, Tensor]:
        """`pixels`, the student's input, and `teacher_pixels` if the teacher's is different; the photo is decoded once.

        Raises:
            ImageError: the photo cannot be read.
        """
        image = self._photo(row).load()
        batch = {"pixels": self._as_student(row, size, image)}
        return batch if (self.fit, size) == ("crop", self.size) else batch | {"teacher_pixels": self._square(row, self.size, image)}

    def _photo(self, row: int) -> Photo:
        return self.photos[row % len(self.photos)]

    def _square(self, row: int, size: int, image: Image.Image) -> Tensor:
        return to_uint8(make_view(image, size, self._photo(row).key, row // len(self.photos), self.seed, self.fit))

    def _as_student(self, row: int, size: int, image: Image.Image) -> Tensor:
        if self.fit == "crop":
            return self._square(row, size, image)
        return to_uint8(make_whole_view(image, size, self._photo(row).key, row // len(self.photos), self.seed))

    def describe(self) -> dict[str, Any]:
        """What identifies these views, for run settings and caches."""
        crop = [*CROP_AREA, *CROP_ASPECT]
        identity = {"photos": len(self.photos), "contents": self._contents, "seed": self.seed, "crop": crop, "size": self.size}
        return identity if self.fit == "crop" else identity | {"fit": self.fit}

    @functools.cached_property
    def _contents(self) -> str:
        """Digest of the photos' names and bytes, in order.

        All bytes are read once: modification times are not reliable, since copies may keep or lose them.
        """
        digest = hashlib.sha256()
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world_size())) as pool:
            for start in range(0, len(self.photos), READ_AT_ONCE):
                some = self.photos[start : start + READ_AT_ONCE]
                for photo, found in zip(some, pool.map(_digest, some), strict=True):
                    digest.update(f"{photo.key}\0".encode(errors="surrogateescape") + found)
        return digest.hexdigest()[:16]


def _digest(photo: Photo) -> bytes:
    """Digest of a photo's bytes, or of nothing if they cannot be read (training then leaves the photo out)."""
    try:
        return hashlib.sha256(photo.read()).digest()
    except (OSError, ValueError):
        return hashlib.sha256().digest()
