"""Whole images: what a tower is given of images of any shape, alone, in a batch, in a VLM, in training and in hosts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_vlm import ask, photo, save_llm, save_tower, save_whole_tower, stir, whole_config
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, LlavaForConditionalGeneration

from sparse_vlm import VLM, SparseFormer
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import Inputs, Preprocessor, lay_out, preprocess, resize_and_crop
from sparse_vlm.roi import sizes_on

SHAPES = [(90, 60), (40, 96), (200, 30), (1, 2000), (8, 8), (300, 300), (1000, 100)]  # (width, height)
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # canvases of other sizes round coordinates otherwise


@pytest.fixture(scope="module", params=[False, True], ids=["crops", "looks"])
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SparseFormer:
    return SparseFormer.from_pretrained(save_whole_tower(tmp_path_factory.mktemp("tower"), looks=request.param))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp("vlm")
    vlm = VLM.build(save_whole_tower(folder / "tower"), save_llm(folder / "llm"), dtype=torch.float32)
    stir(vlm, 0.3)
    return vlm


def prepare() -> Preprocessor:
    return Preprocessor.of(whole_config())


def jpeg(path: Path, image: Image.Image, **options: Any) -> Photo:
    image.save(path, "JPEG", quality=92, **options)
    return Photo(path.name, path, 0, path.stat().st_size)


@torch.no_grad()
def encode(tower: SparseFormer, inputs: Inputs) -> torch.Tensor:
    return tower(inputs.pixels, image_sizes=inputs.image_sizes).last_hidden_state


# ---- one image


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((90, 60), (90, 60)),
        ((96, 96), (96, 96)),
        ((192, 96), (96, 48)),
        ((8, 8), (8, 8)),
        ((1, 2000), (1, 96)),
        ((1000, 100), (96, 10)),
        ((5000, 3), (96, 1)),
    ],
)
def test_an_image_keeps_its_aspect_and_is_never_enlarged(size: tuple[int, int], seen: tuple[int, int]) -> None:
    scaled = prepare().scale(Image.new("RGB", size, "red"))
    assert scaled.size == seen
    assert prepare().scale(scaled) is scaled, "what is scaled already stays as it is"
    inputs = prepare()(scaled, square=True)
    assert inputs.pixels.shape == (1, 3, 96, 96) and inputs.image_sizes.tolist() == [[seen[1], seen[0]]]


def test_a_scaled_image_is_antialiased_and_normalised() -> None:
    image = photo(300, 150)
    inputs = prepare()(image)
    expected = np.asarray(image.resize((96, 48), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    mean, std = (np.float32(values)[:, None, None] for values in (whole_config().image_mean, whole_config().image_std))
    assert torch.allclose(inputs.pixels[0, :, :48, :96], torch.from_numpy((expected - mean) / std), atol=1e-5)


def test_a_crop_is_what_it_was() -> None:
    config = replace(whole_config(), fit="crop", image_size=64)
    image = photo(90, 70)
    inputs = Preprocessor.of(config)([image])
    assert inputs.image_sizes is None
    assert torch.equal(inputs.pixels, preprocess(image, 64, config.image_mean, config.image_std))
    assert np.array_equal(Preprocessor.of(config).scale(image), resize_and_crop(image, 64))
    assert Preprocessor.of(whole_config(), "crop").fit == "crop"


def test_a_batch_has_the_smallest_canvas_that_holds_it() -> None:
    small, wide = photo(20, 30), photo(200, 60)
    assert prepare()([small]).pixels.shape == (1, 3, 64, 32)
    inputs = prepare()([small, wide])
    assert inputs.pixels.shape == (2, 3, 64, 96) and inputs.image_sizes.tolist() == [[30, 20], [29, 96]]
    assert (inputs.pixels[0, :, 30:] == 0).all() and (inputs.pixels[0, :, :, 20:] == 0).all()


def test_sizes_are_read_from_a_canvas_that_came_without_them() -> None:
    images = [photo(*size) for size in SHAPES] + [Image.new("RGB", (50, 20), (102, 127, 153))]  # that of the mean colour, rounded
    for square in (False, True):
        inputs = prepare()(images, square=square)
        assert torch.equal(sizes_on(inputs.pixels), inputs.image_sizes)
    assert sizes_on(torch.zeros(1, 3, 32, 48)).tolist() == [[32, 48]], "a canvas of zeros is full"
    assert sizes_on(inputs.pixels, "crop") is None


# ---- the tower


def test_tokens_do_not_depend_on_who_shares_the_batch(tower: SparseFormer) -> None:
    images = [photo(*size, seed=seed) for seed, size in enumerate(SHAPES)]
    together = encode(tower, prepare()(images))
    assert together.shape == (len(images), 8, 64) and together.isfinite().all()
    square = encode(tower, prepare()(images, square=True))
    torch.testing.assert_close(square, together, **CLOSE)
    for image, tokens in zip(images, together, strict=True):
        torch.testing.assert_close(encode(tower, prepare()(image))[0], tokens, **CLOSE)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_nothing_beyond_an_image_matters(tower: SparseFormer) -> None:
    inputs = prepare()([photo(77, 41), photo(31, 90)], square=True)
    noisy = 3 * torch.randn(inputs.pixels.shape, generator=torch.Generator().manual_seed(0))
    for canvas, image, (height, width) in zip(noisy, inputs.pixels, inputs.image_sizes.tolist(), strict=True):
        canvas[:, :height, :width] = image[:, :height, :width]
    torch.testing.assert_close(encode(tower, Inputs(noisy, inputs.image_sizes)), encode(tower, inputs), **CLOSE)
    without = tower(noisy).last_hidden_state
    assert (without - encode(tower, inputs)).abs().max() > 0.05, "without sizes the noise is part of the image"


def test_an_image_on_a_canvas_is_the_image_itself() -> None:
    """Of a tower without a convolution, whose padding is at the canvas's border."""
    torch.manual_seed(0)
    tower = SparseFormer(whole_config(looks=False)).eval()
    image = prepare().pixels(photo(71, 45))
    with torch.no_grad():
        alone = tower(image[None]).last_hidden_state
    torch.testing.assert_close(encode(tower, lay_out([image], 96, square=True)), alone, **CLOSE)


