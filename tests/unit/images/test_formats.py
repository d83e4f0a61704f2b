"""Images of every mode and format, as they come: the same shown of a file and of what PIL made of it, and nothing hostile decoded."""

from __future__ import annotations

import io
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from sparse_vlm.images.decode import ImageError, decode_image, draft_image, image_suffixes, load_image, upright_rgb
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.images.preprocess import load_crop, preprocess
from sparse_vlm.utils.documents import LFS

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def colours() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))


def with_alpha(mode: str = "RGBA") -> Image.Image:
    image = colours().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def oriented(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


def transparent_shade() -> bytes:
    return encoded(Image.fromarray(np.repeat(RAMP[::32, :], 32, 0)), transparency=int(RAMP[32, 5]))


FILES = {
    "palette": lambda: encoded(colours().quantize(200)),
    "transparent palette": lambda: encoded(with_alpha().quantize(100)),
    "bilevel": lambda: encoded(colours().convert("1")),
    "bilevel TIFF": lambda: encoded(colours().convert("1"), "TIFF", compression="group4"),
    "RGBA": lambda: encoded(with_alpha()),
    "LA": lambda: encoded(with_alpha("LA")),
    "16 bits": lambda: encoded(Image.fromarray(RAMP)),
    "16 bits, one shade transparent": transparent_shade,
    "float": lambda: encoded(Image.fromarray(RAMP.astype(np.float32) / 65535), "TIFF"),
    "CMYK": lambda: encoded(colours().convert("CMYK"), "JPEG"),
    "CMYK TIFF": lambda: encoded(colours().convert("CMYK"), "TIFF"),
    "LAB": lambda: encoded(Image.new("LAB", (40, 30), (120, 20, 20)), "TIFF"),
    "on its side": lambda: oriented(colours()),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_picture_that_is_handed_over_is_shown_as_its_file_is(kind):
    data = FILES[kind]()
    shown = load = decode_image(data, kind)
    handed = [Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data)).copy()]
    if kind != "float":
        assert handed[0].mode != "RGB" or kind == "on its side"
    for image in handed:
        assert np.array_equal(upright_rgb(image), shown)
        assert preprocess(image, 56, (0.5,) * 3, (0.5,) * 3).equal(preprocess(load, 56, (0.5,) * 3, (0.5,) * 3))
    assert np.array_equal(upright_rgb(shown), shown), "turned once more"
    processors = pytest.importorskip("sparse_vlm.hf.image_processing")
    pixels = processors.SparseFormerImageProcessor(56)(handed[0], return_tensors="pt")["pixel_values"]
    assert pixels.equal(preprocess(load, 56, (0.5,) * 3, (0.5,) * 3))


