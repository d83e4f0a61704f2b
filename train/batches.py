"""Batches of bootstrapping: views and the teacher's outputs, cached or computed at that step.

Shape legend: B views, N student tokens, d width, E embedding, S side in pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sparse_vlm.distill.cache import TeacherCache
from sparse_vlm.distill.live import LiveTeacher
from sparse_vlm.distill.loss import Statistics
from sparse_vlm.distill.resident import ResidentPhotos, view_crop
from sparse_vlm.distill.views import ViewSet, mix
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import lay_out
from sparse_vlm.utils.devices import rank

HELD_OUT_ONE_IN = 100
MAX_HELD_OUT = 512  # photos to evaluate on, if their teacher outputs are computed at the start of every run
STATISTICS_PHOTOS = 1024
TEACHER_BATCH = 8
LARGEST_CANVAS = 4096  # pixels a side: the largest `image_size` of a tower

Batch = dict[str, Tensor]


class CachedViews(Dataset):
    """The student's input and cached teacher outputs: `pixels` (3, h, w) uint8, `embeds` (E,) and `tokens` (N, d) float32."""

    def __init__(self, cache: TeacherCache, rows: Sequence[int], size: int) -> None:
        self.cache, self.rows, self.size = cache, rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index]
        embeds, tokens = self.cache.outputs(row)
        return {"pixels": self.cache.for_student(row, self.size), "embeds": embeds, "tokens": tokens}


class LiveViews(Dataset):
    """Views without teacher outputs: `pixels`, the student's input, and `teacher_pixels` if the teacher's is different.

    A photo that cannot be read is replaced by the next one that can; `unreadable` () is its index, or -1.
    """

    def __init__(self, views: ViewSet, rows: Sequence[int], size: int) -> None:
        self.views, self.rows, self.size = views, rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        bad = -1
        for step in range(len(self.rows)):
            row = self.rows[(index + step) % len(self.rows)]
            try:
                batch = self.views.for_both(row, self.size)
            except ImageError:
                bad = row % len(self.views.photos) if bad < 0 else bad
                continue
            return batch | {"unreadable": torch.tensor(bad)}
        raise UserError(f"none of the {len(self.views.photos)} photos can be read")


class ResidentViews(Dataset):
    """The crops of `ResidentPhotos` that make the views of a step: `photo` (), `box` (4,) and `flipped` ()."""

    def __init__(self, views: ViewSet, photos: ResidentPhotos, rows: Sequence[int]) -> None:
        self.views, self.sizes, self.rows = views, photos.sizes, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        photo = self.rows[index] % len(self.sizes)
        box, flipped = view_crop(self.views, self.sizes[photo], self.rows[index])
        return {"photo": torch.tensor(photo), "box": torch.tensor(box), "flipped": torch.tensor(flipped)}


class Augmentation:
    """Makes views of a loaded batch, if teacher outputs are computed at every step: crops of resident photos, and mixup.

    Args:
        size: side of the student's images.
        teacher_size: side of the teacher's.
        photos: resident on the device; without them the loader has made the views.
        mixed: share of views that are mixed.
    """

    def __init__(self, size: int, teacher_size: int, photos: ResidentPhotos | None, mixed: float, seed: int) -> None:
        self.size, self.teacher_size, self.photos, self.mixed, self.seed = size, teacher_size, photos, mixed, seed

    def __call__(self, loaded: Batch, step: int) -> Batch:
        """`pixels` (B, 3, S, S) uint8, the student's input, and `teacher_pixels` if the teacher's is different.

        Args:
            step: with the seed, determines what is mixed.
        """
        if self.photos is None:
            views = {name: loaded[name] for name in ("pixels", "teacher_pixels", "image_sizes") if name in loaded}
        else:
            sizes = {"pixels": self.size} | ({"teacher_pixels": self.teacher_size} if self.teacher_size != self.size else {})
            crops = loaded["photo"], loaded["box"], loaded["flipped"]
            views = {name: self.photos.views(*crops, size) for name, size in sizes.items()}
        if self.mixed:
            number = int(np.random.SeedSequence((self.seed, rank(), step)).generate_state(1)[0])
            views = {name: mix(pixels, self.mixed, torch.Generator().manual_seed(number)) for name, pixels in views.items()}
        return views


def collate(batches: Sequence[Batch]) -> Batch:
    """Stack items to a batch; views of different sizes are put on one canvas, with `image_sizes` (B, 2) their heights and widths."""
    batch = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0] if key != "pixels"}
    if "pixels" not in batches[0]:
        return batch
    pixels = [batch["pixels"] for batch in batches]
    if len({view.shape for view in pixels}) == 1:
        return batch | {"pixels": torch.stack(pixels)}
    return batch | lay_out(pixels, LARGEST_CANVAS)._asdict()


def held_out(photos: Sequence[Photo]) -> list[int]:
    """Indices of held-out photos, by a hash of their keys, so that they are the same in every run; at least one of several photos."""
    hashes = [zlib.crc32(photo.key.encode(errors="surrogateescape")) for photo in photos]
    indices = [i for i, value in enumerate(hashes) if value % HELD_OUT_ONE_IN == 0]
    return indices or ([hashes.index(min(hashes))] if len(hashes) > 1 else [])


def held_out_batches(views: ViewSet, indices: Sequence[int], size: int, teacher: LiveTeacher) -> list[Batch]:
    """Held-out items with teacher outputs computed now: of at most `MAX_HELD_OUT` of the photos, evenly spread, that can be read."""
    count = min(len(indices), MAX_HELD_OUT)
    spread = [indices[i * len(indices) // count] for i in range(count)]
    items = LiveViews(views, spread, size)
    batches: list[Batch] = []
    for start in range(0, len(spread), TEACHER_BATCH):
        some = [items[i] for i in range(start, min(start + TEACHER_BATCH, len(spread)))]
        some = [item for item in some if item["unreadable"] < 0]
        if some:
            batch = collate(some)
            embeds, tokens = teacher(batch.get("teacher_pixels", batch["pixels"]))
            outputs = zip(some, embeds.cpu(), tokens.cpu(), strict=True)
            batches += [{"pixels": item["pixels"], "embeds": e, "tokens": t} for item, e, t in outputs]
    return batches


def live_statistics(views: ViewSet, indices: Sequence[int], teacher: LiveTeacher) -> Statistics:
    """Statistics of teacher outputs, of about `STATISTICS_PHOTOS` photos in the evaluation view, or of all if they are fewer."""
    step = max(1, len(indices) // STATISTICS_PHOTOS)
    items = LiveViews(views, indices[::step], views.size)
    embeds, patches, squares = [], [], []
    for start in range(0, len(items), TEACHER_BATCH):
        batch = collate([items[i] for i in range(start, min(start + TEACHER_BATCH, len(items)))])
        outputs = teacher(batch.get("teacher_pixels", batch["pixels"]))
        embeds.append(outputs[0].cpu())
        patches.append(outputs[1].mean(1).sum(0))
        squares.append(outputs[1].square().sum(-1).mean(1).sum())
    return Statistics.of(torch.cat(embeds), torch.stack(patches).sum(0).cpu() / len(items), torch.stack(squares).sum().cpu() / len(items))
