"""Preprocess images: PIL images or image files become the normalised pixels that a tower (or its teacher) was trained on.

Shape legend: B batch, S side of the input in pixels, H x W the canvas of a batch.
`crop` matches open_clip's and torchvision's evaluation transform: shortest side to S with antialiased bicubic interpolation, centre crop,
then (x / 255 - mean) / std. `whole` keeps the image at its own aspect ratio: longest side at most S, never enlarged, at the top left of a
zero canvas, with its size beside the pixels.

Notable: a large JPEG is decoded at reduced size, at least `OVERSAMPLING` times the side; lab/image-decoding.md: what that saves and
changes in the embeddings. Smaller images and other formats give identical pixels either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.images.decode import Draft, ImageError, upright_rgb
from sparse_vlm.images.photos import Photo

Triple = tuple[float, float, float]
Fit = Literal["crop", "whole"]
LONGEST = 8  # an image longer than this many sides of the square is cropped before it is scaled
OVERSAMPLING = 2  # least pixels of a draft for one of the result; fewer change the embeddings
CANVAS_STEP = 32  # canvas sides are multiples of it, so that few shapes occur
# Least zeros beyond an image (unless the canvas has its largest size), so that convolutions see the same border on every canvas.
CANVAS_MARGIN = 4


class Inputs(NamedTuple):
    """A batch of images as a tower takes it.

    Attributes:
        pixels: (B, 3, H, W), normalised float32.
        image_sizes: (B, 2) int64, height and width of each image on its canvas; None where every image fills the input.
    """

    pixels: Tensor
    image_sizes: Tensor | None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Inputs:
        """Move to a device, and convert the pixels to a dtype; None keeps what it is."""
        return Inputs(self.pixels.to(device, dtype), None if self.image_sizes is None else self.image_sizes.to(device))

    def repeat(self, count: int) -> Inputs:
        """A batch of `count` times the same image, without copying."""
        sizes = None if self.image_sizes is None else self.image_sizes.expand(count, -1)
        return Inputs(self.pixels.expand(count, -1, -1, -1), sizes)


@dataclass(frozen=True)
class Preprocessor:
    """The preprocessing of a model.

    Attributes:
        size: side of the crop, or of the largest canvas, in pixels (S).
        mean, std: of each channel, for values in [0, 1].
        fit: `crop` for the centre square, `whole` for the whole image.
    """

    size: int
    mean: Triple
    std: Triple
    fit: Fit = "crop"

    @classmethod
    def of(cls, config: Any, fit: Fit | None = None) -> Preprocessor:
        """The preprocessing of a model's configuration.

        Args:
            config: a `SparseFormerConfig`, or anything with `image_size`, `image_mean` and `image_std`, such as a `TeacherSpec`.
            fit: overrides the configuration's, for comparisons.
        """
        return cls(config.image_size, tuple(config.image_mean), tuple(config.image_std), fit or getattr(config, "fit", "crop"))

    def scale(self, image: Image.Image, name: str = "the image") -> Image.Image:
        """Crop and scale an image of any mode: to S x S, or to at most that. Idempotent.

        Args:
            name: for messages.

        Raises:
            ImageError: an image that cannot be converted (`images.decode.upright_rgb`).
        """
        shown = upright_rgb(image, name)
        return self.scale_draft(Draft(shown, shown.size, (0, 0, *shown.size)))

    def load(self, photo: Photo) -> Image.Image:
        """`scale` of a photo, decoded no larger than needed.

        Raises:
            ImageError: the photo cannot be read.
        """
        return self.scale_draft(photo.draft(*self.at_least))

    def load_all(
        self, photos: Sequence[Photo], threads: int | None = None, on_bad: Callable[[int, ImageError], None] | None = None
    ) -> list[Image.Image | None]:
        """`load` of several photos, in parallel threads, in order.

        Args:
            threads: torch's number by default.
            on_bad: called, in order, with the index of each photo that cannot be read and the error; None stands in its place.

        Raises:
            ImageError: the first photo that cannot be read, without `on_bad`.
        """

        def attempt(photo: Photo) -> Image.Image | ImageError:
            try:
                return self.load(photo)
            except ImageError as error:
                return error

        with ThreadPoolExecutor(max(1, min(threads or torch.get_num_threads(), len(photos)))) as pool:
            results = list(pool.map(attempt, photos))
        for index, result in enumerate(results):
            if isinstance(result, ImageError):
                if on_bad is None:
                    raise result
                on_bad(index, result)
        return [None if isinstance(result, ImageError) else result for result in results]

    def __call__(self, images: Image.Image | Photo | Sequence[Image.Image | Photo], square: bool = False) -> Inputs:
        """A batch of images of any sizes, or of photos.

        Args:
            square: put whole images on canvases of S x S, for hosts that take no other input; by default on the smallest that holds all.

        Raises:
            ImageError: the first photo that cannot be read, or image that cannot be converted.
        """
        images = [images] if isinstance(images, (Image.Image, Photo)) else list(images)
        loaded = iter(self.load_all([image for image in images if isinstance(image, Photo)]))
        scaled = (next(loaded) if isinstance(image, Photo) else self.scale(image, f"image {number}") for number, image in enumerate(images))
        return self.batch([self.pixels(image) for image in scaled], square)

    def pixels(self, scaled: Image.Image) -> Tensor:
        """The result of `scale` or `load`, normalised, (3, h, w)."""
        return normalize(to_uint8(scaled), self.mean, self.std)

    def batch(self, images: Sequence[Tensor], square: bool = False) -> Inputs:
        """A batch of results of `pixels`; `square` as in `__call__`."""
        return Inputs(torch.stack(list(images)), None) if self.fit == "crop" else lay_out(images, self.size, square)

    @property
    def at_least(self) -> tuple[int, bool]:
        """Arguments of `Photo.draft`: the pixels that a draft needs, and whether those of its longest side."""
        return OVERSAMPLING * self.size, self.fit == "whole"

    def scale_draft(self, draft: Draft) -> Image.Image:
        """`scale` of a photo's draft."""
        return _square(draft, self.size) if self.fit == "crop" else resize_whole(draft, self.size)


