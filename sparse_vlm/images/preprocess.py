"""The one way in for images: a PIL image, or an image's file, becomes the normalised pixels that a tower (or its teacher) was trained on.

Shape legend: B batch, S side of the input in pixels, H x W the canvas of a batch.
`crop` matches open_clip's and torchvision's evaluation transform: shortest side to S with antialiased bicubic interpolation, centre crop,
then (x / 255 - mean) / std. `whole` keeps all of an image at its own aspect: longest side to S where it is longer, never enlarged, at the
top left of a canvas that is zero beyond it, with its size beside the pixels.

Notable: of a large JPEG only as many pixels are decoded as resizing needs, `OVERSAMPLING` times the side at least; docs/images.md has
what that saves and how near its embeddings come to those of the whole image. A smaller image, or one of another format, gives the very
same pixels either way.
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

from sparse_vlm.images.photos import Draft, Photo, PhotoError, upright_rgb

Triple = tuple[float, float, float]
Fit = Literal["crop", "whole"]
LONGEST = 8  # sides of the square that an image is long at most where it is scaled before it is cropped
OVERSAMPLING = 2  # pixels of a draft for one of the result, at least; fewer show in the embeddings
CANVAS_STEP = 32  # sides of a canvas are multiples of it, so that few shapes occur
# Zeros beyond an image, at least, on a canvas that could be larger: what a convolution makes of an image's border is then the same on all.
CANVAS_MARGIN = 4


class Inputs(NamedTuple):
    """What a tower is given of images.

    Attributes:
        pixels: (B, 3, H, W), normalised float32.
        image_sizes: (B, 2) int64, height and width of each image on its canvas; None where every image fills the input.
    """

    pixels: Tensor
    image_sizes: Tensor | None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Inputs:
        """On another device, the pixels in another dtype; as they are for None."""
        return Inputs(self.pixels.to(device, dtype), None if self.image_sizes is None else self.image_sizes.to(device))

    def repeat(self, count: int) -> Inputs:
        """One image so many times; not copied."""
        sizes = None if self.image_sizes is None else self.image_sizes.expand(count, -1)
        return Inputs(self.pixels.expand(count, -1, -1, -1), sizes)


@dataclass(frozen=True)
class Preprocessor:
    """How images become the input of one model.

    Attributes:
        size: side of the square that they are cropped to, or of the largest canvas, in pixels (S).
        mean, std: of each channel, for values in 0..1.
        fit: `crop` for the centre square, `whole` for all of an image.
    """

    size: int
    mean: Triple
    std: Triple
    fit: Fit = "crop"

    @classmethod
    def of(cls, config: Any, fit: Fit | None = None) -> Preprocessor:
        """The preprocessing that a model was trained with.

        Args:
            config: a `SparseFormerConfig`, or anything with `image_size`, `image_mean` and `image_std`, such as a `TeacherSpec`.
            fit: another than its own, for comparisons.
        """
        return cls(config.image_size, tuple(config.image_mean), tuple(config.image_std), fit or getattr(config, "fit", "crop"))

    def scale(self, image: Image.Image, name: str = "the picture") -> Image.Image:
        """What the model sees of an image of any mode, before it is normalised: S x S, or at most that. Scaling it again changes nothing.

        Args:
            name: for messages.

        Raises:
            PhotoError: an image that cannot be shown (`images.photos.upright_rgb`).
        """
        shown = upright_rgb(image, name)
        return self.scale_draft(Draft(shown, shown.size, (0, 0, *shown.size)))

    def load(self, photo: Photo) -> Image.Image:
        """`scale` of a photo's file, decoded no larger than that needs.

        Raises:
            PhotoError: the photo cannot be read.
        """
        return self.scale_draft(photo.draft(*self.at_least))

    def load_all(
        self, photos: Sequence[Photo], threads: int | None = None, on_bad: Callable[[int, PhotoError], None] | None = None
    ) -> list[Image.Image | None]:
        """`load` of several photos, by a few threads at once, in order; the arguments are `load_crops`'.

        Raises:
            PhotoError: the first photo that cannot be read, where there is no `on_bad`.
        """
        return _load_all(self.load, photos, threads, on_bad)

    def __call__(self, images: Image.Image | Photo | Sequence[Image.Image | Photo], square: bool = False) -> Inputs:
        """Images of any sizes, or their files, to one batch.

        Args:
            square: lay whole images on canvases of S x S, for hosts that know no other input; else on the smallest that holds all.

        Raises:
            PhotoError: the first file that cannot be read, or image that cannot be shown.
        """
        images = [images] if isinstance(images, (Image.Image, Photo)) else list(images)
        loaded = iter(self.load_all([image for image in images if isinstance(image, Photo)]))
        scaled = (next(loaded) if isinstance(image, Photo) else self.scale(image, f"image {number}") for number, image in enumerate(images))
        return self.batch([self.pixels(image) for image in scaled], square)

    def pixels(self, scaled: Image.Image) -> Tensor:
        """(3, h, w), normalised, of what `scale` or `load` returned."""
        return normalize(to_uint8(scaled), self.mean, self.std)

    def batch(self, images: Sequence[Tensor], square: bool = False) -> Inputs:
        """Images of `pixels` to one batch; `square` as above."""
        return Inputs(torch.stack(list(images)), None) if self.fit == "crop" else lay_out(images, self.size, square)

    @property
    def at_least(self) -> tuple[int, bool]:
        """Pixels that a draft needs, and whether its longest side is meant: what `Photo.draft` takes."""
        return OVERSAMPLING * self.size, self.fit == "whole"

    def scale_draft(self, draft: Draft) -> Image.Image:
        """`scale` of a photo's draft."""
        return _square(draft, self.size) if self.fit == "crop" else resize_whole(draft, self.size)


