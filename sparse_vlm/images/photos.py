"""Photos: webdataset tars and image folders, with random access and one clear error for each way an image can be bad.

Notable: a tar is indexed once by member offsets and then read by seeking, so that a training run can resume at any photo and an
evaluation can take every tenth one. Only the image a caller asks for is decoded. Whoever makes it smaller anyway asks for a draft: a
JPEG decoder delivers a half, a quarter or an eighth of the sides at once, which spares most of what comes after reading the file's bits.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sparse_vlm.errors import UserError
from sparse_vlm.images.tars import index_tar
from sparse_vlm.utils.documents import LFS, NOT_FETCHED

# What is decoded, whatever a file is called, where this Pillow can. No other of its formats: that of EPS starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
MAX_PIXELS = 89_478_485  # Pillow's own bomb limit: a quarter of a GiB of RGB
_OF_PIXELS = {"WEBP": 2, "JPEG2000": 2}  # formats whose decoders hold an image several times: this part of `MAX_PIXELS`
_AT_ONCE = 1 << 22  # pixels
MAX_EXIF = 256  # blocks, of 64 KB at most, which Pillow puts together in a time that grows with the square of their number
MAX_SCANNED = 64 * MAX_PIXELS  # pixels times scans of a JPEG, each of which goes over all pixels; cameras write 1 scan, the web 10
Box = tuple[float, float, float, float]


class PhotoError(UserError):
    """An image that cannot be used; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Draft:
    """An image that is to be made smaller, decoded at its size or at a fraction of it.

    Attributes:
        image: RGB, upright.
        size: (width, height) of the image in full, upright.
        box: (left, top, right, bottom): where the image lies in `image`, in its pixels; a side that is no multiple of the fraction ends
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
        return read_file(self.source, self.offset, self.size)

    def load(self) -> Image.Image:
        """The decoded RGB image, upright by its EXIF orientation.

        Raises:
            PhotoError: not there, not an image, truncated, or above `MAX_PIXELS`.
        """
        return decode_image(*self._named())

    def draft(self, at_least: int, longest: bool = False) -> Draft:
        """The image for whoever makes it smaller; the arguments are `draft_image`'s.

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


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """What the files of `formats` are called, in lower case, with their full stop."""
    known = {*formats(), "MPO"}  # JPEGs of several images
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to upright RGB; transparent pixels become white.

    Raises:
        PhotoError: with one line that names the image and the reason.
    """
    image = _decode(data, name, None).image
    return image if type(image) is Image.Image else image.copy()  # one that holds no file


def draft_image(data: bytes, name: str, at_least: int, longest: bool = False) -> Draft:
    """Decode an image for whoever makes it smaller: a JPEG at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size that suffices.

    Args:
        at_least: pixels that the shortest side must have, unless it has fewer in full.
        longest: the longest side must have them instead.

    Raises:
        PhotoError: as `decode_image`.
    """
    return _decode(data, name, at_least, longest)


def _decode(data: bytes, name: str, at_least: int | None, longest: bool = False) -> Draft:
    if data.startswith(LFS):
        raise PhotoError(f"{name}: {NOT_FETCHED}")
    if data[:2] in (b"P1", b"P2", b"P3"):  # Pillow's reader of numbers in text takes minutes for some megabytes of comments
        raise PhotoError(f"{name}: a PPM in plain text; save it in binary (P4, P5, P6), or as PNG")
    if data.count(b"Exif\0\0") > MAX_EXIF:
        raise PhotoError(f"{name}: {data.count(b'Exif'):,} blocks of EXIF; save it anew without them")
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=formats())
            width, height = image.size
            most = MAX_PIXELS // _OF_PIXELS.get(image.format or "", 1)
            if width * height > most:
                raise PhotoError(f"{name}: {width} x {height} pixels is more than {most / 1e6:.0f} megapixels; make it smaller first")
            scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            if scans * width * height > MAX_SCANNED:
                raise PhotoError(f"{name}: a JPEG of {width} x {height} pixels in {scans:,} scans; save it anew")
            if at_least and longest:
                at_least = -(-at_least * min(width, height) // max(width, height))
            drafted = at_least and image.draft(None, (at_least, at_least))
            image.load()
    except UnidentifiedImageError:
        raise PhotoError(f"{name}: not an image (or in none of the formats {', '.join(formats())})") from None
    except Image.DecompressionBombError:
        raise PhotoError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first") from None
    except PhotoError:
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        raise _damaged(name, error) from None
    where = _upright(_orientation(image), image.size, (width, height), *drafted[1][2:]) if drafted else None
    image = upright_rgb(image, name)
    return Draft(image, *(where or (image.size, (0, 0, *image.size))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what Pillow says of images that are refused, and of metadata that nobody reads."""
    with warnings.catch_warnings():
        for category in (Image.DecompressionBombWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"PIL\.")
        yield