def lay_out(images: Sequence[Tensor], size: int, square: bool = False) -> Inputs:
    """Put images (3, h, w) of at most `size` pixels a side each at the top left of a zero canvas, of the same dtype.

    Args:
        square: canvases of `size` x `size`; by default the smallest multiples of `CANVAS_STEP` that hold all images and `CANVAS_MARGIN`.
    """
    sizes = torch.tensor([image.shape[1:] for image in images]).view(-1, 2)
    longest = [size, size] if square or not images else [_canvas_side(int(side), size) for side in sizes.amax(0)]
    pixels = torch.zeros(len(images), 3, *longest, dtype=images[0].dtype if images else torch.float32)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return Inputs(pixels, sizes)


def _canvas_side(longest: int, size: int) -> int:
    return min(size, -(-(longest + CANVAS_MARGIN) // CANVAS_STEP) * CANVAS_STEP)


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Scale the shortest side to `size` pixels, then crop the centre square."""
    return _square(Draft(image, image.size, (0, 0, *image.size)), size)


def resize(draft: Draft, size: int) -> Image.Image:
    """Scale the shortest side to `size` pixels, at the aspect ratio of the full image."""
    new = scaled(draft.size, size)
    return draft.image if new == draft.image.size else draft.image.resize(new, Image.Resampling.BICUBIC, box=draft.box)


def resize_whole(draft: Draft, size: int) -> Image.Image:
    """Scale the longest side to at most `size` pixels; a side keeps at least one pixel."""
    longest = max(draft.size)
    new = draft.size if longest <= size else tuple(max(1, round(size * side / longest)) for side in draft.size)
    return draft.image if new == draft.image.size else draft.image.resize(new, Image.Resampling.BICUBIC, box=draft.box)


def scaled(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) after scaling the shortest side to `short` pixels."""
    return tuple(max(short, int(short * side / min(size))) for side in size)


def _square(draft: Draft, size: int) -> Image.Image:
    """Scale, then crop the centre square; of a long strip crop first, since scaling all of it could exhaust memory."""
    width, height = scaled(draft.size, size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(width, height) <= LONGEST * size:
        return resize(draft, size).crop((left, top, left + size, top + size))
    x, y, right, bottom = draft.box
    across, down = (right - x) / width, (bottom - y) / height  # pixels of the draft for one of the result
    box = (x + left * across, y + top * down, min(right, x + (left + size) * across), min(bottom, y + (top + size) * down))
    return draft.image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def load_crop(photo: Photo, size: int) -> Image.Image:
    """`resize_and_crop` of a photo, decoded no larger than needed.

    Raises:
        ImageError: the photo cannot be read.
    """
    return _square(photo.draft(OVERSAMPLING * size), size)


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"), copy=True)).permute(2, 0, 1).contiguous()


def normalize(pixels: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Normalise (..., 3, H, W) uint8 to float32."""
    shape = (3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(shape) * 255
    shift = torch.tensor(mean, device=pixels.device).view(shape) * 255
    return (pixels.float() - shift) / scale


def preprocess(images: Image.Image | Sequence[Image.Image], size: int, mean: Triple, std: Triple) -> Tensor:
    """Centre squares of PIL images of any size and mode, (B, 3, S, S) normalised float32.

    Raises:
        ImageError: one that cannot be converted (`images.decode.upright_rgb`).
    """
    return Preprocessor(size, mean, std)(images).pixels
