"""What a bootstrapping step learns from: views, and what the teacher says of them, from a cache or asked at that moment.

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
AT_MOST = 512  # photos to evaluate on, where the teacher is asked for them at the start of every run
KNOWN_FROM = 1024
ASKED_AT_ONCE = 8
LARGEST_CANVAS = 4096  # pixels a side: the largest `image_size` of a tower

Batch = dict[str, Tensor]


class CachedViews(Dataset):
    """Views as the student takes them with the teacher's outputs: `pixels` (3, h, w) uint8, `embeds` (E,) and `tokens` (N, d) float32."""

    def __init__(self, cache: TeacherCache, rows: Sequence[int], size: int) -> None:
        self.cache, self.rows, self.size = cache, rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row = self.rows[index]
        embeds, tokens = self.cache.outputs(row)
        return {"pixels": self.cache.for_student(row, self.size), "embeds": embeds, "tokens": tokens}


class LiveViews(Dataset):
    """Views alone: `pixels` as the student takes them, and `seen` as the teacher does where that is something else.

    In the place of a photo that cannot be read stands the next one that can, and `unreadable` () says which it was; -1 for none.
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
    """Which views a step shows, for a device that makes them of the photos it keeps: `photo` (), `box` (4,) and `flipped` ()."""

    def __init__(self, views: ViewSet, photos: ResidentPhotos, rows: Sequence[int]) -> None:
        self.views, self.sizes, self.rows = views, photos.sizes, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        photo = self.rows[index] % len(self.sizes)
        box, flipped = view_crop(self.views, self.sizes[photo], self.rows[index])
        return {"photo": torch.tensor(photo), "box": torch.tensor(box), "flipped": torch.tensor(flipped)}


class Augmentation:
    """Turns what a loader brought into pixels, where the teacher is asked at every step: views made here, some of them mixed.

    Args:
        size: of the student's images.
        seen: of the teacher's.
        photos: that the device keeps; the loader brings pixels unless given.
        mixed: share of views that are mixed.
    """

    def __init__(self, size: int, seen: int, photos: ResidentPhotos | None, mixed: float, seed: int) -> None:
        self.size, self.seen, self.photos, self.mixed, self.seed = size, seen, photos, mixed, seed

    def __call__(self, brought: Batch, step: int) -> Batch:
        """`pixels` (B, 3, S, S) uint8 at the student's size, and `seen` where the teacher's is another.

        Args:
            step: decides, with the seed, what is mixed.
        """
        if self.photos is None:
            shown = {name: brought[name] for name in ("pixels", "seen", "image_sizes") if name in brought}
        else:
            sizes = {"pixels": self.size} | ({"seen": self.seen} if self.seen != self.size else {})
            which = brought["photo"], brought["box"], brought["flipped"]
            shown = {name: self.photos.views(*which, size) for name, size in sizes.items()}
        if self.mixed:
            number = int(np.random.SeedSequence((self.seed, rank(), step)).generate_state(1)[0])
            shown = {name: mix(pixels, self.mixed, torch.Generator().manual_seed(number)) for name, pixels in shown.items()}
        return shown


def collate(batches: Sequence[Batch]) -> Batch:
    """A batch; views of several sizes share a canvas, and `image_sizes` (B, 2) gives the height and width of each."""
    batch = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0] if key != "pixels"}
    if "pixels" not in batches[0]:
        return batch
    pixels = [batch["pixels"] for batch in batches]
    if len({view.shape for view in pixels}) == 1:
        return batch | {"pixels": torch.stack(pixels)}
    return batch | lay_out(pixels, LARGEST_CANVAS)._asdict()


def held_out(photos: Sequence[Photo]) -> list[int]:
    """Photos that are never learnt from, by a hash of their keys, so that they are the same in every run; one at least of several."""
    hashes = [zlib.crc32(photo.key.encode(errors="surrogateescape")) for photo in photos]
    found = [i for i, value in enumerate(hashes) if value % HELD_OUT_ONE_IN == 0]
    return found or ([hashes.index(min(hashes))] if len(hashes) > 1 else [])


def held_out_batches(views: ViewSet, indices: Sequence[int], size: int, ask: LiveTeacher) -> list[Batch]:
    """Lessons on photos as evaluation sees them, the teacher asked now: at most `AT_MOST`, spread evenly, those that can be read."""
    count = min(len(indices), AT_MOST)
    spread = [indices[i * len(indices) // count] for i in range(count)]
    shown = LiveViews(views, spread, size)
    batches: list[Batch] = []
    for start in range(0, len(spread), ASKED_AT_ONCE):
        some = [shown[i] for i in range(start, min(start + ASKED_AT_ONCE, len(spread)))]
        some = [batch for batch in some if batch["unreadable"] < 0]
        if some:
            batch = collate(some)
            embeds, tokens = ask(batch.get("seen", batch["pixels"]))
            answered = zip(some, embeds.cpu(), tokens.cpu(), strict=True)
            batches += [{"pixels": batch["pixels"], "embeds": e, "tokens": t} for batch, e, t in answered]
    return batches


def live_statistics(views: ViewSet, indices: Sequence[int], ask: LiveTeacher) -> Statistics:
    """Over about `KNOWN_FROM` photos, as evaluation sees them, or all where they are fewer."""
    step = max(1, len(indices) // KNOWN_FROM)
    shown = LiveViews(views, indices[::step], views.size)
    embeds, patches, squares = [], [], []
    for start in range(0, len(shown), ASKED_AT_ONCE):
        batch = collate([shown[i] for i in range(start, min(start + ASKED_AT_ONCE, len(shown)))])
        said = ask(batch.get("seen", batch["pixels"]))
        embeds.append(said[0].cpu())
        patches.append(said[1].mean(1).sum(0))
        squares.append(said[1].square().sum(-1).mean(1).sum())
    return Statistics.of(torch.cat(embeds), torch.stack(patches).sum(0).cpu() / len(shown), torch.stack(squares).sum().cpu() / len(shown))