def _damaged(name: str, error: Exception) -> PhotoError:
    if isinstance(error, MemoryError):
        return PhotoError(f"{name}: does not fit into memory; make it smaller first")
    return PhotoError(f"{name}: truncated or damaged image ({error or type(error).__name__})")


# What turns an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image, name: str = "the picture") -> Image.Image:
    """What is shown of a PIL image of any mode, the same whether it comes from one of our files or is handed over: RGB, upright by its
    EXIF orientation, transparent pixels white.

    16-bit grey is shown by its upper 8 bits, float grey from 0 (black) to 1 (white). Other ranges of floats, and integers of 32 bits, are
    refused: which value is white is known to nobody.

    Args:
        name: for messages.

    Returns:
        The very image where nothing is to be done.

    Raises:
        PhotoError: it cannot be decoded, has no pixels, or shades of an unknown range.
    """
    try:
        image.load()
        if not (image.width and image.height):
            raise PhotoError(f"{name}: has no pixels ({image.width} x {image.height})")
        turn = _TURNS.get(_orientation(image))
        rgb = _rgb(image, name)
        if turn is not None:
            rgb = rgb.transpose(turn)
            rgb.info = {}  # the orientation of what it was
    except PhotoError:
        raise
    except Exception as error:  # as in `_decode`: images that are handed over may not be decoded yet
        raise _damaged(name, error) from None
    return rgb


def _orientation(image: Image.Image) -> int:
    """Of EXIF, 1 to 8; 1 where there is none that can be read."""
    try:
        with _quiet():
            found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in _TURNS else 1
    except Exception:  # whatever a damaged block of metadata makes Pillow raise: the image itself can be shown
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode[0] in "IF":
        image = _grey(image, name)
    if image.mode in ("La", "RGBa"):  # colours times alpha, of which nothing else is made
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """RGB, some rows at a time, so that a large image is not held three times."""
    rgb, rows = Image.new("RGB", image.size), max(1, _AT_ONCE // image.width)
    for top in range(0, image.height, rows):
        some = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", some.size, "white")
        white.alpha_composite(some)
        rgb.paste(white.convert("RGB"), (0, top))
    return rgb


def _grey(image: Image.Image, name: str) -> Image.Image:
    """8-bit grey, with alpha where one shade is transparent, of an image whose shades have more bits."""
    values, clear = np.asarray(image), image.info.get("transparency")
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise PhotoError(f"{name}: float grey from {low:g} to {high:g}; shades are known from 0 to 1: scale it, or save it with 8 bits")
        shades = np.rint(values * np.float32(255)).astype(np.uint8)
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # as which some versions of Pillow read 16 bits
        raise PhotoError(f"{name}: grey of 32 bits, of which nobody says which is white; save it with 8 or 16 bits")
    else:
        shades = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
        if tags.get(262) == 0:  # white is zero, which Pillow passes over for 16 bits
            shades = 255 - shades
    grey = Image.fromarray(shades)
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255))))
    return grey


