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

from sparse_vlm.photos import Draft, Photo, PhotoError, upright_rgb

Triple = tuple[float, float, float]
LONGEST = 8  # sides of the square that a picture is long at most where it is scaled before it is cropped
OVERSAMPLING = 2  # pixels of a draft for one of the result, at least; fewer show in the embeddings


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shortest side to `size` pixels, then the centre square."""
    return _square(Draft(image, image.size, (0, 0, *image.size)), size)


def resize(draft: Draft, size: int) -> Image.Image:
    """Shortest side to `size` pixels, with the proportions that the picture has in full."""
    new = scaled(draft.size, size)
    return draft.image if new == draft.image.size else draft.image.resize(new, Image.Resampling.BICUBIC, box=draft.box)


def scaled(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) of a picture whose shortest side is brought to `short` pixels."""
    return tuple(max(short, int(short * side / min(size))) for side in size)


def _square(draft: Draft, size: int) -> Image.Image:
    """Shortest side to `size` pixels, then the centre square; a strip loses its ends before, as enlarged whole it could fill any memory."""
    width, height = scaled(draft.size, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) <= LONGEST * size:
        return resize(draft, size).crop((left, top, left + size, top + size))
    x, y, right, bottom = draft.box
    across, down = (right - x) / width, (bottom - y) / height  # pixels of the draft for one of the result
    box = (x + left * across, y + top * down, min(right, x + (left + size) * across), min(bottom, y + (top + size) * down))
    return draft.image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def load_crop(photo: Photo, size: int) -> Image.Image:
    """What a tower of `size` pixels sees of a photo, decoded no larger than that needs: `resize_and_crop` of a file.

    Raises:
        PhotoError: the photo cannot be read.
    """
    return _square(photo.draft(OVERSAMPLING * size), size)


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
    """PIL pictures of any size and mode to (B, 3, S, S) normalised float32, of a file's picture the same as of the file.

    Raises:
        PhotoError: one that cannot be shown (`photos.upright_rgb`).
    """
    if isinstance(images, Image.Image):
        images = [images]
    shown = (upright_rgb(image, f"picture {number}") for number, image in enumerate(images))
    return normalize(torch.stack([to_uint8(resize_and_crop(image, size)) for image in shown]), mean, std)
