"""Decode image files: bytes or a PIL image of any mode become upright RGB, and each way an image can be bad is one line of an error.

Notable: who scales an image down anyway asks for a draft: a JPEG decoder can deliver 1/2, 1/4 or 1/8 of the size directly, which skips most
of the work after entropy decoding.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import io
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sparse_vlm.errors import UserError
from sparse_vlm.utils.documents import LFS, NOT_FETCHED

# Decoded whatever a file's suffix is, if this Pillow can; no other format of Pillow's: its EPS reader starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc")
MAX_PIXELS = 89_478_485  # Pillow's own bomb limit: a quarter of a GiB of RGB
_COPIES = {"WEBP": 2, "JPEG2000": 2}  # images that the decoder of a format holds at a time; `MAX_PIXELS` is divided by it
_BAND = 1 << 22  # pixels that are composited on white at a time
MAX_EXIF = 256  # blocks, of at most 64 KB; Pillow joins them in time quadratic in their number
MAX_SCANNED = 64 * MAX_PIXELS  # pixels times scans of a JPEG, each of which visits all pixels; cameras write 1 scan, web tools 10
Box = tuple[float, float, float, float]


class ImageError(UserError):
    """An image that cannot be used; the message names it and the reason."""


@dataclass(frozen=True)
class Draft:
    """An image decoded at full size or at a fraction of it, to be scaled down.

    Attributes:
        image: RGB, upright.
        size: (width, height) at full size, upright.
        box: (left, top, right, bottom), the part of `image` that the whole image covers, in its pixels: not an integer where a side is no
            multiple of the fraction.
    """

    image: Image.Image
    size: tuple[int, int]
    box: Box


def load_image(path: str | Path) -> Image.Image:
    """Decode an image file to upright RGB.

    Raises:
        ImageError: no such file, or as `decode_image`.
    """
    path = Path(path)
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageError(f"{path}: {why_unreadable(error)}") from None
    return decode_image(data, name=str(path))


def read_file(path: Path, offset: int = 0, size: int = -1) -> bytes:
    """Read bytes of a regular file; pipes and devices are refused, since reading them may never end.

    Args:
        size: number of bytes; all that follow by default.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise IsADirectoryError if stat.S_ISDIR(mode) else OSError(errno.EINVAL, "not a regular file")
    with open(path, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def why_unreadable(error: OSError | ValueError) -> str:
    """The reason why a file could not be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, not an image"
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow can decode; HEIF if pillow-heif is installed."""
    Image.init()
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif

        pillow_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """File name suffixes of `formats`, in lower case, with the dot."""
    known = {*formats(), "MPO"}  # JPEGs of several images
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known)


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image to upright RGB; transparent pixels become white.

    Raises:
        ImageError: not an image, damaged, or larger than the limits above.
    """
    image = _decode(data, name, None).image
    return image if type(image) is Image.Image else image.copy()  # a plain image, without the open file


def draft_image(data: bytes, name: str, at_least: int, longest: bool = False) -> Draft:
    """Decode an image that will be scaled down: a JPEG at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size that suffices.

    Args:
        at_least: pixels that the shortest side must keep (all of them if it has fewer).
        longest: apply `at_least` to the longest side.

    Raises:
        ImageError: as `decode_image`.
    """
    return _decode(data, name, at_least, longest)


def _decode(data: bytes, name: str, at_least: int | None, longest: bool = False) -> Draft:
    if data.startswith(LFS):
        raise ImageError(f"{name}: {NOT_FETCHED}")
    if data[:2] in (b"P1", b"P2", b"P3"):  # Pillow's text reader takes minutes for a few megabytes of comments
        raise ImageError(f"{name}: a PPM in plain text; save it in binary (P4, P5, P6), or as PNG")
    if data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and "HEIF" not in formats():
        raise ImageError(f"{name}: a HEIC image; pip install 'sparse-vlm[heif]' to read it, or save it as JPEG")
    if data.count(b"Exif\0\0") > MAX_EXIF:
        raise ImageError(f"{name}: {data.count(b'Exif'):,} blocks of EXIF; save it anew without them")
    try:
        with _quiet():
            image = Image.open(io.BytesIO(data), formats=formats())
            width, height = image.size
            most = MAX_PIXELS // _COPIES.get(image.format or "", 1)
            if width * height > most:
                raise ImageError(f"{name}: {width} x {height} pixels is more than {most / 1e6:.0f} megapixels; make it smaller first")
            scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            if scans * width * height > MAX_SCANNED:
                raise ImageError(f"{name}: a JPEG of {width} x {height} pixels in {scans:,} scans; save it anew")
            if at_least and longest:
                at_least = -(-at_least * min(width, height) // max(width, height))
            drafted = at_least and image.draft(None, (at_least, at_least))
            image.load()
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not an image (or in none of the formats {', '.join(formats())})") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller first") from None
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        raise _damaged(name, error) from None
    where = _upright(_orientation(image), image.size, (width, height), *drafted[1][2:]) if drafted else None
    image = upright_rgb(image, name)
    return Draft(image, *(where or (image.size, (0, 0, *image.size))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Pillow's warnings about large images, which are refused here, and about metadata."""
    with warnings.catch_warnings():
        for category in (Image.DecompressionBombWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"PIL\.")
        yield


