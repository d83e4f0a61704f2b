"""The teacher's answers for a fixed set of views of each photo, computed once and replayed in every run.

Shape legend: P photos, V views of each, N student tokens, d width, E embedding.
The teacher costs more than the student; with the views cached, an epoch over them costs the student alone.

Notable: each view of all photos is two float16 arrays that are filled in order, and a counter that is moved forward only after the rows
before it reached the disk: an interrupted fill resumes, and a run that asks for more views a photo keeps those that are there. Where
another run has kept all patches of these views, averages over cells are taken from them and the teacher is not asked again. A
json ties them to teacher, photos and cells; a cache of another teacher is never mistaken for this one. Photos that cannot be read are
noted beside the rows and left out of training.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_vlm.distill.live import LiveTeacher
from sparse_vlm.distill.objective import Statistics
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.files import write_text
from sparse_vlm.geometry import roi_average_weights
from sparse_vlm.photos import Photo, PhotoError
from sparse_vlm.teacher import Teacher
from sparse_vlm.tower.config import Fit


class TeacherCache(ViewSet):
    """Views with cached teacher answers.

    Args:
        folder: where the arrays lie; one sub-folder a (teacher, photos, rois).
        teacher: asked for what is missing.
        photos: in a fixed order.
        views: views of each photo that this run wants.
        rois: (N, 4), the cells over which the teacher's patch tokens are averaged; None keeps all of them, as a student of several
            budgets needs (N = G * G then).
        fit: whether view 0 is the centre square or the whole photo.
        owner: whether this process fills the cache; others wait until the owner has filled it.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        photos: Sequence[Photo],
        views: int,
        rois: Tensor | None,
        seed: int = 0,
        owner: bool = True,
        fit: Fit = "crop",
    ) -> None:
        super().__init__(photos, views, teacher.spec.image_size, seed, fit)
        self.rois = rois
        cells = "patches" if rois is None else hashlib.sha256(rois.numpy().tobytes()).hexdigest()[:16]
        count = teacher.spec.grid**2 if rois is None else rois.shape[0]
        known = super().describe()
        # in this order since the first cache: their folders are named after it
        order = ("teacher", "photos", "keys", "seed", "crop", "rois", "size", "fit")
        known = {"teacher": teacher.fingerprint(), "rois": cells} | known
        self.meta = {key: known[key] for key in order if key in known}
        self.folder = folder / _name(self.meta)
        self._all_patches = folder / _name({**self.meta, "rois": "patches"})
        if owner:
            write_text(self.folder / "meta.json", json.dumps(self.meta, indent=1))
        while not owner and self.done < len(self):
            time.sleep(0.5)
        noted = self.folder / "unreadable.json"
        if noted.exists():
            self.unreadable = {int(i): why for i, why in json.loads(noted.read_text()).items()}
        self._embeds = [self._open(view, "embeds", (len(photos), teacher.spec.embed_dim)) for view in range(views)]
        self._patches = [self._open(view, "patches", (len(photos), count, teacher.spec.width)) for view in range(views)]

    def _open(self, view: int, name: str, shape: tuple[int, ...]) -> np.memmap:
        path = self.folder / f"{name}-{view}.npy"
        if path.exists():
            array = np.lib.format.open_memmap(path, mode="r+")
            if array.shape == shape:
                return array
        self._progress(view).unlink(missing_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)

    def _progress(self, view: int) -> Path:
        return self.folder / f"rows_done-{view}"

    def _done(self, view: int) -> int:
        path = self._progress(view)
        return int(path.read_text()) if path.exists() else 0

    @property
    def done(self) -> int:
        """Rows of the wanted views that are filled and on disk."""
        return sum(self._done(view) for view in range(self.views))

    def describe(self) -> dict[str, Any]:
        """The teacher and its cells as well."""
        return self.meta

    def answers(self, row: int) -> tuple[Tensor, Tensor]:
        """The teacher's embedding (E,) and patch tokens averaged over each cell (N, d) of a row, float32."""
        view, index = divmod(row, len(self.photos))
        both = self._embeds[view][index], self._patches[view][index]
        return torch.from_numpy(both[0].astype(np.float32)), torch.from_numpy(both[1].astype(np.float32))

    def _average_kept_patches(self, on_rows: Callable[[int], None] = lambda rows: None, batch_size: int = 64) -> None:
        """Fill what is missing of views whose patches are all on disk, kept by a run whose student has no cells of its own.

        Args:
            on_rows: called with the number of rows just finished.
        """
        count = len(self.photos)
        for view in range(self.views if self.rois is not None else 0):
            start, kept = self._done(view), self._all_patches / f"rows_done-{view}"
            if start == count or not kept.exists() or int(kept.read_text()) < count:
                continue
            embeds, patches = (np.load(self._all_patches / f"{name}-{view}.npy", mmap_mode="r") for name in ("embeds", "patches"))
            grid = math.isqrt(patches.shape[1])
            weights = roi_average_weights(self.rois, grid, grid)
            noted = self._all_patches / "unreadable.json"
            if noted.exists():
                self.unreadable |= {int(i): why for i, why in json.loads(noted.read_text()).items()}
            self._embeds[view][start:] = embeds[start:]
            while start < count:
                stop = min(start + batch_size, count)
                self._patches[view][start:stop] = (weights @ torch.from_numpy(patches[start:stop].astype(np.float32))).numpy()
                on_rows(stop - start)
                start = stop
            self._commit(view, count)

    def fill(
        self,
        teacher: Teacher,
        batch_size: int = 8,
        on_rows: Callable[[int], None] = lambda rows: None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Ask the teacher for every row that is missing, in the dtype that the device multiplies in.

        Args:
            batch_size: small on a CPU, where in bfloat16 a ViT of 257 tokens takes a quarter less a view on two cores at 8 than at 32.
            on_rows: called with the number of rows just finished.
        """
        self._average_kept_patches(on_rows)
        if self.done == len(self):
            return
        ask = LiveTeacher(teacher, self.rois, device)
        count = len(self.photos)
        for view in range(self.views):
            start = self._done(view)
            while start < count:
                stop = min(start + batch_size, count)
                embeds, patches = ask(torch.stack([self._pixels_or_note(view * count + index) for index in range(start, stop)]))
                self._embeds[view][start:stop] = embeds.cpu().numpy()
                self._patches[view][start:stop] = patches.cpu().numpy()
                on_rows(stop - start)
                start = stop
                if start == count or (start // batch_size) % 80 == 0:
                    self._commit(view, start)

    def _pixels_or_note(self, row: int) -> Tensor:
        """The view of a row; black, and noted, where the photo cannot be read."""
        try:
            return self.pixels(row)
        except PhotoError as error:
            self.unreadable[row % len(self.photos)] = str(error)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def _commit(self, view: int, rows: int) -> None:
        self._embeds[view].flush()
        self._patches[view].flush()
        if self.unreadable:
            write_text(self.folder / "unreadable.json", json.dumps(self.unreadable, indent=1))
        write_text(self._progress(view), str(rows))

    def statistics(self) -> Statistics:
        """Over a spread of at most 4,096 photos as evaluation sees them.

        Raises:
            PhotoError: no photo can be read.
        """
        rows = [i for i in range(0, len(self.photos), max(1, len(self.photos) // 4096)) if i not in self.unreadable]
        if not rows:
            raise PhotoError(f"none of the {len(self.photos)} photos can be read; {next(iter(self.unreadable.values()))}")
        embeds = torch.from_numpy(np.array(self._embeds[0][rows], dtype=np.float32))
        patches = torch.from_numpy(np.array(self._patches[0][rows], dtype=np.float32))
        return Statistics.of(embeds, patches.mean((0, 1)), patches.square().sum(-1).mean())


def _name(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:16]
