"""Photos: webdataset tars and image folders, with random access and one clear error for each way a picture can be bad.

Notable: a tar is indexed once by member offsets and then read by seeking, so that a training run can resume at any photo and an
evaluation can take every tenth one. Only the picture a caller asks for is decoded. Whoever makes it smaller anyway asks for a draft: a
JPEG decoder delivers a half, a quarter or an eighth of the sides at once, which spares most of what comes after reading the file's bits.
"""

from __future__ import annotations

import glob
import io
import json
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sparse_vlm.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # Pillow's own bomb limit: a quarter of a GiB of RGB
Box = tuple[float, float, float, float]


class PhotoError(UserError):
    """A picture that cannot be used; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Draft:
    """A picture that is to be made smaller, decoded at its size or at a fraction of it.

    Attributes:
        image: RGB, upright.
        size: (width, height) of the picture in full, upright.
        box: (left, top, right, bottom): where the picture lies in `image`, in its pixels; a side that is no multiple of the fraction ends
            within a pixel.
    """

    image: Image.Image
    size: tuple[int, int]
    box: Box


@dataclass(frozen=True)
class Photo:
    """One photo: where its bytes lie and what is known about it (`info`, the json beside it; empty for plain files).

    A size of -1 says that there is no such file.
    """

    key: str
    source: Path
    offset: int
    size: int
    info: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def read(self) -> bytes:
        """The encoded bytes."""
        with open(self.source, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)

    def load(self) -> Image.Image:
        """The decoded RGB picture, upright by its EXIF orientation.

        Raises:
            PhotoError: not there, not an image, truncated, or above `MAX_PIXELS`.
        """
        return decode_image(*self._named())

    def draft(self, at_least: int, longest: bool = False) -> Draft:
        """The picture for whoever makes it smaller; the arguments are `draft_image`'s.

        Raises:
            PhotoError: as `load`.
        """
        return draft_image(*self._named(), at_least, longest)

    def _named(self) -> tuple[bytes, str]:
        """The encoded bytes, and what to call the photo in messages."""
        # members of a tar stand behind a header
        name = f"{self.source.name}:{self.key}" if self.offset else str(self.source)
        try:
            return self.read(), name
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise PhotoError(f"{name}: {_why(error)}") from None


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode a picture to upright RGB; transparent pixels become white.

    Raises:
        PhotoError: with one line that names the picture and the reason.
    """
    image = _decode(data, name, None).image
    return image if type(image) is Image.Image else image.copy()  # one that holds no file


def draft_image(data: bytes, name: str, at_least: int, longest: bool = False) -> Draft:
    """Decode a picture for whoever makes it smaller: a JPEG at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size that suffices.

    Args:
        at_least: pixels that the shortest side must have, unless it has fewer in full.
        longest: the longest side must have them instead.

    Raises:
        PhotoError: as `decode_image`.
    """
    return _decode(data, name, at_least, longest)


def _decode(data: bytes, name: str, at_least: int | None, longest: bool = False) -> Draft:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PhotoError(f"{name}: {width} x {height} pixels is more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first")
            if at_least and longest:
                at_least = -(-at_least * min(width, height) // max(width, height))
            drafted = at_least and image.draft(None, (at_least, at_least))
            image.load()
    except UnidentifiedImageError:
        raise PhotoError(f"{name}: not an image (or in a format Pillow cannot read)") from None
    except Image.DecompressionBombError:
        raise PhotoError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first") from None
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        if isinstance(error, PhotoError):
            raise
        raise PhotoError(f"{name}: truncated or damaged image ({error})") from None
    where = _upright(image, (width, height), *drafted[1][2:]) if drafted else None
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return Draft(image, *(where or (image.size, (0, 0, *image.size))))


def _upright(image: Image.Image, size: tuple[int, int], right: float, bottom: float) -> tuple[tuple[int, int], Box]:
    """Size and box of a `Draft` after `ImageOps.exif_transpose`.

    Args:
        image: as it was decoded.
        size: in full, as it is stored.
        right, bottom: where the picture ends in `image`.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    (width, height), over_x, over_y = size, image.width - right, image.height - bottom
    if orientation in (5, 6, 7, 8):  # sides change places
        width, height, right, bottom, over_x, over_y = height, width, bottom, right, over_y, over_x
    left = over_x if orientation in (2, 3, 6, 7) else 0  # what was at the right is at the left
    top = over_y if orientation in (3, 4, 7, 8) else 0
    return (width, height), (left, top, left + right, top + bottom)


def load_image(path: str | Path) -> Image.Image:
    """Decode the picture in a file.

    Raises:
        PhotoError: also when there is no such file.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise PhotoError(f"{path}: {_why(error)}") from None
    return decode_image(data, name=str(path))


def _why(error: OSError | ValueError) -> str:
    """Why a file cannot be read."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


class PhotoSet(Sequence[Photo]):
    """Photos of tars and folders, in a stable order.

    Args:
        patterns: tar files, image folders, single pictures, glob patterns of them, URLs of tars, or `hf:ORG/NAME:SPLIT` for a data set of
            Hugging Face; each may hold braces, as `photos-{000..099}.tar`.
        on_progress: called with (what is being fetched, bytes or rows done, in total or 0).

    Raises:
        PhotoError: a pattern that matches nothing, or a file that is no tar.
        UserError: something that cannot be fetched.
    """

    def __init__(
        self, patterns: str | Path | Sequence[str | Path], on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
    ) -> None:
        if isinstance(patterns, (str, Path)):
            patterns = [patterns]
        self._photos: list[Photo] = []
        for path in _expand(patterns, on_progress):
            self._photos += _index_tar(path) if path.suffix == ".tar" else _index_files(path)
        if not self._photos:
            raise PhotoError(f"no photo in {', '.join(map(str, patterns))}")

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Photo:  # type: ignore[override]
        return self._photos[index]

    def __iter__(self) -> Iterator[Photo]:
        return iter(self._photos)


def _expand(patterns: Sequence[str | Path], on_progress: Callable[[str, int, int], None]) -> list[Path]:
    # not needed to open a picture, which is what most who import this module do
    from braceexpand import UnbalancedBracesError, braceexpand

    from sparse_vlm.remote import bring, is_remote

    paths: list[Path] = []
    for pattern in patterns:
        try:
            each = [str(pattern)] if Path(pattern).exists() else list(braceexpand(str(pattern)))
        except UnbalancedBracesError:
            raise PhotoError(f"{pattern}: braces do not match; write photos-{{000..099}}.tar or {{a,b}}.tar") from None
        for one in each:
            if is_remote(one):
                paths.append(bring(one, on_progress))
                continue
            found = sorted(glob.glob(one))
            if not found:
                raise PhotoError(f"{one}: no such file or folder")
            paths += map(Path, found)
    return paths


def _index_files(path: Path) -> list[Photo]:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return [Photo(p.relative_to(root).as_posix(), p, 0, p.stat().st_size) for p in files]


def _index_tar(path: Path) -> list[Photo]:
    members: dict[str, tuple[int, int]] = {}
    infos: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stem, _, suffix = member.name.rpartition(".")
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    members[stem] = (member.offset_data, member.size)
                elif suffix == "json":
                    stream = archive.extractfile(member)
                    infos[stem] = json.load(stream) if stream else {}
    except (tarfile.TarError, json.JSONDecodeError) as error:
        raise PhotoError(f"{path}: not a readable webdataset tar ({error})") from None
    return [Photo(key, path, offset, size, infos.get(key, {})) for key, (offset, size) in members.items()]