def _damaged(name: str, error: Exception) -> ImageError:
    if isinstance(error, MemoryError):
        return ImageError(f"{name}: does not fit into memory; make it smaller first")
    return ImageError(f"{name}: truncated or damaged image ({error or type(error).__name__})")


# EXIF orientation -> the transposition that makes the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """A PIL image of any mode as upright RGB: rotated by its EXIF orientation, transparent pixels white.

    16-bit grey keeps its upper 8 bits; float grey ranges from 0 (black) to 1 (white). Other float ranges and 32-bit integers are refused,
    because their white level is unknown.

    Args:
        name: for messages.

    Returns:
        The same object if nothing has to be changed.

    Raises:
        ImageError: it cannot be decoded, has no pixels, or its white level is unknown.
    """
    try:
        image.load()
        if not (image.width and image.height):
            raise ImageError(f"{name}: has no pixels ({image.width} x {image.height})")
        turn = _TURNS.get(_orientation(image))
        rgb = _rgb(image, name)
        if turn is not None:
            rgb = rgb.transpose(turn)
            rgb.info = {}  # drops the orientation, which is applied now
    except ImageError:
        raise
    except Exception as error:  # as in `_decode`: an image from the caller may not be decoded yet
        raise _damaged(name, error) from None
    return rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    try:
        with _quiet():
            found = image.getexif().get(ExifTags.Base.Orientation)
        return found if found in _TURNS else 1
    except Exception:  # damaged metadata makes Pillow raise nearly anything; the image itself may be fine
        return 1


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode[0] in "IF":
        image = _grey(image, name)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha, which Pillow converts only to its own straight mode
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite on white, some rows at a time, so that a large image is not held three times."""
    rgb, rows = Image.new("RGB", image.size), max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        some = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", some.size, "white")
        white.alpha_composite(some)
        rgb.paste(white.convert("RGB"), (0, top))
    return rgb


def _grey(image: Image.Image, name: str) -> Image.Image:
    """8-bit grey of an image with more bits a pixel; with alpha if one value is marked transparent."""
    values, clear = np.asarray(image), image.info.get("transparency")
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:
            raise ImageError(f"{name}: float grey from {low:g} to {high:g}, expected 0 to 1; scale it, or save it with 8 bits")
        shades = np.rint(values * np.float32(255)).astype(np.uint8)
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # some versions of Pillow read 16 bits as `I`
        raise ImageError(f"{name}: 32-bit grey, whose white level is unknown; save it with 8 or 16 bits")
    else:
        shades = (values >> (tags.get(258, (16,))[0] - 8)).astype(np.uint8)
        if tags.get(262) == 0:  # white is zero; Pillow ignores this for 16 bits
            shades = 255 - shades
    grey = Image.fromarray(shades)
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, np.uint8(0), np.uint8(255))))
    return grey


def _upright(orientation: int, decoded: tuple[int, int], size: tuple[int, int], right: float, bottom: float) -> tuple[tuple[int, int], Box]:
    """Size and box of a `Draft` after it was made upright.

    Args:
        decoded: size of the draft before that.
        size: full size before that.
        right, bottom: where the image ends in the draft, before that.
    """
    (width, height), over_x, over_y = size, decoded[0] - right, decoded[1] - bottom
    if orientation in (5, 6, 7, 8):  # width and height are swapped
        width, height, right, bottom, over_x, over_y = height, width, bottom, right, over_y, over_x
    left = over_x if orientation in (2, 3, 6, 7) else 0  # right becomes left
    top = over_y if orientation in (3, 4, 7, 8) else 0
    return (width, height), (left, top, left + right, top + bottom)
