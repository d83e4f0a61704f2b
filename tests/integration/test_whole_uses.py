"""Whole images where towers are used: training, evaluation, the benchmark, look, and hosts that hand on pixels alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_vlm import photo, save_llm, save_tower, save_whole_tower, stir, whole_config

from sparse_vlm import VLM, SparseFormer
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import Inputs, Preprocessor

SHAPES = [(90, 60), (40, 96), (1000, 100)]
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_whole_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def tower(folder: str) -> SparseFormer:
    return SparseFormer.from_pretrained(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Photo]:
    root = tmp_path_factory.mktemp("photos")
    made = []
    for number, size in enumerate(SHAPES):
        path = root / f"{number}.png"
        photo(*size, seed=number).save(path)
        made.append(Photo(path.name, path, 0, path.stat().st_size))
    return made


@torch.no_grad()
def alone(tower: SparseFormer, one: Photo | Image.Image) -> torch.Tensor:
    inputs = Preprocessor.of(tower.config)(one)
    return tower(inputs.pixels, image_sizes=inputs.image_sizes).last_hidden_state[0]


# ---- training


def test_a_learning_tower_is_given_images_of_many_shapes_at_once(folder: str, photos: list[Photo], tmp_path: Path) -> None:
    from sparse_vlm.data.samples import Sample
    from sparse_vlm.train.loss_module import Collator, LiveImages, LossModule
    from sparse_vlm.vlm.prompts import assistant, user
    from sparse_vlm.vlm.tree import merge

    vlm = VLM.build(folder, save_llm(tmp_path / "llm"), dtype=torch.float32)
    stir(vlm, 0.1)
    vlm.tower.requires_grad_(True)
    said = merge([vlm.renderer.render([user("What?", 1), assistant("This.")])])
    images = LiveImages(vlm.tower.config, photos)
    batch = Collator(vlm)([Sample(f"sample {i}", (i,), said, (images[i],)) for i in range(len(photos))])
    assert isinstance(batch["images"], Inputs)
    assert batch["images"].image_sizes.tolist() == [[60, 90], [96, 40], [10, 96]]
    learner = LossModule(vlm)
    with torch.no_grad():
        for features, one in zip(learner.features(batch["images"]), photos, strict=True):
            torch.testing.assert_close(features, vlm.image_features([one.load()])[0], atol=1e-4, rtol=1e-4)
    learner(batch["trees"], batch["images"].to("cpu"), batch["chains"])["loss"].backward()
    assert vlm.tower.glance.patch_embed.weight.grad.abs().max() > 0
    text = Collator(vlm)([Sample("text", (), merge([vlm.renderer.render([user("Hello?"), assistant("Yes.")])]))])
    assert text["images"] is None and learner(text["trees"], None, text["chains"])["loss"].isfinite()


def test_kept_tokens_are_those_of_whole_images(tower: SparseFormer, photos: list[Photo], tmp_path: Path) -> None:
    from sparse_vlm.data.samples import FeatureCache

    features_cache = FeatureCache(tmp_path, tower, photos)
    features_cache.fill(range(len(photos)))
    for index, one in enumerate(photos):
        torch.testing.assert_close(features_cache[index].float(), alone(tower, one)[-7:], atol=0.03, rtol=0.01)
    square = SparseFormer(replace(tower.config, fit="crop")).eval()
    square.load_state_dict(tower.state_dict())
    assert FeatureCache(tmp_path, square, photos).missing(range(len(photos))) == [0, 1, 2], "another fit is another cache"


# ---- evaluation, benchmark, look


def test_towers_are_measured_on_whole_photos_and_on_squares_for_comparison(folder: str, photos: list[Photo], tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="measuring beside a teacher needs open_clip")
    from sparse_vlm.eval.embedders import tower_embedder

    tower = SparseFormer.from_pretrained(folder)
    whole, square = tower_embedder(folder), tower_embedder(folder, "crop")
    inputs = whole.pixels(photos)
    assert inputs.image_sizes.tolist() == [[60, 90], [96, 40], [10, 96]]
    with torch.no_grad():
        expected = tower(inputs.pixels.float(), image_sizes=inputs.image_sizes).image_embeds
    assert torch.nn.functional.cosine_similarity(whole.encode(inputs), expected).min() > 0.99
    assert square.name == f"{folder}, crop" and square.pixels(photos).image_sizes is None
    with pytest.raises(UserError, match="sees centre squares as it is"):
        tower_embedder(save_tower(tmp_path / "crop"), "crop")


def test_the_benchmark_gives_a_tower_of_whole_images_its_whole_canvas(folder: str) -> None:
    from sparse_vlm.bench.summary import prepared_as
    from sparse_vlm.bench.vision import load_visions

    (vision,) = load_visions([folder])
    inputs = vision.pixels([photo(90, 60)])
    assert inputs.pixels.shape == (1, 3, 96, 96) and inputs.image_sizes.tolist() == [[60, 90]]
    assert vision.prepared == prepared_as(96, "whole") != prepared_as(96, "crop") == "96"
    torch.testing.assert_close(vision.encode(inputs), alone(vision.module, photo(90, 60))[None, -7:], **CLOSE)


def test_look_shows_cells_on_the_whole_photo(tower: SparseFormer) -> None:
    from sparse_vlm.tower.visualize import trace_regions

    shown = photo(300, 100)
    regions = trace_regions(tower, shown)
    assert regions.crop == (0, 0, 300, 100)
    inputs = Preprocessor.of(tower.config)(shown)
    torch.testing.assert_close(regions.start, tower.first_cells(*inputs)[0])
    assert regions.start.shape == (7, 4)


# ---- hosts that hand on pixels alone


def test_the_original_llava_hands_on_squares_from_which_the_tower_tells_sizes(folder: str, tower: SparseFormer) -> None:
    from sparse_vlm.integrations.llava_tower import SparseFormerVisionTower

    host = SparseFormerVisionTower(f"sparse-vlm:{folder}", SimpleNamespace(mm_vision_select_layer=-1))
    images = [photo(*size, seed=number) for number, size in enumerate(SHAPES)]
    pixels = host.image_processor.preprocess(images, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, 96, 96)
    for given in (pixels, list(pixels)):
        for features, image in zip(host(given), images, strict=True):
            torch.testing.assert_close(features.view(7, 64), alone(tower, image)[-7:], **CLOSE)
    assert host(torch.zeros(1, 3, 96, 96)).isfinite().all(), "what LLaVA shows for a sample without an image"


def test_open_clip_takes_whole_images(tower: SparseFormer) -> None:
    visual = tower.for_open_clip()
    image = photo(300, 100)
    expected = Preprocessor.of(tower.config)(image)
    with torch.no_grad():
        wanted = tower(expected.pixels, image_sizes=expected.image_sizes).image_embeds
        torch.testing.assert_close(visual(visual.preprocess(image)[None]), wanted, **CLOSE)
    assert visual.preprocess_cfg["resize_mode"] == "squash"


def test_timm_takes_whole_images(tower: SparseFormer) -> None:
    pytest.importorskip("timm", reason="a host that is not installed")
    from sparse_vlm.integrations.timm import Entry, SparseFormerClassifier

    config = replace(whole_config(), num_latent_tokens=9)
    model = SparseFormerClassifier(config).eval()
    inputs = Preprocessor.of(config)([photo(300, 100), photo(50, 90)], square=True)
    with torch.no_grad():
        expected = model.tower(inputs.pixels, image_sizes=inputs.image_sizes).last_hidden_state
        torch.testing.assert_close(model.forward_features(inputs.pixels), expected, **CLOSE)
        maps = model.forward_intermediates(inputs.pixels, indices=1, intermediates_only=True)
    assert maps[0].shape == (2, 64, 3, 3)
    assert Entry(config).cfg()["crop_mode"] == "squash" and "crop_mode" not in Entry(replace(config, fit="crop")).cfg()


def test_an_export_says_what_the_tower_says_of_whole_images(folder: str, tmp_path: Path) -> None:
    from sparse_vlm.export.run import export

    found = export(folder, "transformers", tmp_path / "out")
    assert found["image_size"] == 96 and all(one["agrees"] for one in found["compared"])
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["fit"] == "whole"
    assert "tokens for an image of any aspect" in (tmp_path / "out" / "README.md").read_text()


def test_chat_decodes_no_more_than_the_tower_sees(tower: SparseFormer, tmp_path: Path) -> None:
    from sparse_vlm.vlm.chat import ChatImage

    photo(2400, 1600).save(tmp_path / "large.jpg", quality=90)
    prepare = Preprocessor.of(tower.config)
    shown = ChatImage.read(tmp_path / "large.jpg", prepare)
    assert shown.size == (2400, 1600) and shown.image.size == (96, 64) and shown.decode_ms > 0
    assert prepare.scale(shown.image) is shown.image, "nothing is left to do for the model"
    with pytest.raises(UserError, match=r"gone\.jpg: no such file"):
        ChatImage.read(tmp_path / "gone.jpg", prepare)
