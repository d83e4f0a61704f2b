"""`optimize_for_inference`: the same tower within rounding, whatever it is asked, and clear words where it can no longer do something."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sparse_vlm import SparseFormer, SparseFormerConfig, kernels, load_image
from sparse_vlm.bench.vision import BASELINES
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.tower import RoIPatchConfig, UnitConfig, packed
from sparse_vlm.tower.config import FocusConfig
from sparse_vlm.tower.released import PUBLISHED

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = sorted((ROOT / "examples").glob("*.jpg"))


def stirred(config: SparseFormerConfig) -> SparseFormer:
    """A tower with random weights that looks at something and moves, gently: wilder ones amplify rounding beyond any bound."""
    torch.manual_seed(0)
    tower = SparseFormer(config).eval()
    for name, parameter in tower.named_parameters():
        if name != "initial_roi.weight":
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.01)
    for unit in tower.units():
        if "SAMPLING_M" in unit.ops:
            torch.nn.init.normal_(unit.roi_offset_bias, std=0.3)
            torch.nn.init.normal_(unit.roi_offset_module[-1].weight, std=0.001)
    return tower


def shrunk(config: SparseFormerConfig) -> SparseFormerConfig:
    """The configuration with as many tokens, channels and points, and fewer and narrower blocks, so that the large ones are tested soon."""
    if config.width < 1000:
        return config
    narrow = {width: 64 * (2 + i) for i, width in enumerate(sorted({unit.width for unit in config.units}))}
    units = [dataclasses.replace(unit, width=narrow[unit.width]) for unit in config.units]
    return dataclasses.replace(config, units=tuple(units[:5]))


def differences(plain: SparseFormer, fast: SparseFormer, pixels: torch.Tensor, **asked: object) -> float:
    """The largest of any output, of a first and of a second call."""
    with torch.inference_mode():
        wanted = plain(pixels, output_rois=True, **asked)
        found = [fast(pixels, output_rois=True, **asked) for _ in range(2)]
    pairs = [pair for out in found for pair in zip(flat(wanted), flat(out), strict=True)]
    assert all(one.shape == other.shape for one, other in pairs)
    return max((one - other).abs().max().item() for one, other in pairs)


def flat(output: tuple) -> list[torch.Tensor]:
    return [*output[:3], *output.rois_per_unit, *output.sampling_points]


def optimized(tower: SparseFormer) -> SparseFormer:
    return copy.deepcopy(tower).optimize_for_inference()


@pytest.fixture(params=["auto", "plain"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """With looks as compiled functions, where this machine compiles them, and by torch alone."""
    with kernels.using(request.param):
        yield request.param


@pytest.fixture(scope="module")
def tiny() -> SparseFormer:
    return SparseFormer.from_pretrained("tiny")


@pytest.fixture(scope="module")
def photos(tiny: SparseFormer) -> torch.Tensor:
    config = tiny.config
    return preprocess([load_image(path) for path in PHOTOS], config.image_size, config.image_mean, config.image_std)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_say_the_same(name: str) -> None:
    tower = stirred(shrunk(PUBLISHED[name]))
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        out = tower(pixels, output_rois=True)
    assert (out.last_hidden_state[0] - out.last_hidden_state[1]).abs().max() > 1e-2, "a tower that does not see its image shows nothing"
    assert (out.rois_per_unit[0] - tower.initial_rois()).abs().max() > 1e-4
    assert differences(tower, optimized(tower), pixels) < 1e-4


@pytest.mark.parametrize("family", ["clip_small", "v1_small"])
def test_the_authors_weights_say_the_same(family: str) -> None:
    folder = ROOT / "tests" / "fixtures" / "parity"
    data = load_file(folder / f"{family}.safetensors")
    weights = {name.removeprefix("weights."): value for name, value in data.items() if name.startswith("weights.")}
    tower = SparseFormer.from_released(SparseFormerConfig.from_released(json.loads((folder / f"{family}.json").read_text())), weights)
    fast = optimized(tower)
    with torch.inference_mode():
        plain, found = tower(data["input.pixels"]), fast(data["input.pixels"])
    assert (plain.image_embeds - found.image_embeds).abs().max() < 1e-4
    # these weights amplify rounding: as far as two machines are from each other, see tests/unit/tower/test_tower.py
    assert (plain.last_hidden_state - found.last_hidden_state).abs().max() < 5e-4


@pytest.mark.parametrize("count", [None, 9, 16, 18, 36, 48, 64])
def test_tiny_says_the_same_of_photos_at_any_number_of_tokens(tiny: SparseFormer, photos: torch.Tensor, count: int | None) -> None:
    assert len(photos) >= 2
    assert differences(tiny, optimized(tiny), photos, num_tokens=count) < 1e-4


def test_one_optimized_tower_serves_sizes_regions_and_numbers_in_any_order(tiny: SparseFormer, photos: torch.Tensor) -> None:
    fast = optimized(tiny)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0]])
    for pixels, asked in (
        (photos, {"region": (0.25, 0.25, 0.75, 0.75)}),  # before anything is known of whole images
        (photos[:2], {"region": boxes}),
        (photos, {}),
        (photos[:2], {"region": boxes}),
        (torch.randn(1, 3, 112, 224), {"num_tokens": 18}),
        (torch.randn(2, 3, 160, 224), {}),
        (photos[:1], {"num_tokens": 16}),
        (photos, {}),
    ):
        assert differences(tiny, fast, pixels, **asked) < 1e-4


def test_a_tower_that_starts_blind_knows_its_start_only_where_it_is_its_own() -> None:
    """Without a glance all up to the first look is the same for every image, unless a region moves where it begins."""
    unit = UnitConfig(64, ("ATTN", "ROI_ADJ", "SAMPLING_M", "PE_INJECT", "MLP"), repeats=2, activation="quick_gelu")
    config = SparseFormerConfig(
        units=(unit, UnitConfig(64, ("ATTN", "MLP"))), num_latent_tokens=9, embed_dim=32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        image_size=56, conv_dim=16, cls_before_unit=0, budgets=(4, 16), token_init="shared",
    )  # fmt: skip
    tower = stirred(config)
    fast = optimized(tower)
    pixels = torch.randn(2, 3, 56, 56)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0]])
    for asked in ({"region": boxes}, {}, {"region": boxes}, {"region": (0.0, 0.5, 0.5, 1.0)}, {"num_tokens": 4}, {}):
        assert differences(tower, fast, pixels, **asked) < 1e-4
    assert differences(tower, fast, pixels[:1]) < 1e-4
    assert fast.units()[0]._recorded and not fast.units()[1]._recorded


@pytest.mark.parametrize(
    "changes",
    [
        {"glance": RoIPatchConfig(14, 4, 4, norm_pre=True)},  # pooled: several patches a token
        {"glance": RoIPatchConfig(14, 3, 1)},  # pooled: a token a patch
        {"glance": RoIPatchConfig(14, 4, 4, kind="crop"), "cls_before_unit": None, "head": "map", "head_bias": True},
        {"glance": RoIPatchConfig(14, 4, 4, kind="crop"), "rois_init": "released"},  # no grid
    ],
)
@pytest.mark.parametrize("size", [(42, 42), (56, 56), (80, 64)])
def test_other_glances_and_heads_say_the_same(changes: dict[str, object], size: tuple[int, int]) -> None:
    units = (UnitConfig(64, ("SAMPLING_M", "ATTN", "MLP", "ROI_ADJ"), activation="gelu_tanh"), UnitConfig(128, ("ATTN", "MLP")))
    values = {
        "units": units, "num_latent_tokens": 9, "embed_dim": 32, "image_size": 56, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3,
        "conv_dim": 16, "token_init": "glance", "cls_before_unit": 0,
    }  # fmt: skip
    tower = stirred(SparseFormerConfig(**{**values, **changes}))
    torch.nn.init.normal_(tower.glance.pos_embed)
    assert differences(tower, optimized(tower), torch.randn(2, 3, *size)) < 1e-4


@pytest.fixture(scope="module")
def focused(tiny: SparseFormer) -> SparseFormer:
    """Tiny with a focus whose weights are random, which chooses other cells for each photo."""
    torch.manual_seed(0)
    tower = SparseFormer(dataclasses.replace(tiny.config, focus=FocusConfig(evenness=0.0))).eval()  # no photo keeps its grid
    tower.load_state_dict(tiny.state_dict(), strict=False)
    for parameter in tower.focus.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim < 2 else 1.4 * parameter[0].numel() ** -0.5)
    return tower


SIZES = torch.tensor([[224, 101], [57, 224], [160, 160], [224, 224]])


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"num_tokens": 20},
        {"region": torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.9, 0.7], [0.0, 0.5, 0.5, 1.0]])},
        {"image_sizes": SIZES},
        {"image_sizes": SIZES, "region": (0.25, 0.25, 0.75, 0.75), "num_tokens": 36},
    ],
    ids=["whole", "fewer", "regions", "canvases", "regions of canvases"],
)
def test_a_tower_with_a_focus_says_the_same(focused: SparseFormer, photos: torch.Tensor, asked: dict[str, object]) -> None:
    pixels = photos[torch.arange(4) % len(photos)]
    begun: list[torch.Tensor] = []
    hook = focused.glance.register_forward_pre_hook(lambda _, given: begun.append(given[1]))
    with torch.inference_mode():
        focused(pixels, **asked)
    hook.remove()
    areas = (begun[0][..., 2:] - begun[0][..., :2]).prod(-1)
    assert areas.max() > 3.9 * areas.min() and not torch.allclose(begun[0][0], begun[0][1]), "no cells of their own"
    assert differences(focused, optimized(focused), pixels, **asked) < 1e-4


def test_cells_by_hand_and_canvases_without_a_focus_say_the_same(tiny: SparseFormer, focused: SparseFormer, photos: torch.Tensor) -> None:
    low = torch.rand(2, 25, 2, generator=torch.Generator().manual_seed(0)) * 0.8
    cells = torch.cat([low, low + 0.2], dim=-1)
    for tower in (tiny, focused):
        fast = optimized(tower)
        assert differences(tower, fast, photos[:2], cells=cells, num_tokens=25) < 1e-4
        assert differences(tower, fast, photos[:2], image_sizes=SIZES[:2]) < 1e-4
        assert differences(tower, fast, photos[:2]) < 1e-4


def test_a_focus_in_bfloat16_chooses_by_maps_that_are_as_near_as_the_plain_ones(focused: SparseFormer, photos: torch.Tensor) -> None:
    halved = copy.deepcopy(focused).bfloat16()
    with torch.inference_mode():
        exact, plain = focused.focus(photos), halved.focus(photos.bfloat16())
        fast = halved.optimize_for_inference().focus(photos.bfloat16())
    assert (fast - exact).abs().mean() < max(1.2 * (plain - exact).abs().mean(), 1e-4)
    with torch.inference_mode():
        assert halved(photos.bfloat16()).image_embeds.isfinite().all()


def test_a_vit_says_the_same() -> None:
    config = BASELINES["clip-b32"].config
    config = dataclasses.replace(config, units=config.units[:2])
    tower = stirred(config)
    assert differences(tower, optimized(tower), torch.randn(2, 3, 224, 224)) < 1e-4


def test_cells_are_cut_out_of_the_picture(tiny: SparseFormer, photos: torch.Tensor, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    fast = optimized(tiny)

    def sampled(*_: object) -> None:
        raise AssertionError("sampled one by one")

    monkeypatch.setattr("sparse_vlm.tower.layers.crop_rois", sampled)
    with torch.inference_mode():
        fast(photos)
        fast(photos, num_tokens=36)
        if way == "plain":
            with pytest.raises(AssertionError, match="one by one"):
                fast(photos, region=(0.0, 0.0, 0.5, 0.5))
        else:
            fast(photos, region=(0.0, 0.0, 0.5, 0.5))
            fast(photos, image_sizes=SIZES[: len(photos)])


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_tower(tiny: SparseFormer, photos: torch.Tensor) -> None:
    halved = copy.deepcopy(tiny).bfloat16()
    with torch.inference_mode():
        exact, plain = tiny(photos), halved(photos)
        fast = halved.optimize_for_inference()(photos)
    assert fast.rois.dtype == torch.float32 and fast.last_hidden_state.dtype == torch.bfloat16
    for field in ("last_hidden_state", "image_embeds"):
        wanted = getattr(exact, field)
        lost = [1 - F.cosine_similarity(getattr(out, field).float(), wanted, dim=-1).mean().item() for out in (plain, fast)]
        assert lost[1] < max(1.5 * lost[0], 1e-5), field


def test_without_onednn_it_says_the_same(tiny: SparseFormer, photos: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "onednn_is_supported", lambda dtype: False)
    assert differences(tiny, optimized(tiny), photos[:1]) < 1e-4
    vit = stirred(dataclasses.replace(BASELINES["clip-b32"].config, units=BASELINES["clip-b32"].config.units[:1]))  # with quick_gelu
    assert differences(vit, optimized(vit), torch.randn(1, 3, 224, 224)) < 1e-4


def test_what_it_can_no_longer_do_is_said(tmp_path: Path) -> None:
    unit = UnitConfig(64, ("SAMPLING_M", "ATTN", "MLP"))
    tower = stirred(SparseFormerConfig((unit,), 9, 32, (0.5,) * 3, (0.5,) * 3, head="avg"))
    assert tower.optimize_for_inference() is tower
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(RuntimeError, match="cannot be saved"):
        tower.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="cannot be moved"):
        tower.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="optimized already"):
        tower.optimize_for_inference()


def test_the_weights_that_it_was_made_of_stay_as_they_are(tiny: SparseFormer) -> None:
    """Those of another tower may be the same tensors."""
    other = SparseFormer(tiny.config)
    other.load_state_dict(tiny.state_dict(), assign=True)
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    other.optimize_for_inference()
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
