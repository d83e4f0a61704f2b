"""Files that become pixels: drafts of large JPEGs, the pixels and embeddings that come of them, and reading by several threads."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.nn.functional import cosine_similarity

from sparse_vlm import SparseFormer
from sparse_vlm.images.decode import ImageError, decode_image, draft_image, load_image
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import OVERSAMPLING, Preprocessor, load_crop, preprocess, resize_and_crop

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
BOUND = 0.999  # of the cosine between embeddings of a draft and of the whole image, as lab/image-decoding.md says

PREPROCESSOR = Preprocessor(32, (0.5,) * 3, (0.25,) * 3)


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, options.pop("format", "JPEG"), **{"quality": 92, **options})
    return stream.getvalue()


def file(folder: Path, data: bytes, name: str = "photo.jpg") -> Photo:
    (folder / name).write_bytes(data)
    return Photo(name, folder / name, 0, len(data))


def enlarged(name: str, short: int) -> Image.Image:
    """An example whose shortest side has so many pixels; the other one is no multiple of 8 either."""
    image = load_image(EXAMPLES / name)
    times = short / min(image.size)
    width, height = (int(side * times) for side in image.size)
    return image.resize((width | 1, height | 1), Image.Resampling.LANCZOS)


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, so that a pixel tells where it is from."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(across, 90)], -1).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("short", "at_least", "scale"),
    [(100, 101, 1), (100, 100, 1), (199, 100, 1), (200, 100, 2), (401, 100, 4), (799, 100, 4), (3000, 100, 8)],
)
def test_draft_is_the_smallest_that_suffices(short, at_least, scale):
    draft = draft_image(jpeg(ramp(short + 37, short)), "ramp", at_least)
    assert draft.size == (short + 37, short)
    assert draft.image.size == (-(-(short + 37) // scale), -(-short // scale))
    assert draft.box == (0, 0, (short + 37) / scale, short / scale)


@pytest.mark.parametrize("orientation", range(10))
def test_draft_lies_as_the_whole_picture_does(orientation):
    """Sides end within a pixel of the draft (813 and 605 are no multiples of 4), at whichever side EXIF turns them to."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = jpeg(ramp(813, 605), exif=exif)
    draft, whole = draft_image(data, "ramp", 150), decode_image(data, "ramp")
    assert draft.size == whole.size == ((605, 813) if orientation in (5, 6, 7, 8) else (813, 605))
    assert max(draft.image.size) == 204
    small = draft.image.resize((60, 60), Image.Resampling.BICUBIC, box=draft.box)
    expected = whole.resize((60, 60), Image.Resampling.BICUBIC)
    off = np.asarray(small).astype(int) - np.asarray(expected)
    # a shift of half a pixel of the draft would be 0.6 levels of the ramp everywhere
    assert abs(off).max() <= 3 and abs(off[5:-5, 5:-5].mean((0, 1))).max() < 0.2


def test_pixels_of_small_pictures_do_not_depend_on_the_way(tmp_path):
    for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg"):
        data = (EXAMPLES / name).read_bytes()
        size = min(load_image(EXAMPLES / name).size) // (2 * OVERSAMPLING) + 1
        for one in (size, 224):
            assert np.array_equal(load_crop(file(tmp_path, data), one), resize_and_crop(decode_image(data, name), one))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_other_formats_are_decoded_whole(tmp_path, form):
    image = enlarged("chelsea.jpg", 700)
    data = jpeg(image, format=form)
    assert np.array_equal(load_crop(file(tmp_path, data), 64), resize_and_crop(decode_image(data, "photo"), 64))


