"""The teacher's outputs for a fixed set of views of each photo, computed once and replayed in every run.

Shape legend: P photos, V views of each, N student tokens, d width, E embedding.
The teacher costs more than the student; over cached views an epoch costs only the student.

Notable: each view of all photos is two float16 arrays, filled in order, with a checksum for each row and a counter that advances only after
the rows before it are on disk. So an interrupted fill resumes, and a run with more views a photo keeps the existing ones. Disk space is
allocated before the first row, so that a full disk fails at once. A file of the wrong length is computed again, and a damaged row is never
trained on. If another run has cached all patches of these views, averages over cells are computed from them without the teacher. The
folder's name is a digest of teacher, photos (names and bytes) and cells. Photos that cannot be read are recorded and left out of training.
If two runs need the same cache, one fills it and the other waits.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_vlm.distill.live import LiveTeacher
from sparse_vlm.distill.loss import Statistics
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.errors import UserError, about
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo
from sparse_vlm.roi import roi_average_weights
from sparse_vlm.teachers import Teacher
from sparse_vlm.tower.config import Fit
from sparse_vlm.utils.files import atomic_path, locked, reserve, write_text

DTYPES: dict[str, type] = {"embeds": np.float16, "patches": np.float16, "sums": np.uint32}  # arrays of a view


class TeacherCache(ViewSet):
    """Views with cached teacher outputs.

    Args:
        folder: of all caches; each (teacher, photos, rois) has a sub-folder.
        teacher: whose outputs are cached.
        photos: in a fixed order.
        views: number of views of each photo.
        rois: (N, 4), cells over which the teacher's patch tokens are averaged; None keeps all patches (N = G * G), for a student of
            several token budgets.
        fit: whether view 0 is the centre square or the whole photo.
        owner: whether this process fills the cache; the others wait for it.
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
        identity = super().describe()
        order = ("teacher", "photos", "contents", "seed", "crop", "rois", "size", "fit")
        identity = {"teacher": teacher.fingerprint(), "rois": cells} | identity
        self.meta = {key: identity[key] for key in order if key in identity}  # in this order its digest names the folder
        self.folder = folder / _name(self.meta)
        self._all_patches = folder / _name({**self.meta, "rois": "patches"})
        self._shapes = {
            "embeds": (len(photos), teacher.spec.embed_dim),
            "patches": (len(photos), count, teacher.spec.width),
            "sums": (len(photos), 2),
        }
        with about(self.folder):
            if owner:
                with locked(self.folder, wait=True):
                    write_text(self.folder / "meta.json", json.dumps(self.meta, indent=1))
                    for view in range(views):
                        self._make_room(view)
            while not owner and (self.done < len(self) or any(map(self._broken, range(views)))):
                time.sleep(0.5)
            self.unreadable |= self._recorded_unreadable(self.folder)
            self._embeds, self._patches, self._sums = ([self._open(view, name) for view in range(views)] for name in DTYPES)

    def _broken(self, view: int) -> list[str]:
        """Names of a view's arrays that are missing or of the wrong size."""
        return [name for name, dtype in DTYPES.items() if not _is_whole(self._path(view, name), dtype, self._shapes[name])]

    def _make_room(self, view: int) -> None:
        """Create the missing or wrong arrays of a view, after which none of its rows counts as filled."""
        broken = self._broken(view)
        if not broken:
            return
        if self._done(view):
            print(f"{self._path(view, broken[0])} is damaged; view {view} is computed again", file=sys.stderr)
        self._progress(view).unlink(missing_ok=True)
        for name in broken:
            shape, dtype = self._shapes[name], DTYPES[name]
            with atomic_path(self._path(view, name)) as part:
                with open(part, "wb") as stream:
                    np.lib.format.write_array_header_1_0(stream, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
                    start = stream.tell()
                reserve(part, start + math.prod(shape) * np.dtype(dtype).itemsize)

    def _path(self, view: int, name: str) -> Path:
        return self.folder / f"{name}-{view}.npy"

    def _open(self, view: int, name: str) -> np.memmap:
        """An array of a view, read-only if it is complete."""
        return np.load(self._path(view, name), mmap_mode="r" if self._done(view) == len(self.photos) else "r+")

    def _progress(self, view: int) -> Path:
        return self.folder / f"rows_done-{view}"

    def _done(self, view: int) -> int:
        return _rows_done(self._progress(view), len(self.photos))

    @staticmethod
    def _recorded_unreadable(folder: Path) -> dict[int, str]:
        """Photos that could not be read, with the reason."""
        path = folder / "unreadable.json"
        with about(path, ValueError, AttributeError):
            return {int(i): str(why) for i, why in json.loads(path.read_text()).items()} if path.exists() else {}

    @property
    def done(self) -> int:
        """Number of rows that are filled and on disk."""
        return sum(self._done(view) for view in range(self.views))

    def describe(self) -> dict[str, Any]:
        """What identifies these views, with the teacher and its cells."""
        return self.meta

    def outputs(self, row: int) -> tuple[Tensor, Tensor]:
        """Teacher outputs of a row, float32: the embedding (E,), and patch tokens averaged over cells (N, d).

        Raises:
            UserError: the row is damaged.
        """
        both = self._row(*divmod(row, len(self.photos)))
        return torch.from_numpy(both[0].astype(np.float32)), torch.from_numpy(both[1].astype(np.float32))

    def _row(self, view: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The stored outputs of a view of a photo, float16."""
        both = np.array(self._embeds[view][index]), np.array(self._patches[view][index])
        if _checksums(*both) != tuple(self._sums[view][index]):
            raise UserError(
                f"{self.folder}: row {index} of view {view} is damaged (checksum); remove the folder to compute the cache again"
            )
        return both

    def _write(self, view: int, start: int, embeds: np.ndarray, patches: np.ndarray) -> None:
        """Write rows from `start` on."""
        for index, (embed, patch) in enumerate(zip(embeds.astype(np.float16), patches.astype(np.float16), strict=True), start):
            self._embeds[view][index], self._patches[view][index] = embed, patch
            self._sums[view][index] = _checksums(embed, patch)

    def _average_kept_patches(self, on_rows: Callable[[int], None] = lambda rows: None, batch_size: int = 64) -> None:
        """Fill missing rows from the patches that another run has cached, of views that are complete there.

        Args:
            on_rows: called with the number of rows just filled.
        """
        count, folder = len(self.photos), self._all_patches
        for view in range(self.views if self.rois is not None else 0):
            start, paths = self._done(view), {name: folder / f"{name}-{view}.npy" for name in DTYPES}
            is_kept = _rows_done(folder / f"rows_done-{view}", count) == count
            if start == count or not is_kept or not all(_is_whole(paths[name], dtype) for name, dtype in DTYPES.items()):
                continue
            kept = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
            grid = math.isqrt(kept["patches"].shape[1])
            weights = roi_average_weights(self.rois, grid, grid)
            self.unreadable |= self._recorded_unreadable(folder)
            while start < count:
                stop = min(start + batch_size, count)
                embeds, patches = np.array(kept["embeds"][start:stop]), np.array(kept["patches"][start:stop])
                if any(_checksums(*both) != tuple(sums) for *both, sums in zip(embeds, patches, kept["sums"][start:stop], strict=True)):
                    break  # the teacher computes the rest
                self._write(view, start, embeds, (weights @ torch.from_numpy(patches.astype(np.float32))).numpy())
                on_rows(stop - start)
                start = stop
            self._commit(view, start)

    def fill(
        self,
        teacher: Teacher,
        batch_size: int = 8,
        on_rows: Callable[[int], None] = lambda rows: None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Compute all missing rows, in the device's native dtype.

        Args:
            batch_size: 8 is fastest on a CPU: a view of a ViT with 257 tokens takes a quarter less time than at 32.
            on_rows: called with the number of rows just filled.
        """
        if self.done == len(self):
            return
        before = self.done
        with about(self.folder), locked(self.folder, wait=True):
            if self.done > before:  # another run has filled it meanwhile
                self.unreadable |= self._recorded_unreadable(self.folder)
                on_rows(self.done - before)
            self._average_kept_patches(on_rows)
            if self.done < len(self):
                self._compute(LiveTeacher(teacher, self.rois, device), batch_size, on_rows)

    def _compute(self, teacher: LiveTeacher, batch_size: int, on_rows: Callable[[int], None]) -> None:
        count = len(self.photos)
        for view in range(self.views):
            start = self._done(view)
            while start < count:
                stop = min(start + batch_size, count)
                embeds, patches = teacher(torch.stack([self._pixels_or_black(view * count + index) for index in range(start, stop)]))
                self._write(view, start, embeds.cpu().numpy(), patches.cpu().numpy())
                on_rows(stop - start)
                start = stop
                if start == count or (start // batch_size) % 80 == 0:
                    self._commit(view, start)

    def _pixels_or_black(self, row: int) -> Tensor:
        """The view of a row; black if the photo cannot be read, which is recorded."""
        try:
            return self.pixels(row)
        except ImageError as error:
            self.unreadable[row % len(self.photos)] = str(error)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8)

    def _commit(self, view: int, rows: int) -> None:
        for arrays in (self._embeds, self._patches, self._sums):
            arrays[view].flush()
        if self.unreadable:
            write_text(self.folder / "unreadable.json", json.dumps(self.unreadable, indent=1))
        write_text(self._progress(view), str(rows))

    def statistics(self) -> Statistics:
        """Statistics of at most 4,096 photos, evenly spread, in the evaluation view.

        Raises:
            ImageError: no photo can be read.
        """
        rows = [i for i in range(0, len(self.photos), max(1, len(self.photos) // 4096)) if i not in self.unreadable]
        if not rows:
            raise ImageError(f"none of the {len(self.photos)} photos can be read; {next(iter(self.unreadable.values()))}")
        embeds, patches = zip(*(self.outputs(row) for row in rows), strict=True)  # view 0
        tokens = torch.stack(patches)
        return Statistics.of(torch.stack(embeds), tokens.mean((0, 1)), tokens.square().sum(-1).mean())


def _checksums(embed: np.ndarray, patch: np.ndarray) -> tuple[int, int]:
    """CRC-32 of a row's two float16 arrays."""
    return zlib.crc32(embed.tobytes()), zlib.crc32(patch.tobytes())


def _rows_done(path: Path, count: int) -> int:
    """The value of a counter file; 0 if it is missing or not in [0, count]."""
    try:
        done = int(path.read_text())
    except (OSError, ValueError):
        return 0
    return done if 0 <= done <= count else 0


def _is_whole(path: Path, dtype: type, shape: tuple[int, ...] | None = None) -> bool:
    """Whether a file is a complete array of this dtype (and shape)."""
    try:
        with open(path, "rb") as stream:
            np.lib.format.read_magic(stream)
            found, fortran, kind = np.lib.format.read_array_header_1_0(stream)
            start = stream.tell()
    except Exception:  # numpy evaluates a header as Python, so that a damaged one may raise anything
        return False
    matches = kind == np.dtype(dtype) and not fortran and shape in (None, found)
    return matches and path.stat().st_size == start + math.prod(found) * kind.itemsize


def _name(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()[:16]
