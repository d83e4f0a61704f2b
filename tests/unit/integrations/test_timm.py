"""SparseFormers through timm: the registry, its preprocessing, heads, features, optimizers and files."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from interpreters import python
from safetensors.torch import save_file
from tiny_vlm import picture, tower_config

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.images.decode import load_image
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.tower import SparseFormer, UnitConfig
from sparse_vlm.tower.released import PUBLISHED

timm = pytest.importorskip("timm", reason="timm is not installed")
from timm.data import create_transform, resolve_model_data_config  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402

from sparse_vlm.integrations import timm as host  # noqa: E402
from sparse_vlm.integrations.timm import SparseFormerClassifier, checkpoint_filter_fn  # noqa: E402

HEADS = {
    "cls": tower_config(),
    "avg": dataclasses.replace(tower_config(), head="avg", cls_before_unit=None, head_bias=True),
    "map": dataclasses.replace(tower_config(), head="map", cls_before_unit=None),
}


def both(config=HEADS["cls"], **options) -> tuple[SparseFormer, SparseFormerClassifier]:
    """A tower of random weights, and timm's model with the same; the head is its own where options are given."""
    torch.manual_seed(0)
    tower = SparseFormer(config).eval()
    model = SparseFormerClassifier(config, **options).eval()
    state = checkpoint_filter_fn(tower.state_dict(), model)
    own = {name: tensor for name, tensor in model.state_dict().items() if options and name.startswith("head.")}
    model.load_state_dict({name: tensor for name, tensor in state.items() if not (options and name.startswith("head."))} | own)
    return tower, model


# ---- the registry


def test_every_tower_is_listed_and_registering_again_says_nothing():
    towers = {f"sparseformer_{entry.name}".replace("-", "_") for entry in store.entries().values() if entry.kind == "tower"}
    assert set(timm.list_models("sparseformer*")) == towers | set(PUBLISHED)
    assert set(timm.list_models("sparseformer*", pretrained=True)) == towers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host.register()
    assert len(timm.list_models("sparseformer*")) == len(towers) + len(PUBLISHED)


@pytest.mark.parametrize("order", ["sparse_vlm, timm", "timm, sparse_vlm"])
def test_importing_both_registers_whichever_comes_first(order):
    assert python(f"import {order}; print(timm.is_model('sparseformer_tiny'))") == "True\n"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_names_say_how_pictures_are_prepared(name):
    cfg, config = timm.models.get_pretrained_cfg(name), PUBLISHED[name]
    assert (cfg.mean, cfg.std) == (config.image_mean, config.image_std)
    assert (cfg.input_size, cfg.num_classes) == ((3, 224, 224), config.embed_dim)


@torch.no_grad()
def test_zoos_tower_comes_with_its_weights_and_pixels():
    model = timm.create_model("sparseformer_tiny", pretrained=True).eval()
    tower = SparseFormer.from_pretrained("tiny")
    image = load_image("examples/coffee.jpg")
    pixels = preprocess(image, 224, tower.config.image_mean, tower.config.image_std)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(transform(image)[None], pixels, atol=1e-5, rtol=0)
    out = tower(pixels)
    assert torch.equal(model(pixels), out.image_embeds)
    assert torch.equal(model.forward_features(pixels), out.last_hidden_state)
    tuned = timm.create_model("sparseformer_tiny", pretrained=True, num_classes=7).eval()
    assert tuned(pixels).shape == (1, 7)
    assert torch.equal(tuned.forward_features(pixels), out.last_hidden_state)
    features = timm.create_model("sparseformer_tiny", pretrained=True, features_only=True, out_indices=(3, -1)).eval()
    assert [tuple(grid.shape) for grid in features(pixels)] == [(1, 384, 7, 7)] * 2
    assert features.feature_info.channels() == [384, 384]
    assert features.feature_info.reduction() == [32, 32]


