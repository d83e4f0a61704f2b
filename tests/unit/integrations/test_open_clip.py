"""The tower in open_clip's own models: encoding, zero-shot, training, locking and saving, without a line of theirs changed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from interpreters import BLOCK, python
from tiny_vlm import picture, tower_config

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.tower import SparseFormer

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
from open_clip.push_to_hf_hub import save_config_for_hf  # noqa: E402
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
TEACHER = ROOT / "build" / "teacher"
PHOTOS = ROOT.parent / "shared" / "data" / "eval" / "imagenet1k_one_per_class.tar"
VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
TEXT = {"width": 64, "heads": 1, "layers": 1, "context_length": 77, "vocab_size": 49408}


@pytest.fixture
def tower() -> SparseFormer:
    torch.manual_seed(0)
    return SparseFormer(tower_config()).eval()


def clip(kind: str = "CLIP", embed_dim: int = 16):
    torch.manual_seed(0)
    return getattr(open_clip, kind)(embed_dim, VISION, TEXT).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False])
def test_tower_takes_the_dtype_of_the_model(tower, dtype, whole):
    """As of open_clip's precision `bf16`, which leaves norms in float32, and `pure_bf16`."""
    from open_clip.model import convert_weights_to_lp

    model = clip()
    model = model.to(dtype) if whole else model
    if not whole:
        convert_weights_to_lp(model, dtype)
    model.visual = tower.for_open_clip(model)
    assert model.visual.tower.norm.weight.dtype == dtype and tower.initial_roi.weight.dtype == torch.float32
    image, text = torch.randn(2, 3, 32, 32, dtype=dtype), open_clip.tokenize(["a red wall", "a blue wall"])
    assert model.encode_image(image).dtype == dtype
    if whole:
        logits, _ = model.get_logits(image, text)
        assert logits.shape == (2, 2) and logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_encodes_and_compares_as_before(tower, kind):
    model = clip(kind)
    model.visual = tower.for_open_clip(model)
    image = torch.randn(3, 3, 32, 32)
    embeds = tower(image).image_embeds
    assert torch.equal(model.encode_image(image), embeds)
    normalized = torch.nn.functional.normalize(embeds, dim=-1)
    assert torch.equal(model.encode_image(image, normalize=True), normalized)
    text = open_clip.tokenize(["a red wall", "a blue wall"])
    ours, theirs, scale = model(image, text)
    assert torch.equal(ours, normalized)
    assert theirs.shape == (2, 16)
    logits, _ = model.get_logits(image, text)
    torch.testing.assert_close(logits, scale * ours @ theirs.T)


@torch.no_grad()
def test_zero_shot_code_is_unchanged(tower):
    model = clip()
    model.visual = tower.for_open_clip(model)
    weights = open_clip.build_zero_shot_classifier(model, open_clip.tokenize, ["cat", "dog", "cup"], ["a photo of a {}.", "a {}."])
    assert (model.encode_image(torch.randn(2, 3, 32, 32), normalize=True) @ weights).shape == (2, 3)