def test_cells_tile_a_panorama(tower: SparseFormer) -> None:
    inputs = prepare()([photo(1000, 100), photo(1, 2000)])
    cells = tower.first_cells(*inputs)
    assert cells.shape == (2, 7, 4) and (cells >= 0).all() and (cells <= 1 + 1e-6).all()
    areas = (cells[..., 2:] - cells[..., :2]).prod(-1)
    torch.testing.assert_close(areas.sum(1), torch.ones(2))
    narrow = tower(inputs.pixels, image_sizes=inputs.image_sizes, num_tokens=4).rois
    assert narrow.shape == (2, 4, 4)


# ---- files


def test_a_large_photo_is_decoded_as_a_draft(tmp_path: Path) -> None:
    """40 megapixels: an eighth of its sides is all that is ever in memory, and the result is that of the whole."""
    stored = jpeg(tmp_path / "large.jpg", photo(125, 80).resize((8000, 5000), Image.Resampling.BICUBIC))
    assert stored.draft(2 * 96, longest=True).image.size == (1000, 625)
    started = time.perf_counter()
    seen = prepare().load(stored)
    assert time.perf_counter() - started < 5
    whole = prepare().scale(stored.load())
    assert seen.size == whole.size == (96, 60)
    assert np.abs(np.asarray(seen, int) - np.asarray(whole, int)).mean() < 1.5


def test_a_long_photo_is_drafted_by_its_longest_side(tmp_path: Path) -> None:
    stored = jpeg(tmp_path / "pan.jpg", photo(4000, 400))
    assert stored.draft(192, longest=True).image.size == (500, 50)
    assert stored.draft(192).image.size == (2000, 200)
    assert prepare().load(stored).size == (96, 10)