def test_transparent_is_white_also_in_large_pictures(monkeypatch):
    whole = np.asarray(decode_image(FILES["RGBA"](), "logo"))
    rgba = np.asarray(with_alpha()).astype(float)
    alpha = rgba[..., 3:] / 255
    assert abs(whole - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1
    monkeypatch.setattr("sparse_vlm.images.decode._BAND", 7 * 80)
    assert np.array_equal(decode_image(FILES["RGBA"](), "logo"), whole)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_16_bits_keep_their_shades(form):
    assert np.array_equal(np.asarray(decode_image(encoded(Image.fromarray(RAMP), form), "ramp"))[..., 0], RAMP >> 8)


def test_white_is_zero_in_16_bits():
    data = encoded(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(np.asarray(decode_image(data, "ramp"))[..., 0], 255 - (RAMP >> 8))


def test_floats_go_from_black_to_white_or_are_refused():
    shades = np.asarray(decode_image(FILES["float"](), "ramp"))[..., 0]
    assert np.array_equal(shades, np.rint(RAMP.astype(np.float32) / 65535 * np.float32(255)))
    for values, why in ((RAMP.astype(np.float32), "from 0 to 65535"), (RAMP * np.float32("nan"), "from nan to nan")):
        with pytest.raises(ImageError, match=f"depth: float grey {why}"):
            decode_image(encoded(Image.fromarray(values), "TIFF"), "depth")
    with pytest.raises(ImageError, match="labels"):
        decode_image(encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "labels")
    with pytest.raises(ImageError, match="image 0"):
        preprocess(colours().convert("I"), 56, (0.5,) * 3, (0.5,) * 3)


def exif_block(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    directory = b"".join(struct.pack(f"{order}HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + b"\0\0\0\0"


UPRIGHT = (0x0112, 3, 1, b"\x06\0\0\0")


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (exif_block([UPRIGHT, (0x927C, 2, 4, b"\xff\xfe\xfd\0"), (0x9286, 5, 1, b"\xff\xff\xff\x7f")]), (60, 80)),
        (exif_block([(0x8825, 12, 9, b"\1\0\0\0"), UPRIGHT, (0x8769, 1, 1, b"\1\0\0\0")]), (60, 80)),
        (exif_block([(0x0112, 5, 1, b"\xff\0\0\0")]), (80, 60)),
        (exif_block([(0x0112, 2, 2, b"6\0\0\0")]), (80, 60)),
        (exif_block([(0x0112, 3, 1, b"\x63\0\0\0")]), (80, 60)),
        (b"Exif\0\0milk", (80, 60)),
        (b"Exif\0\0II*\0\xff\xff\xff\xff", (80, 60)),
    ],
)
def test_odd_exif_is_no_error(exif, size):
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(colours(), form, exif=exif)
        assert decode_image(data, "odd").size == draft_image(data, "odd", 20).size == size
        assert upright_rgb(Image.open(io.BytesIO(data))).size == size


def test_only_named_formats_are_decoded(tmp_path, monkeypatch):
    """PostScript under an image's name would start Ghostscript."""
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "photo.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ImageError, match=r"photo.jpg: not an image \(or in none of the formats JPEG"):
        load_image(tmp_path / "photo.jpg")
    assert not (tmp_path / "ran").exists()
    for form in ("ICO", "TGA", "PCX"):
        with pytest.raises(ImageError, match="not an image"):
            decode_image(encoded(colours(), form), "photo")


def test_suffixes_are_those_of_the_formats(tmp_path):
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".mpo", ".png", ".jp2", ".webp", ".tif"} <= image_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".ico"} & image_suffixes()
    for name in ("a.JFIF", "b.jp2", "c.txt", "._d.jpg"):
        (tmp_path / name).write_bytes(encoded(colours(), "JPEG2000" if name.endswith("jp2") else "JPEG"))
    assert [photo.key for photo in PhotoSet(tmp_path)] == ["a.JFIF", "b.jp2"]
    assert all(photo.load().size == (80, 60) for photo in PhotoSet(tmp_path))


@pytest.mark.parametrize("size", [(1, 60_000), (30_000, 2), (5000, 40)])
def test_strips_are_cropped_before_they_are_scaled(tmp_path, size):
    """As much of the image is seen as of one that is scaled whole."""
    across = np.linspace(0, 255, max(size))
    pixels = np.tile(across, (min(size), 1)) if size[0] > size[1] else np.tile(across[:, None], (1, min(size)))
    (tmp_path / "strip.png").write_bytes(encoded(Image.fromarray(pixels.astype(np.uint8))))
    tracemalloc.start()
    began = time.process_time()
    crop = load_crop(PhotoSet(tmp_path / "strip.png")[0], 64)
    assert time.process_time() - began < 5 and tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()
    assert crop.size == (64, 64)
    shown = np.asarray(crop)[..., 0].astype(int)
    span = 255 * min(size) / max(size)
    assert abs(shown - 127).max() <= span / 2 + 2


def test_a_strip_shows_what_the_whole_would():
    """The two ways of `preprocess` agree but for rounding, where both can be afforded."""
    image = colours().resize((700, 80))
    by_strip = np.asarray(load_both(image, 8)).astype(int)
    assert abs(by_strip - np.asarray(load_both(image, 9))).max() <= 1


def load_both(image: Image.Image, longest: int) -> Image.Image:
    import sparse_vlm.images.preprocess as module

    before, module.LONGEST = module.LONGEST, longest
    try:
        return module.resize_and_crop(image, 32)
    finally:
        module.LONGEST = before


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(kind: bytes, data: bytes) -> bytes:
    png = encoded(colours())
    return png[:33] + chunk(kind, data) + png[33:]


def hostile() -> dict[str, tuple[bytes, str]]:
    bomb = zlib.compress(bytes(100_000_000), 9)
    jpeg = encoded(colours(), "JPEG")
    large = encoded(Image.new("L", (9000, 9000)), "JPEG", progressive=True)
    scan = large[large.rindex(b"\xff\xda") : -2]
    return {
        "zTXt": (png_with(b"zTXt", b"k\0\0" + bomb), "damaged"),
        "iCCP": (png_with(b"iCCP", b"k\0\0" + bomb), "damaged"),
        "plain": (b"P3 90 90 255\n" + b"#\n" * 100, "plain text"),
        "scans": (large[:-2] + scan * 100 + b"\xff\xd9", "scans"),
        "exif": (jpeg[:2] + (b"\xff\xe1\0\x12Exif\0\0" + b"x" * 10) * 300 + jpeg[2:], "blocks of EXIF"),
        "lfs": (LFS + b"v1\noid sha256:0\nsize 3\n", "git-lfs pointer"),
        "empty": (b"", "not an image"),
        "no pixels": (b"P6 0 0 255\n", "pixels|not an image|damaged"),
        "cut": (encoded(colours(), "JPEG2000")[:300], "damaged|not an image"),
    }


@pytest.mark.parametrize("kind", ["zTXt", "iCCP", "plain", "scans", "exif", "lfs", "empty", "no pixels", "cut"])
def test_hostile_pictures_are_one_line(kind):
    data, why = hostile()[kind]
    began = time.process_time()
    with pytest.raises(ImageError, match=f"^photo: .*(?:{why})") as caught:
        decode_image(data, "photo")
    assert "\n" not in str(caught.value) and time.process_time() - began < 5


def test_heavy_formats_have_a_limit_of_their_own(monkeypatch):
    monkeypatch.setattr("sparse_vlm.images.decode.MAX_PIXELS", 80 * 60)
    assert decode_image(encoded(colours()), "photo").size == (80, 60)
    with pytest.raises(ImageError, match="photo: 80 x 60 pixels is more than"):
        decode_image(encoded(colours(), "WEBP"), "photo")


def test_animations_show_their_first_picture():
    frames = [Image.new("RGB", (40, 30), (0, number % 256, 0)) for number in range(300)]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert np.asarray(decode_image(data, form)).max() <= 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_odd_files_in_a_folder_are_named_and_never_waited_for(tmp_path):
    folder = tmp_path / "photos"
    (folder / "folder.jpg").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(encoded(colours(), "JPEG"))
    (folder / "b.jpg").symlink_to("/nonexistent")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "null.jpg").symlink_to("/dev/zero")
    (folder / "round").symlink_to(folder)
    said = {}
    for photo in PhotoSet(folder):
        try:
            said[photo.key] = photo.load().size
        except ImageError as error:
            said[photo.key] = str(error).partition(": ")[2]
    assert said.pop("a.jpg") == (80, 60) and sorted(said) == ["b.jpg", "loop.jpg", "null.jpg", "pipe.jpg"]
    assert said["b.jpg"] == "no such file" and said["pipe.jpg"] == said["null.jpg"] == "cannot be read (not a regular file)"
    with pytest.raises(ImageError, match="pipe.jpg: cannot be read"):
        load_image(folder / "pipe.jpg")


def test_a_path_that_is_there_is_no_pattern(tmp_path):
    for folder, colour in (("set[1]", 10), ("set1", 200)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "{a}.png").write_bytes(encoded(Image.new("RGB", (9, 9), (colour, 0, 0))))
    for pattern in ("set[1]", "set[1]/{a}.png"):
        assert [photo.load().getpixel((0, 0))[0] for photo in PhotoSet(tmp_path / pattern)] == [10]
    assert len(PhotoSet(str(tmp_path / "set[0-9]"))) == 1
