"""Photos decoded once into GPU memory, from which the GPU makes the views: for a GPU that trains faster than CPUs decode.

Shape legend: P photos, B views, S side of a view in pixels, R side of a stored photo in pixels.
Every photo is stored as R x R pixels, whatever its aspect ratio, so that one tensor holds all. A view is the same crop as of
`views.make_view`, at the photo's aspect ratio, but resampled bilinearly instead of bicubically and from at most R pixels a side.
Teacher and student get the same pixels, as always.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.distill.views import ViewSet, choose_crop
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.preprocess import to_uint8
from sparse_vlm.roi import crop_boxes
from sparse_vlm.utils.devices import free_memory, world_size

FINER = 10 / 7  # R / S
SAMPLES = 2  # bilinear samples a side that a view's pixel averages: enough for a view of a whole photo
AT_ONCE = 256  # photos copied to the device, or views made, at a time
FREE_SHARE = 0.6  # of the device's free memory that photos may take


class ResidentPhotos:
    """The decoded photos of a `ViewSet` on a device.

    Args:
        views: the view set; photos that cannot be read are added to its `unreadable`.
        device: that stores them.
        on_photos: called with the number of photos just decoded.

    Attributes:
        sizes: (width, height) of each photo before resizing.

    Raises:
        UserError: not enough memory.
    """

    def __init__(self, views: ViewSet, device: torch.device, on_photos: Callable[[int], None] = lambda photos: None) -> None:
        side = round(FINER * views.size)
        count = len(views.photos)
        needed, free = count * 3 * side * side, free_memory(device)
        if free is not None and needed > FREE_SHARE * free:
            raise UserError(
                f"{count:,} decoded photos take {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free; "
                "omit --resident, or give fewer photos"
            )
        self.sizes = [(1, 1)] * count
        self._side, self._pixels = side, torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world_size())) as pool:
            for start in range(0, count, AT_ONCE):
                some = range(start, min(start + AT_ONCE, count))
                decoded = list(pool.map(lambda index: self._decode(views, index), some))
                self._pixels[start : start + len(decoded)] = torch.stack(decoded).to(device)
                on_photos(len(decoded))

    def _decode(self, views: ViewSet, index: int) -> Tensor:
        """(3, R, R) uint8; black if the photo cannot be read."""
        side = self._side
        try:
            draft = views.photos[index].draft(side)
        except ImageError as error:
            views.unreadable[index] = str(error)
            return torch.zeros(3, side, side, dtype=torch.uint8)
        self.sizes[index] = draft.size
        return to_uint8(draft.image.resize((side, side), Image.Resampling.BICUBIC, box=draft.box))

    def views(self, photos: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
        """Make views, (B, 3, S, S) uint8 on the device.

        Args:
            photos: (B,) indices.
            boxes: (B, 4), crop of each view, relative to its photo.
            flipped: (B,) bool, which views are mirrored.
            size: S.
        """
        made = []
        for some, box, mirrored in zip(*(each.split(AT_ONCE) for each in (photos, boxes, flipped)), strict=True):
            device = self._pixels.device
            stored = self._pixels[some.to(device)].float()
            view = crop_boxes(stored, box.to(device), size, SAMPLES).round_().to(torch.uint8)
            made.append(torch.where(mirrored.to(device).view(-1, 1, 1, 1), view.flip(-1), view))
        return torch.cat(made)


def view_crop(views: ViewSet, size: tuple[int, int], row: int) -> tuple[tuple[float, float, float, float], bool]:
    """The crop of a row's view, relative to its photo, and whether the view is mirrored.

    Args:
        size: (width, height) of the photo.
    """
    view, index = divmod(row, len(views.photos))
    width, height = size
    if view == 0:
        short = min(width, height)
        x, y = (width - short) / 2, (height - short) / 2
        box, flipped = (x, y, x + short, y + short), False
    else:
        box, flipped = choose_crop(width, height, views.photos[index].key, view, views.seed)
    return (box[0] / width, box[1] / height, box[2] / width, box[3] / height), flipped