def _upright(orientation: int, decoded: tuple[int, int], size: tuple[int, int], right: float, bottom: float) -> tuple[tuple[int, int], Box]:
    """Size and box of a `Draft` after it was turned.

    Args:
        decoded: size of the draft, as it is stored.
        size: in full, as it is stored.
        right, bottom: where the image ends in the draft.
    """
    (width, height), over_x, over_y = size, decoded[0] - right, decoded[1] - bottom
    if orientation in (5, 6, 7, 8):  # sides change places
        width, height, right, bottom, over_x, over_y = height, width, bottom, right, over_y, over_x
    left = over_x if orientation in (2, 3, 6, 7) else 0  # what was at the right is at the left
    top = over_y if orientation in (3, 4, 7, 8) else 0
    return (width, height), (left, top, left + right, top + bottom)


def photo_of(path: Path) -> Photo:
    """The photo in a file of its own; whether there is one shows when it is read."""
    return Photo(path.name, path, 0, file_size(path))


def load_image(path: str | Path) -> Image.Image:
    """Decode the image in a file.

    Raises:
        PhotoError: also when there is no such file.
    """
    path = Path(path)
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise PhotoError(f"{path}: {_why(error)}") from None
    return decode_image(data, name=str(path))


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Bytes of a regular file: a pipe would wait for somebody to write, and a device may never end.

    Args:
        size: all that follow unless given.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise IsADirectoryError if stat.S_ISDIR(mode) else OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


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
        patterns: tar files, image folders, single images, glob patterns of them, URLs of tars, or `hf:ORG/NAME:SPLIT` for a data set of
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
            self._photos += _index_tar(path) if path.suffix.lower() == ".tar" and not path.is_dir() else _index_files(path)
        if not self._photos:
            raise PhotoError(f"no photo in {', '.join(map(str, patterns))}")

    def __len__(self) -> int:
        return len(self._photos)

    def __getitem__(self, index: int) -> Photo:  # type: ignore[override]
        return self._photos[index]

    def __iter__(self) -> Iterator[Photo]:
        return iter(self._photos)


def _expand(patterns: Sequence[str | Path], on_progress: Callable[[str, int, int], None]) -> list[Path]:
    # not needed to open an image, which is what most who import this module do
    from braceexpand import UnbalancedBracesError, braceexpand

    from sparse_vlm.images.remote import bring, is_remote

    paths: list[Path] = []
    for pattern in patterns:
        try:
            each = [str(pattern)] if os.path.exists(pattern) else list(braceexpand(str(pattern)))
        except UnbalancedBracesError:
            raise PhotoError(f"{pattern}: braces do not match; write photos-{{000..099}}.tar or {{a,b}}.tar") from None
        for one in each:
            if is_remote(one):
                paths.append(bring(one, on_progress))
                continue
            # what is there is meant, whatever brackets its name holds
            found = [one] if os.path.exists(one) else sorted(glob.glob(one))
            if not found:
                raise PhotoError(f"{one}: no such file or folder")
            paths += map(Path, found)
    return paths


def _index_files(path: Path) -> list[Photo]:
    if not path.is_dir():
        return [Photo(_key(path.name), path, 0, file_size(path))]
    found = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in image_suffixes() and not p.name.startswith("._") and not p.is_dir()]
    return [Photo(_key(p.relative_to(path).as_posix()), p, 0, file_size(p)) for p in found]


def file_size(path: Path) -> int:
    """Bytes of a regular file; -1 where there is none, which reading it says."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def _index_tar(path: Path) -> list[Photo]:
    return [Photo(_key(key), path, found.offset, found.size, found.info) for key, found in index_tar(path, image_suffixes()).items()]


def _key(name: str) -> str:
    """A name as text that can be written: bytes that are no UTF-8 become escapes."""
    return name.encode("utf-8", "surrogatepass").decode("utf-8", "backslashreplace")
