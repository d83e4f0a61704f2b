"""The one way in for pictures: a PIL image, or a picture's file, becomes the normalised pixels a tower (or its teacher) was trained on.

Shape legend: B batch, S side of the square input in pixels.
Matches open_clip's and torchvision's evaluation transform: shortest side to S with antialiased bicubic interpolation, centre crop,
then (x / 255 - mean) / std.

Notable: of a large JPEG only as many pixels are decoded as resizing needs, `OVERSAMPLING` times the side at least; docs/pictures.md has
what that saves and how near its embeddings come to those of the whole picture. A smaller picture, or one of another format, gives the very
same pixels either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.photos import Draft, Photo, PhotoError

Triple = tuple[float, float, float]
OVERSAMPLING = 2  # pixels of a draft for one of the result, at least; fewer show in the embeddings


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size` pixels, then the centre square."""
    return _centre(resize(Draft(image, image.size, (0, 0, *image.size)), size), size)


def resize(draft: Draft, size: int) -> Image.Image:
    """Shortest side to `size` pixels, with the proportions that the picture has in full."""
    width, height = draft.size
    short = min(width, height)
    new = (max(size, int(size * width / short)), max(size, int(size * height / short)))
    return draft.image if new == draft.image.size else draft.image.resize(new, Image.Resampling.BICUBIC, box=draft.box)


def _centre(image: Image.Image, size: int) -> Image.Image:
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def load_crop(photo: Photo, size: int) -> Image.Image:
    """What a tower of `size` pixels sees of a photo, decoded no larger than that needs: `resize_and_crop` of a file.

    Raises:
        PhotoError: the photo cannot be read.
    """
    return _centre(resize(photo.draft(OVERSAMPLING * size), size), size)


def load_crops(
    photos: Sequence[Photo], size: int, threads: int | None = None, on_bad: Callable[[int, PhotoError], None] | None = None
) -> list[Image.Image | None]:
    """`load_crop` of several photos, by a few threads at once, in order.

    Args:
        threads: as many as torch computes with unless given.
        on_bad: called with the place of each photo that cannot be read, and why, in order; None stands in its place then.

    Raises:
        PhotoError: the first photo that cannot be read, where there is no `on_bad`.
    """

    def load(photo: Photo) -> Image.Image | PhotoError:
        try:
            return load_crop(photo, size)
        except PhotoError as error:
            return error

    threads = min(threads or torch.get_num_threads(), len(photos))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(load, photos))
    else:
        found = list(map(load, photos))
    for place, one in enumerate(found):
        if isinstance(one, PhotoError):
            if on_bad is None:
                raise one
            on_bad(place, one)
    return [None if isinstance(one, PhotoError) else one for one in found]


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