def test_published_names_have_no_weights_to_fetch(tmp_path):
    with pytest.raises(UserError, match="sparseformer_v1_tiny: has no weights"):
        timm.create_model("sparseformer_v1_tiny", pretrained=True)
    torch.manual_seed(0)
    tower = SparseFormer(PUBLISHED["sparseformer_v1_tiny"]).eval()
    torch.save(tower.state_dict(), tmp_path / "authors.pth")
    overlay = {"file": str(tmp_path / "authors.pth")}
    model = timm.create_model("sparseformer_v1_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(pixels), tower(pixels).image_embeds)


def test_weights_of_another_tower_are_refused(tmp_path):
    torch.manual_seed(0)
    save_file(SparseFormer(tower_config()).state_dict(), tmp_path / "other.safetensors")
    overlay = {"file": str(tmp_path / "other.safetensors")}
    # with another number of classes timm itself would take whatever fits and log the rest
    with pytest.raises(UserError, match=r"weights are of another tower: \d+ tensors differ"):
        timm.create_model("sparseformer_tiny", pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)


def test_what_timm_saved_loads_again(tmp_path):
    model = timm.create_model("sparseformer_tiny", pretrained=True, num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": 3})
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.num_classes == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert str(store.zoo_folder()) not in (tmp_path / "config.json").read_text()


# ---- heads


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_forward_is_features_then_head_and_says_what_the_tower_says(head):
    tower, model = both(HEADS[head])
    pixels = torch.randn(2, 3, 32, 40)
    torch.testing.assert_close(model(pixels), tower(pixels).image_embeds)
    tokens = model.forward_features(pixels)
    assert tokens.shape == (2, model.tower.config.num_tokens, 64)
    assert torch.equal(model.forward_head(tokens), model(pixels))
    pooled = model.forward_head(tokens, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.get_classifier()(pooled), model(pixels))


@torch.no_grad()
def test_pooling_and_classes_can_be_chosen():
    pixels = torch.randn(2, 3, 32, 32)
    tower, model = both()
    tokens = tower(pixels).last_hidden_state
    model.reset_classifier(3)
    assert (model(pixels).shape, model.num_classes, model.global_pool) == ((2, 3), 3, "token")
    assert model.head.bias is not None
    model.reset_classifier(0)
    torch.testing.assert_close(model(pixels), tokens[:, 0])
    model.reset_classifier(0, "avg")
    before_norm = list(tower.run_units(pixels))[-1][0]
    torch.testing.assert_close(model(pixels), tower.norm(before_norm[:, 1:].mean(1)))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(pixels), tokens)
    model.reset_classifier(5, "token")
    assert model(pixels).shape == (2, 5)
    assert both(num_classes=0, global_pool="")[1](pixels).shape == (2, 5, 64)


def test_probe_of_a_map_head_goes_when_nothing_uses_it():
    _, model = both(HEADS["map"], num_classes=2, global_pool="avg")
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all("roi_adjust" in name for name in idle)  # after the last look no RoI matters
    with pytest.raises(UserError, match="global_pool 'map': this tower has 'avg', ''"):
        model.reset_classifier(2, "map")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_chans": 1}, "in_chans is 1"),
        ({"global_pool": "max"}, "global_pool 'max': this tower has 'token', 'avg', ''"),
    ],
)
def test_what_a_tower_does_not_have_is_said(options, message):
    with pytest.raises(UserError, match=message):
        timm.create_model("sparseformer_tiny", **options)


# ---- training


def test_optimizer_decays_matrices_alone_and_slows_with_depth():
    _, model = both(num_classes=3)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay, scale = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            decay[names[id(parameter)]], scale[names[id(parameter)]] = group["weight_decay"], group["lr_scale"]
    assert set(decay) == set(names.values())
    spared = {name for name, value in decay.items() if value == 0}
    assert {name for name in spared if model.get_parameter(name).ndim > 1} == model.no_weight_decay()
    assert "tower.initial_roi.weight" in spared
    order = ["tower.initial_roi.weight", "tower.layers.0.mlp.fc1.weight", "tower.layers.1.mlp.fc1.weight", "head.weight"]
    assert [scale[name] for name in order] == sorted(scale[name] for name in order)
    assert len({scale[name] for name in order}) == 4
    assert scale["tower.feat_extractor.conv1.weight"] == scale["tower.initial_roi.weight"]
    assert scale["head.weight"] == 1


def test_checkpointed_gradients_are_the_same():
    _, model = both(num_classes=3)
    pixels, found = torch.randn(2, 3, 32, 32), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.tower.grad_checkpointing is enable
        model.zero_grad()
        model(pixels).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(plain, found[1][name]) for name, plain in found[0].items())