def test_pictures_are_prepared_as_the_tower_was_trained(tower):
    model = clip()
    model.visual = tower.for_open_clip(model)
    assert model.visual.image_size == (32, 32)
    assert open_clip.get_model_preprocess_cfg(model) == model.visual.preprocess_cfg
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    for image in (picture("red"), picture("blue", (90, 41))):
        expected = preprocess(image, 32, tower.config.image_mean, tower.config.image_std)[0]
        torch.testing.assert_close(transform(image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
def test_text_side_of_another_width_is_refused(tower, kind):
    with pytest.raises(UserError, match="embeddings have 16 numbers, those of the model's text side 24"):
        tower.for_open_clip(clip(kind, embed_dim=24))


def test_pictures_of_another_model_are_refused(tower):
    model = clip()
    open_clip.set_model_preprocess_cfg(model, {"mean": tower.config.image_mean, "std": (0.2, 0.3, 0.35)})
    with pytest.raises(UserError, match=r"std \(0.2, 0.3, 0.25\), the model's have std \(0.2, 0.3, 0.35\)"):
        tower.for_open_clip(model)
    open_clip.set_model_preprocess_cfg(model, {"mean": tower.config.image_mean, "std": tower.config.image_std})
    model.visual = tower.for_open_clip(model)
    assert tower.for_open_clip(model).tower is tower


def unlocked(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.visual.tower.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("budgets", [None, (2, 9)])
def test_lock_leaves_the_last_groups_free(budgets):
    tower = SparseFormer(dataclasses.replace(tower_config(), budgets=budgets))
    everything = {name for name, _ in tower.named_parameters()} - ({"initial_roi.weight"} if budgets else set())
    model = clip()
    model.visual = tower.for_open_clip(model)
    assert unlocked(model) == everything
    model.lock_image_tower()
    assert unlocked(model) == set()
    model.lock_image_tower(unlocked_groups=1)
    assert unlocked(model) == {"proj.weight"}
    model.lock_image_tower(unlocked_groups=2, freeze_bn_stats=True)
    assert unlocked(model) == {name for name in everything if name.startswith(("proj.", "norm.", "layers.1."))}
    model.lock_image_tower(unlocked_groups=3)
    assert unlocked(model) == {name for name in everything if name.startswith(("proj.", "norm.", "layers."))}
    model.lock_image_tower(unlocked_groups=4)
    assert unlocked(model) == everything


def test_transition_is_locked_with_the_unit_it_leads_to():
    narrow, wide = tower_config().units
    wide = dataclasses.replace(wide, width=128)
    tower = SparseFormer(dataclasses.replace(tower_config(), units=(narrow, wide)))
    model = clip()
    model.visual = tower.for_open_clip(model)
    model.lock_image_tower(unlocked_groups=2)
    assert {name.rpartition(".")[0] for name in unlocked(model) if name.startswith("layers.1.")} == {"layers.1.0"}
    assert not any(name.startswith("layers.0.") for name in unlocked(model))


def test_checkpointed_training_gives_the_same_gradients(tower):
    model = clip()
    model.visual = tower.for_open_clip(model)
    image, text = torch.randn(4, 3, 32, 32), open_clip.tokenize(["one", "two", "three", "four"])
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert tower.grad_checkpointing is enable
        model.zero_grad()
        open_clip.ClipLoss()(*model(image, text)).backward()
        # nothing looks after the last RoIs were adjusted, so those parameters have no gradient
        found.append({name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(plain, found[1][name]) for name, plain in found[0].items())
    assert tower.proj.weight.grad.abs().sum() > 0


def test_state_goes_round_strictly(tower, tmp_path):
    model = clip()
    model.visual = tower.for_open_clip(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = clip()
    torch.manual_seed(9)
    other.visual = SparseFormer(tower.config).for_open_clip(other)
    image = torch.randn(1, 3, 32, 32)
    assert not torch.equal(other.encode_image(image), model.encode_image(image))
    other.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    assert torch.equal(other.encode_image(image), model.encode_image(image))


def test_what_open_clip_saves_names_the_pixels(tower, tmp_path):
    model = clip()
    model.visual = tower.for_open_clip(model)
    save_config_for_hf(model, tmp_path / "config.json", model_config={})
    saved = json.loads((tmp_path / "config.json").read_text())["preprocess_cfg"]
    assert saved == {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"}


@torch.no_grad()
def test_tokens_are_given_beside_the_embedding(tower):
    visual = tower.for_open_clip()
    image = torch.randn(2, 3, 32, 32)
    assert visual(image).shape == (2, 16)
    visual.output_tokens = True
    embeds, tokens = visual(image)
    out = tower(image)
    assert torch.equal(embeds, out.image_embeds)
    assert torch.equal(tokens, out.last_hidden_state[:, 1:])  # without CLS, as open_clip's ViTs


@torch.no_grad()
def test_autocast_and_bfloat16_stay_close(tower):
    model = clip()
    model.visual = tower.for_open_clip(model)
    image = torch.randn(4, 3, 32, 32)
    exact = model.encode_image(image, normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.encode_image(image, normalize=True)
    assert not torch.equal(cast.float(), exact)
    assert torch.cosine_similarity(cast.float(), exact).min() > 0.9999
    half = model.to(torch.bfloat16).encode_image(image.bfloat16(), normalize=True)
    assert half.dtype == torch.bfloat16
    assert torch.cosine_similarity(half.float(), exact).min() > 0.9999


def test_undecayed_parameters_are_the_models_own(tower):
    model = clip()
    model.visual = tower.for_open_clip(model)
    spared = {name for name in model.no_weight_decay() if name.startswith("visual.")}
    assert spared == {f"visual.tower.{name}.weight" for name in ("initial_roi", "initial_embedding", "cls_embedding")}
    assert spared <= {name for name, _ in model.named_parameters()}


def test_wrapper_needs_torch_alone():
    absent = ["transformers", "open_clip", "timm", "PIL", "numpy", "typer", "safetensors"]
    code = """
import warnings; warnings.simplefilter("ignore")
import torch
from sparse_vlm import SparseFormer, SparseFormerConfig
visual = SparseFormer(SparseFormerConfig.named("sparseformer_v1_tiny")).for_open_clip().eval()
with torch.no_grad():
    print(tuple(visual(torch.zeros(1, 3, 64, 64)).shape))
"""
    assert python(BLOCK.format(absent=absent) + code) == "(1, 1000)\n"


@torch.no_grad()
def test_real_teacher_with_the_zoos_tower_answers_as_our_own_text_side():
    if not (TEACHER / "open_clip_config.json").is_file():
        pytest.skip("build/teacher is not there; README says how it is assembled")
    if not PHOTOS.is_file():
        pytest.skip("the photos of the evaluation are not there")
    if store.find_local(store.entry("all-minilm-l6-v2")) is None:
        pytest.skip("the text tower of tiny-text was not fetched; sparse-vlm zoo pull tiny-text")
    from sparse_vlm.teachers.text import TextEncoder

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{TEACHER}")
    tower = SparseFormer.from_pretrained("tiny")
    model.visual = tower.for_open_clip(model)
    model.eval()
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    photos = list(PhotoSet(PHOTOS))[::50]
    names = [photo.info["label_name"].lower() for photo in photos]
    weights = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(f"local-dir:{TEACHER}"), names, ["a photo of a {}."])
    images = [photo.load() for photo in photos]
    scores = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True) @ weights
    normalize = torch.nn.functional.normalize
    words = normalize(TextEncoder.from_pretrained("tiny-text").encode([f"a photo of a {name}." for name in names]), dim=-1)
    config = tower.config
    ours = normalize(tower(preprocess(images, config.image_size, config.image_mean, config.image_std)).image_embeds, dim=-1) @ words.T
    torch.testing.assert_close(scores, ours, atol=1e-4, rtol=0)
    right = (scores.argmax(1) == torch.arange(len(photos))).float().mean()
    assert right > 6 / len(photos)  # chance is one of 20