@pytest.mark.parametrize("mode", ["L", "CMYK", "progressive", "4:4:4", "MPO"])
def test_every_kind_of_jpeg_has_a_draft(tmp_path, mode):
    image = enlarged("coffee.jpg", 1025)
    if mode == "MPO":
        data = jpeg(image, format="MPO", save_all=True, append_images=[image])
    else:
        more = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(mode, {})
        data = jpeg(image if more else image.convert(mode), **more)
    draft = draft_image(data, "photo", 512)
    assert draft.image.mode == "RGB" and min(draft.image.size) == 513
    off = np.asarray(load_crop(file(tmp_path, data), 224)).astype(int) - np.asarray(resize_and_crop(decode_image(data, "photo"), 224))
    assert abs(off).mean() < 1.5


def test_embeddings_of_drafts_are_those_of_whole_pictures(tmp_path):
    tower = SparseFormer.from_pretrained("tiny")
    config = tower.config
    for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg"):
        for short in (905, 1801):  # a half and a quarter, and hardly more than is needed
            data = jpeg(enlarged(name, short))
            crops = [load_crop(file(tmp_path, data), config.image_size), resize_and_crop(decode_image(data, name), config.image_size)]
            assert not np.array_equal(*crops), "no draft was made"
            with torch.no_grad():
                embeds = tower(preprocess(crops, config.image_size, config.image_mean, config.image_std)).image_embeds
            assert cosine_similarity(embeds[0], embeds[1], dim=0) >= BOUND


def test_whole_pictures_hold_no_file():
    data = jpeg(ramp(40, 30))
    assert type(decode_image(data, "ramp")) is Image.Image


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_bad_files_are_refused_as_ever(tmp_path, options, monkeypatch):
    data = jpeg(enlarged("chelsea.jpg", 1000), **options)
    for cut in (len(data) // 3, len(data) - len(data) // 20):
        with pytest.raises(ImageError, match=r"photo.jpg: truncated or damaged image"):
            load_crop(file(tmp_path, data[:cut]), 64)
    with pytest.raises(ImageError, match=r"gone.jpg: no such file"):
        load_crop(Photo("gone", tmp_path / "gone.jpg", 0, 1), 64)
    monkeypatch.setattr("sparse_vlm.images.decode.MAX_PIXELS", 1000 * 1000)
    with pytest.raises(ImageError, match="1 megapixels; make it smaller first"):
        load_crop(file(tmp_path, data[:5000]), 64)  # before what is cut off is missed


@pytest.mark.parametrize("threads", [1, 3])
def test_several_are_read_in_order(tmp_path, threads):
    photos = [file(tmp_path, jpeg(Image.new("RGB", (60, 50), (10 * i, 0, 0))), f"{i}.jpg") for i in range(8)]
    crops = PREPROCESSOR.load_all(photos, threads)
    assert [round(np.asarray(crop)[16, 16, 0] / 10) for crop in crops] == list(range(8))
    assert all(crop.size == (32, 32) for crop in crops) and PREPROCESSOR.load_all([], threads) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_bad_one_among_several(tmp_path, threads):
    photos = [file(tmp_path, jpeg(ramp(40, 40)), f"{i}.jpg") for i in range(5)]
    for i in (1, 3):
        photos[i].source.write_bytes(b"milk")
    with pytest.raises(ImageError, match=r"1.jpg: not an image"):
        PREPROCESSOR.load_all(photos, threads)
    told: list[tuple[int, str]] = []
    crops = PREPROCESSOR.load_all(photos, threads, lambda place, error: told.append((place, str(error))))
    assert [crop is None for crop in crops] == [False, True, False, True, False]
    assert [(place, "not an image" in why) for place, why in told] == [(1, True), (3, True)]


def test_threads_work_at_once(tmp_path, monkeypatch):
    """Two that wait for each other would never meet in one thread."""
    meeting = threading.Barrier(2, timeout=20)
    read = Photo.read

    def reads(photo: Photo) -> bytes:
        meeting.wait()
        return read(photo)

    monkeypatch.setattr(Photo, "read", reads)
    photos = [file(tmp_path, jpeg(ramp(40, 40)), f"{i}.jpg") for i in range(2)]
    assert len(PREPROCESSOR.load_all(photos, 2)) == 2
