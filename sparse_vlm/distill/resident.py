"""Photos kept decoded in a device's memory, which makes the views itself: for a device that learns faster than CPUs decode.

Shape legend: P photos, B views, S side of a view in pixels, R side of a kept photo in pixels.
A photo is kept as R x R pixels whatever its proportions, so that all lie in one tensor. A view shows the same part of it as
`views.make_view` does, in the photo's own proportions; its pixels are bilinear means where that one's are bicubic, and a photo larger than
R is seen at no more than R pixels a side. Teacher and student are shown the same pixels, as always.
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

FINER = 10 / 7  # kept pixels of a side for one of a view's
SAMPLES = 2  # a side, that a view's pixel is the mean of: as many as the whole of a kept photo asks for
AT_ONCE = 256  # photos on their way to the device, and views made, at a time
FREE_SHARE = 0.6  # of the device's free memory that photos may take


class ResidentPhotos:
    """The photos of a `ViewSet`, decoded, on a device.

    Args:
        views: whose photos; those that cannot be read are added to its `unreadable`.
        device: that keeps them.
        on_photos: called with how many were decoded since it was last called.

    Attributes:
        sizes: (width, height) of each photo in full.

    Raises:
        UserError: they do not fit.
    """

    def __init__(self, views: ViewSet, device: torch.device, on_photos: Callable[[int], None] = lambda photos: None) -> None:
        side = round(FINER * views.size)
        count = len(views.photos)
        needed, free = count * 3 * side * side, free_memory(device)
        if free is not None and needed > FREE_SHARE * free:
            raise UserError(
                f"{count:,} decoded photos take {needed / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free; "
                "leave --resident away, or give fewer photos"
            )
        self.sizes = [(1, 1)] * count
        self._side, self._kept = side, torch.zeros(count, 3, side, side, dtype=torch.uint8, device=device)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // world_size())) as pool:
            for start in range(0, count, AT_ONCE):
                some = range(start, min(start + AT_ONCE, count))
                found = list(pool.map(lambda index: self._decode(views, index), some))
                self._kept[start : start + len(found)] = torch.stack(found).to(device)
                on_photos(len(found))

    def _decode(self, views: ViewSet, index: int) -> Tensor:
        """(3, R, R) uint8; black where the photo cannot be read."""
        side = self._side
        try:
            draft = views.photos[index].draft(side)
        except ImageError as error:
            views.unreadable[index] = str(error)
            return torch.zeros(3, side, side, dtype=torch.uint8)
        self.sizes[index] = draft.size
        return to_uint8(draft.image.resize((side, side), Image.Resampling.BICUBIC, box=draft.box))

    def views(self, photos: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
        """Views, (B, 3, S, S) uint8 on the device.

        Args:
            photos: (B,) their numbers.
            boxes: (B, 4), what each view shows, relative to its photo.
            flipped: (B,) bool, which are mirrored.
            size: S.
        """
        made = []
        for some, box, mirrored in zip(*(each.split(AT_ONCE) for each in (photos, boxes, flipped)), strict=True):
            device = self._kept.device
            pictures = self._kept[some.to(device)].float()
            view = crop_boxes(pictures, box.to(device), size, SAMPLES).round_().to(torch.uint8)
            made.append(torch.where(mirrored.to(device).view(-1, 1, 1, 1), view.flip(-1), view))
        return torch.cat(made)


def view_crop(views: ViewSet, size: tuple[int, int], row: int) -> tuple[tuple[float, float, float, float], bool]:
    """What the view of a row shows of its photo, relative to it, and whether it is mirrored.

    Args:
        size: (width, height) of the photo in full.
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
