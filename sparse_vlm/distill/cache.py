"""The teacher's answers for a fixed set of views of each photo, computed once and replayed in every run.

Shape legend: V views in the cache (photos x views a photo), N student tokens, d width, E embedding.
The teacher costs more than the student; with V views cached, an epoch over them costs the student alone.

Notable: the cache is two float16 arrays that are filled in order, a json that ties them to teacher, photos and views, and a counter that is
moved forward only after the rows before it reached the disk: an interrupted fill resumes, and a cache of another teacher is
never mistaken for this one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_vlm.distill.views import CROP_AREA, CROP_ASPECT, make_view
from sparse_vlm.geometry import roi_average_weights
from sparse_vlm.photos import Photo
from sparse_vlm.preprocess import normalize, to_uint8
from sparse_vlm.teacher import Teacher


class TeacherCache:
    """Cached teacher answers; row `photo * views + view`.

    Args:
        folder: where the arrays lie; one sub-folder a (teacher, photos, views, rois).
        teacher: asked for what is missing.
        photos: in a fixed order.
        rois: (N, 4), the cells over which the teacher's patch tokens are averaged.
    """

    def __init__(self, folder: Path, teacher: Teacher, photos: Sequence[Photo], views: int, rois: Tensor, seed: int = 0) -> None:
        self.photos, self.views, self.seed, self.rois = photos, views, seed, rois
        self.size = teacher.spec.image_size
        keys = hashlib.sha256("\n".join(f"{p.key} {p.size}" for p in photos).encode()).hexdigest()[:16]
        cells = hashlib.sha256(rois.numpy().tobytes()).hexdigest()[:16]
        self.meta = {
            "teacher": teacher.fingerprint(),
            "photos": len(photos),
            "keys": keys,
            "views": views,
            "seed": seed,
            "crop": [*CROP_AREA, *CROP_ASPECT],
            "rois": cells,
            "size": self.size,
        }
        name = hashlib.sha256(json.dumps(self.meta).encode()).hexdigest()[:16]
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "meta.json").write_text(json.dumps(self.meta, indent=1))
        rows = len(photos) * views
        self.embeds = self._open("embeds", (rows, teacher.spec.embed_dim))
        self.patches = self._open("patches", (rows, rois.shape[0], teacher.spec.width))

    def _open(self, name: str, shape: tuple[int, ...]) -> np.memmap:
        path = self.folder / f"{name}.npy"
        if path.exists():
            array = np.lib.format.open_memmap(path, mode="r+")
            if array.shape == shape:
                return array
        self._progress.unlink(missing_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)

    @property
    def _progress(self) -> Path:
        return self.folder / "rows_done"

    @property
    def done(self) -> int:
        """Rows that are filled and on disk."""
        return int(self._progress.read_text()) if self._progress.exists() else 0

    def __len__(self) -> int:
        return len(self.photos) * self.views

    def pixels(self, row: int) -> Tensor:
        """The view of a row, (3, S, S) uint8."""
        photo = self.photos[row // self.views]
        return to_uint8(make_view(photo.load(), self.size, photo.key, row % self.views, self.seed))

    def fill(self, teacher: Teacher, batch_size: int = 8, on_rows: Callable[[int], None] = lambda rows: None) -> None:
        """Ask the teacher for every row that is missing, in bfloat16.

        Args:
            batch_size: small, a ViT of 257 tokens takes a quarter less a view on two CPU cores at 8 than at 32.
            on_rows: called with the number of rows just finished.
        """
        spec = teacher.spec
        weights = roi_average_weights(self.rois, spec.grid, spec.grid)
        start = self.done
        if start == len(self):
            return
        fast = teacher.bfloat16_copy()
        while start < len(self):
            rows = range(start, min(start + batch_size, len(self)))
            pixels = torch.stack([self.pixels(row) for row in rows])
            out = fast(normalize(pixels, spec.image_mean, spec.image_std).bfloat16())
            self.embeds[rows.start : rows.stop] = out.embeds.float().numpy()
            self.patches[rows.start : rows.stop] = (weights @ out.patches.float()).numpy()
            start = rows.stop
            if start == len(self) or (start // batch_size) % 80 == 0:
                self._commit(start)
            on_rows(len(rows))

    def _commit(self, rows: int) -> None:
        self.embeds.flush()
        self.patches.flush()
        aside = self._progress.with_suffix(".tmp")
        with open(aside, "w") as stream:
            stream.write(str(rows))
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self._progress)

    def means(self) -> tuple[Tensor, Tensor]:
        """The teacher's mean embedding (E,) and mean patch token (d,), over a spread of at most 4,096 cached rows."""
        step = max(1, len(self) // 4096)
        embeds = torch.from_numpy(np.array(self.embeds[::step], dtype=np.float32))
        patches = torch.from_numpy(np.array(self.patches[::step], dtype=np.float32))
        return embeds.mean(0), patches.mean((0, 1))
