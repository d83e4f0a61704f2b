"""The tower against numbers of the authors' implementation, and against what its users rely on.

The fixtures hold weights, input, outputs, RoIs and gradients of small models of both families (float32). Their loss is
sum(embedding * linspace(-1, 1)).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_vlm import SparseFormer, SparseFormerConfig
from sparse_vlm.errors import UserError
from sparse_vlm.roi import grid_rois, roi_average_weights, sample_bilinear
from sparse_vlm.tower import RoIPatchConfig, UnitConfig
from sparse_vlm.tower.cost import count_macs
from sparse_vlm.tower.released import PUBLISHED

PARITY = Path(__file__).resolve().parents[2] / "fixtures" / "parity"
FAMILIES = ("clip_small", "v1_small")


def released(name: str) -> tuple[SparseFormer, dict[str, torch.Tensor]]:
    config = SparseFormerConfig.from_released(json.loads((PARITY / f"{name}.json").read_text()))
    data = load_file(PARITY / f"{name}.safetensors")
    weights = {key.removeprefix("weights."): value for key, value in data.items() if key.startswith("weights.")}
    return SparseFormer.from_released(config, weights), data


def rounds_as_the_authors(embeds: torch.Tensor, data: dict[str, torch.Tensor]) -> bool:
    """Whether this machine's kernels round as those that the fixtures come from, as AMD's with AVX-512 do and Intel's do not."""
    return torch.equal(embeds, data["output.embedding"])


def small(**changes: object) -> SparseFormer:
    """A warm-start tower of one look and one plain block."""
    values = {
        "units": (UnitConfig(64, ("SAMPLING_M", "ATTN", "MLP", "ROI_ADJ")), UnitConfig(64, ("ATTN", "MLP"))),
        "num_latent_tokens": 9, "embed_dim": 32, "image_size": 56, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "conv_dim": 16,
        "cls_before_unit": 0, "token_init": "glance", "glance": RoIPatchConfig(14, 4, norm_pre=True),
    }  # fmt: skip
    torch.manual_seed(0)
    return SparseFormer(SparseFormerConfig(**{**values, **changes})).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_rois_equal_the_authors(name: str) -> None:
    tower, data = released(name)
    with torch.no_grad():
        out = tower(data["input.pixels"], output_rois=True)
    assert (out.image_embeds - data["output.embedding"]).abs().max() <= 1e-5
    assert (out.rois - data["output.rois"]).abs().max() <= 1e-5
    for index, rois in enumerate(out.rois_per_unit):
        assert (rois - data[f"output.rois_after_layer.{index}"]).abs().max() <= 1e-5
    # these random models amplify rounding: pixels moved by 1e-7 move tokens by 1e-4, so a machine that rounds in another order needs slack
    exact = rounds_as_the_authors(out.image_embeds, data)
    assert (out.last_hidden_state - data["output.tokens"]).abs().max() <= (1e-5 if exact else 5e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_keeps_less_and_changes_nothing(name: str) -> None:
    tower, data = released(name)
    kept: dict[bool, int] = {}
    grads: dict[bool, list[torch.Tensor]] = {}
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            embeds = tower(data["input.pixels"]).image_embeds
        weights = {parameter.data_ptr() for parameter in tower.parameters()}
        kept[enable] = sum(size for place, size in sizes.items() if place not in weights)
        grads[enable] = torch.autograd.grad(embeds.square().sum(), [p for p in tower.parameters() if p.requires_grad])
    assert kept[True] < kept[False] / 2
    for plain, again in zip(grads[False], grads[True], strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_the_authors(name: str) -> None:
    tower, data = released(name)
    embeds = tower(data["input.pixels"]).image_embeds
    (embeds * torch.linspace(-1, 1, embeds.numel()).view_as(embeds)).sum().backward()
    parameters = dict(tower.named_parameters())
    wanted = {key.removeprefix("grad."): value for key, value in data.items() if key.startswith("grad.")}
    assert wanted
    # v1's gradients move by 1.9e-4 when the pixels move by 1e-7
    exact = rounds_as_the_authors(embeds, data)
    for key, value in wanted.items():
        assert (parameters[key].grad - value).norm() <= (1e-4 if exact else 5e-4) * value.norm(), key


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda w: w.pop("norm.bias"), "missing tensor norm.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        (lambda w: w.update({"proj.weight": torch.zeros(3, 3)}), r"tensor proj.weight has shape \(3, 3\), expected \(64, 128\)"),
    ],
)
def test_released_weights_load_strictly(damage: object, message: str) -> None:
    tower, _ = released("clip_small")
    weights = dict(tower.state_dict())
    damage(weights)
    with pytest.raises(ValueError, match=message):
        SparseFormer.from_released(tower.config, weights)


def test_released_json_with_an_unknown_field_is_refused() -> None:
    data = json.loads((PARITY / "v1_small.json").read_text())
    with pytest.raises(ValueError, match="surprise"):
        SparseFormerConfig.from_released({**data, "surprise": 1})