def lay_out(images: Sequence[Tensor], size: int, square: bool = False) -> Inputs:
    """Images (3, h, w) of at most `size` pixels a side, each at the top left of a canvas of their dtype that is zero beyond it.

    Args:
        square: canvases of `size` x `size`; else the smallest multiples of `CANVAS_STEP` that hold all, with `CANVAS_MARGIN`.
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
    """Shortest side to `size` pixels, then the centre square."""
    return _square(Draft(image, image.size, (0, 0, *image.size)), size)


def resize(draft: Draft, size: int) -> Image.Image:
    """Shortest side to `size` pixels, with the proportions that the image has in full."""
    new = scaled(draft.size, size)
    return draft.image if new == draft.image.size else draft.image.resize(new, Image.Resampling.BICUBIC, box=draft.box)


def resize_whole(draft: Draft, size: int) -> Image.Image:
    """Longest side to `size` pixels where it has more; a side keeps one pixel at least."""
    longest = max(draft.size)
    new = draft.size if longest <= size else tuple(max(1, round(size * side / longest)) for side in draft.size)
    return draft.image if new == draft.image.size else draft.image.resize(new, Image.Resampling.BICUBIC, box=draft.box)


def scaled(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) of an image whose shortest side is brought to `short` pixels."""
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
    return _load_all(lambda photo: load_crop(photo, size), photos, threads, on_bad)


def _load_all(
    load: Callable[[Photo], Image.Image],
    photos: Sequence[Photo],
    threads: int | None,
    on_bad: Callable[[int, PhotoError], None] | None,
) -> list[Image.Image | None]:
    def attempt(photo: Photo) -> Image.Image | PhotoError:
        try:
            return load(photo)
        except PhotoError as error:
            return error

    threads = min(threads or torch.get_num_threads(), len(photos))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(attempt, photos))
    else:
        found = list(map(attempt, photos))
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
    """The centre squares of PIL images of any size and mode, (B, 3, S, S) normalised float32; of a file's image as of the file.

    Raises:
        PhotoError: one that cannot be shown (`images.photos.upright_rgb`).
    """
    return Preprocessor(size, mean, std)(images).pixels