def test_a_photo_is_upright(tmp_path: Path) -> None:
    image = photo(160, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    stored = jpeg(tmp_path / "turned.jpg", image, exif=exif)
    inputs = prepare()(stored)
    assert inputs.image_sizes.tolist() == [[96, 48]]
    upright = jpeg(tmp_path / "upright.jpg", image.transpose(Image.Transpose.ROTATE_270))
    assert (inputs.pixels - prepare()(upright).pixels).abs().mean() < 0.1


def test_files_and_images_share_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photo(50, 70).save(path)
    stored = Photo("a", path, 0, path.stat().st_size)
    other = photo(30, 20, seed=1)
    inputs = prepare()([other, stored, other])
    assert torch.equal(inputs.pixels, prepare()([other, photo(50, 70), other]).pixels)


# ---- a VLM, and transformers


def shown(vlm: VLM) -> list[list[dict]]:
    """Conversations about one image, two, and none, of many shapes."""
    a, b, c = photo(90, 60), photo(40, 200, 1), photo(8, 8, 2)
    return [ask("What?", a), ask("And these?", b, c), ask("Hello?"), ask("Why?", photo(500, 40, 3))]


def test_each_image_of_a_batch_is_seen_as_alone(vlm: VLM) -> None:
    images = [photo(90, 60), photo(40, 200, 1), photo(8, 8, 2)]
    together = vlm.image_features(images)
    assert together.shape == (3, 7, 32)
    for image, features in zip(images, together, strict=True):
        torch.testing.assert_close(vlm.image_features([image])[0], features, atol=1e-4, rtol=1e-4)


def test_generate_stream_and_score_see_the_same(vlm: VLM) -> None:
    conversations = shown(vlm)
    together = vlm.generate(conversations, max_new_tokens=6)
    assert together == [vlm.generate([conversation], max_new_tokens=6)[0] for conversation in conversations]
    assert together == ["".join(vlm.stream(conversation, max_new_tokens=6)).strip() for conversation in conversations]
    other = vlm.generate([ask("What?", photo(60, 90))], max_new_tokens=6)
    assert len({together[0], *other, *vlm.generate([ask("What?")], max_new_tokens=6)}) > 1
    beams = [vlm.generate([conversation], max_new_tokens=6, num_beams=3) for conversation in conversations]
    assert vlm.generate(conversations, max_new_tokens=6, num_beams=3) == [one for (one,) in beams]


def test_the_processor_gives_sizes_and_the_right_number_of_placeholders(vlm: VLM) -> None:
    image = photo(200, 50)
    inputs = vlm.processor(text=["<image>?", "<image> <image>!"], images=[image, image, photo(30, 90)], padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 96, 96)
    assert inputs["image_sizes"].tolist() == [[24, 96], [24, 96], [90, 30]]
    assert (inputs["input_ids"] == vlm.renderer.image_id).sum(1).tolist() == [7, 14]
    assert set(vlm.processor.model_input_names) >= {"pixel_values", "image_sizes"}


@torch.no_grad()
def test_stock_llava_hands_sizes_through(vlm: VLM) -> None:
    inputs = vlm.processor(text=["<image>?", "<image>!"], images=[photo(200, 50), photo(30, 90)], padding=True, return_tensors="pt")
    expected = vlm.model(**inputs).logits
    noisy = inputs["pixel_values"].clone()
    noisy[0, :, 24:] = noisy[1, :, :, 30:] = 0.7
    torch.testing.assert_close(vlm.model(**{**inputs, "pixel_values": noisy}).logits, expected, atol=1e-3, rtol=1e-3)
    sizes = inputs.pop("image_sizes")
    torch.testing.assert_close(vlm.model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)  # found on the canvas
    features = vlm.model.get_image_features(inputs["pixel_values"], image_sizes=sizes, vision_feature_layer=-1).pooler_output
    assert [tuple(of.shape) for of in features] == [(7, 32)] * 2


def test_a_folder_of_stock_llava_says_what_the_vlm_says(vlm: VLM, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    model, processor = LlavaForConditionalGeneration.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert processor.image_processor.fit == "whole"
    for conversation in shown(vlm):
        inputs = processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
        assert processor.decode(said, skip_special_tokens=True).strip() == vlm.generate([conversation], max_new_tokens=6)[0]


@torch.no_grad()
def test_auto_model_takes_what_the_image_processor_gives(tower: SparseFormer, tmp_path: Path) -> None:
    from sparse_vlm.hf.model import SparseFormerBackbone, SparseFormerHostModel, SparseFormerImageProcessor

    SparseFormerHostModel.wrap(tower).save_pretrained(tmp_path)
    SparseFormerImageProcessor.of(tower.config).save_pretrained(tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)
    images = [photo(200, 50), photo(30, 90)]
    inputs = processor(images, return_tensors="pt")
    expected = encode(tower, prepare()(images))
    out = model(**inputs)
    torch.testing.assert_close(out.last_hidden_state, expected, **CLOSE)
    torch.testing.assert_close(out.hidden_states[-1], expected[:, -7:].flatten(0, 1)[None], **CLOSE)
    alone = model(inputs["pixel_values"])
    torch.testing.assert_close(alone.hidden_states[-1], expected[:, -7:], **CLOSE)
    square = SparseFormer(replace(tower.config, num_latent_tokens=9))
    square.load_state_dict({**tower.state_dict(), "initial_roi.weight": square.initial_roi.weight})
    maps = SparseFormerBackbone.wrap(square.eval())(**inputs).feature_maps[-1]
    assert maps.shape == (2, 64, 3, 3)


def test_a_projector_that_reduces_tokens_serves_whole_images(tmp_path: Path) -> None:
    SparseFormer(replace(whole_config(), num_latent_tokens=9)).save_pretrained(tmp_path / "tower")
    vlm = VLM.build(tmp_path / "tower", save_llm(tmp_path / "llm"), dtype=torch.float32, projector="resampler", num_tokens=4)
    stir(vlm, 0.3)
    conversations = shown(vlm)
    assert vlm.generate(conversations, max_new_tokens=5) == [
        "".join(vlm.stream(conversation, max_new_tokens=5)).strip() for conversation in conversations
    ]


def test_a_tower_of_centre_squares_gives_no_sizes(tmp_path: Path) -> None:
    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    assert set(vlm.processor.image_processor([photo(50, 40)])) == {"pixel_values"}
