"""Photo sets: webdataset tars and image folders, with random access to each photo.

Notable: a tar is indexed once by member offsets and then read by seeking, so that a training run can resume at any photo and an evaluation
can take every tenth one. Only the photo that is asked for is decoded.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sparse_vlm.images.decode import Draft, ImageError, decode_image, draft_image, image_suffixes, read_file, why_unreadable
from sparse_vlm.images.tars import index_tar

STDIN = "-"  # in the place of a path


@dataclass(frozen=True)
class Photo:
    """An image file, or an image in a tar: where its bytes are, and its metadata.

    Attributes:
        key: name in its set.
        offset, size: of the bytes in `source`; size -1 if there is no such file.
        info: the json beside it in the tar; empty for plain files.
    """

    key: str
    source: Path
    offset: int
    size: int
    info: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def read(self) -> bytes:
        """The encoded bytes."""
        return read_file(self.source, self.offset, self.size)

    def load(self) -> Image.Image:
        """The decoded RGB image, upright by its EXIF orientation.

        Raises:
            ImageError: no such file, not an image, truncated, or too large.
        """
        return decode_image(*self._named())

    def draft(self, at_least: int, longest: bool = False) -> Draft:
        """The image decoded to be scaled down; arguments as `draft_image`.

        Raises:
            ImageError: as `load`.
        """
        return draft_image(*self._named(), at_least, longest)

    def _named(self) -> tuple[bytes, str]:
        """The encoded bytes, and the photo's name for messages."""
        # a tar member has a header before it
        name = f"{self.source.name}:{self.key}" if self.offset else str(self.source)
        try:
            return self.read(), name
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise ImageError(f"{name}: {why_unreadable(error)}") from None


def photo_of(path: Path) -> Photo:
    """A photo of an image file, which need not exist until it is read."""
    return Photo(path.name, path, 0, file_size(path))


class PhotoSet(Sequence[Photo]):
    """Photos from tars, folders, files and URLs, in a stable order.

    Args:
        patterns: tar files, image folders, single images, glob patterns of them, URLs of tars, or `hf:ORG/NAME:SPLIT` for a data set of
            Hugging Face; each may hold braces, as `photos-{000..099}.tar`.
        on_progress: called with (what is being fetched, bytes or rows done, in total or 0).

    Raises:
        ImageError: a pattern that matches nothing, or a file that is not a tar.
        UserError: something that cannot be fetched.
    """

    def __init__(
        self, patterns: str | Path | Sequence[str | Path], on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
    ) -> None:
        if isinstance(patterns, (str, Path)):
            patterns = [patterns]
        self._photos: list[Photo] = []
        for path in _expand(patterns, on_progress):
            self._photos += _index_tar(path) if path.suffix.lower() == ".tar" and not path.is_dir() else _index_files(path)
        if not self._photos:
            raise ImageError(f"no photo in {', '.join(map(str, patterns))}")

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Photo:  # type: ignore[override]
        return self._photos[index]

    def __iter__(self) -> Iterator[Photo]:
        return iter(self._photos)


def _expand(patterns: Sequence[str | Path], on_progress: Callable[[str, int, int], None]) -> list[Path]:
    # imported here because most users of this module only open an image
    from braceexpand import UnbalancedBracesError, braceexpand

    from sparse_vlm.images.remote import fetch_photos, is_remote

    paths: list[Path] = []
    for pattern in patterns:
        try:
            each = [str(pattern)] if os.path.exists(pattern) else list(braceexpand(str(pattern)))
        except UnbalancedBracesError:
            raise ImageError(f"{pattern}: braces do not match; write photos-{{000..099}}.tar or {{a,b}}.tar") from None
        for one in each:
            if is_remote(one):
                paths.append(fetch_photos(one, on_progress))
                continue
            # an existing path is never a pattern, even with brackets in its name
            found = [one] if os.path.exists(one) else sorted(glob.glob(one))
            if not found:
                raise ImageError(f"{one}: no such file or folder")
            paths += map(Path, found)
    return paths


def _index_files(path: Path) -> list[Photo]:
    if not path.is_dir():
        return [Photo(_key(path.name), path, 0, file_size(path))]
    found = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in image_suffixes() and not p.name.startswith("._") and not p.is_dir()]
    return [Photo(_key(p.relative_to(path).as_posix()), p, 0, file_size(p)) for p in found]


def file_size(path: Path) -> int:
    """Bytes of a regular file; -1 if there is none (reading it then raises)."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _index_tar(path: Path) -> list[Photo]:
    return [Photo(_key(key), path, found.offset, found.size, found.info) for key, found in index_tar(path, image_suffixes()).items()]


def _key(name: str) -> str:
    """A name that can be written as UTF-8: other bytes become escapes."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