def test_fine_tuning_learns():
    torch.manual_seed(0)
    model = SparseFormerClassifier(tower_config(), num_classes=2, drop_rate=0.1)
    images = [picture("red"), picture("darkred"), picture("blue"), picture("navy")]
    pixels = preprocess(images, 32, model.tower.config.image_mean, model.tower.config.image_std)
    labels = torch.tensor([0, 0, 1, 1])
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < 0.5 < losses[0]
    assert torch.equal(model.eval()(pixels).argmax(1), labels)


# ---- features


@torch.no_grad()
def test_features_are_the_tokens_where_they_begin():
    tower, model = both()  # four latent tokens and CLS
    pixels = torch.randn(2, 3, 32, 32)
    steps = [tokens for tokens, _ in tower.run_units(pixels)]
    final, grids = model.forward_intermediates(pixels)
    torch.testing.assert_close(final, tower(pixels).last_hidden_state)
    assert [tuple(grid.shape) for grid in grids] == [(2, 64, 2, 2)] * 2
    for grid, tokens in zip(grids, steps, strict=True):
        assert torch.equal(grid.flatten(2).mT, tokens[:, -4:])
    # the grid is that of the RoIs: right of the first token is the second
    corners = model.tower.initial_roi.weight[:, :2].reshape(2, 2, 2)
    assert corners[0, 1, 0] > corners[0, 0, 0]
    assert corners[1, 0, 1] > corners[0, 0, 1]
    (pair,) = model.forward_intermediates(
        pixels, indices=1, output_fmt="NLC", norm=True, return_prefix_tokens=True, intermediates_only=True
    )
    assert torch.equal(torch.cat([pair[1], pair[0]], dim=1), tower.norm(steps[-1]))
    stopped, (first,) = model.forward_intermediates(pixels, indices=[0], output_fmt="NLC", stop_early=True)
    assert torch.equal(first, steps[0][:, -4:])
    assert torch.equal(stopped, tower.norm(steps[0]))


@torch.no_grad()
def test_pruned_model_has_the_same_features():
    units = (*tower_config().units, UnitConfig(128, ("ATTN", "MLP")))
    _, model = both(dataclasses.replace(tower_config(), units=units, cls_before_unit=2))
    pixels = torch.randn(1, 3, 32, 32)
    expected = model.forward_intermediates(pixels, indices=[0, -2], intermediates_only=True)
    with pytest.raises(UserError, match="unit 0 has width 64 and the final LayerNorm 128"):
        model.forward_intermediates(pixels, indices=[0], norm=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert len(model.tower.units()) == 2
    found = model.forward_intermediates(pixels, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    model.forward_intermediates(pixels, indices=[0, 1], intermediates_only=True)
    assert not any(name.startswith(("head", "tower.cls")) for name, _ in model.named_parameters())


def test_tokens_in_no_square_grid_are_a_list():
    _, model = both(tower_config(7))  # six latent tokens
    pixels = torch.randn(1, 3, 32, 32)
    with pytest.raises(UserError, match="6 tokens of an image of 32 x 32 pixels are not a square grid"):
        model.forward_intermediates(pixels)
    assert model.forward_intermediates(pixels, indices=1, output_fmt="NLC", intermediates_only=True)[0].shape == (1, 6, 64)
    with pytest.raises(UserError, match="sparseformer_btsp_augreg_base: its 48 tokens are not a square grid"):
        timm.create_model("sparseformer_btsp_augreg_base", features_only=True)
    # a tower of several budgets lays its cells over the image's own shape
    _, elastic = both(dataclasses.replace(tower_config(), budgets=(2, 9)))
    assert elastic.forward_intermediates(pixels, intermediates_only=True)[0].shape == (1, 64, 2, 2)
    with pytest.raises(UserError, match="4 tokens of an image of 64 x 32 pixels"):
        elastic.forward_intermediates(torch.randn(1, 3, 32, 64))
    with pytest.raises(UserError, match=r"units \[2\]: this tower has 2, 0 to 1"):
        elastic.forward_intermediates(pixels, indices=[2])