@pytest.mark.parametrize(
    ("name", "tokens", "gmacs", "millions"),
    [
        ("sparseformer_v1_tiny", 49, 2.0, None),
        ("sparseformer_v1_small", 64, 3.8, None),
        ("sparseformer_v1_base", 81, 7.8, None),
        ("sparseformer_btsp_augreg_base", 49, 3.78, None),
        ("sparseformer_btsp_augreg_large", 49, None, None),
        ("sparseformer_btsp_openai_clip_base", 49, 3.78, 63.8),
        ("sparseformer_btsp_openai_clip_large", 64, 14.8, 212),
    ],
)
def test_published_models_have_their_published_size(name: str, tokens: int, gmacs: float | None, millions: float | None) -> None:
    config = SparseFormerConfig.named(name)
    assert config.num_tokens == tokens
    if gmacs:
        assert count_macs(config).total / 1e9 == pytest.approx(gmacs, rel=0.09 if "v1" in name else 0.005)
    if millions:
        with torch.device("meta"):
            tower = SparseFormer(config)
        assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


def test_unknown_published_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sparseformer_v1_tiny"):
        SparseFormerConfig.named("sparseformer_v9")
    assert len(PUBLISHED) == 7


@pytest.mark.parametrize(("height", "width"), [(56, 56), (30, 71), (224, 112)])
def test_token_count_never_depends_on_the_picture(height: int, width: int) -> None:
    tower = small()
    with torch.no_grad():
        out = tower(torch.randn(2, 3, height, width), output_rois=True)
    assert out.last_hidden_state.shape == (2, tower.config.num_tokens, 64)
    assert out.image_embeds.shape == (2, 32)
    assert out.rois.shape == (2, 9, 4)
    assert len(out.rois_per_unit) == 2
    assert [p.shape for p in out.sampling_points] == [(2, 9, 16, 2)]


def test_pixels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 56, 56\)"):
        small()(torch.zeros(2, 4, 56, 56))


def test_saving_and_loading_is_bit_exact(tmp_path: Path) -> None:
    tower = small()
    tower.save_pretrained(tmp_path)
    again = SparseFormer.from_pretrained(tmp_path)
    assert again.config == tower.config
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, again(pixels).last_hidden_state)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_folder_is_one_clear_line(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a tower folder"):
        SparseFormer.from_pretrained(tmp_path)
    small(num_latent_tokens=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_latent_tokens": 9}))
    with pytest.raises(UserError, match="initial_roi.weight"):
        SparseFormer.from_pretrained(tmp_path)


def test_bfloat16_keeps_coordinates_in_float32() -> None:
    tower = small()
    plain = tower(torch.zeros(1, 3, 56, 56)).last_hidden_state
    out = tower.bfloat16()(torch.zeros(1, 3, 56, 56))
    assert out.rois.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(out.last_hidden_state.float().flatten(), plain.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_initial_rois_stay_float32_whatever_the_tower_is_turned_into(dtype: torch.dtype) -> None:
    tower = small()
    rois = tower.initial_roi.weight.detach().clone()
    assert not torch.equal(rois.to(dtype).float(), rois), "a grid that the dtype holds exactly shows nothing"
    holder = torch.nn.ModuleList([tower]).to("cpu", dtype)
    assert holder[0].norm.weight.dtype == dtype
    assert torch.equal(holder[0].initial_roi.weight, rois)


def test_own_recipes_have_no_twins() -> None:
    for count in (1, 2, 9, 48, 49, 63, 64):
        rois = grid_rois(count)
        assert rois.shape == (count, 4)
        assert len({tuple(r.tolist()) for r in rois}) == count
        assert ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sum() == pytest.approx(1.0, abs=1e-5)


def test_a_pooling_glance_takes_pictures_of_any_size_in_bfloat16() -> None:
    pixels = torch.rand(1, 3, 80, 64)
    with torch.no_grad():
        exact, rounded = small()(pixels).image_embeds, small().to(torch.bfloat16)(pixels).image_embeds
    assert torch.cosine_similarity(exact, rounded.float()).item() > 0.99


def test_pooling_weights_equal_sampling_and_averaging() -> None:
    torch.manual_seed(0)
    feature_map = torch.randn(1, 5, 8, 6)
    corners = torch.rand(1, 7, 2) * 0.7 - 0.1
    rois = torch.cat([corners, corners + torch.rand(1, 7, 2) * 0.5 + 0.05], dim=-1)
    steps = (torch.arange(4) + 0.5) / 4
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    inside = torch.stack([x, y], dim=-1).view(1, 1, 16, 2)
    points = rois[..., None, :2] + inside * (rois[..., 2:] - rois[..., :2]).unsqueeze(-2)
    sampled = sample_bilinear(feature_map, points).mean(dim=2)
    pooled = roi_average_weights(rois, 8, 6) @ feature_map.flatten(2).mT
    assert torch.allclose(sampled, pooled, atol=1e-5)
