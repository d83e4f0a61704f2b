"""Cells of any place and size, the focus and its placement as compiled functions: what torch computes, within rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_vlm.kernels.cpu import native
from sparse_vlm.roi import crop_rois, roi_average_weights
from sparse_vlm.tower.compiled import CompiledFocus
from sparse_vlm.tower.config import FocusConfig
from sparse_vlm.tower.focus import Focus

DTYPES = {torch.float32: 5e-4, torch.bfloat16: 1e-2}  # what a pixel may be off by; coordinates have seven digits
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not native.is_supported(torch.float32, 64):
        pytest.skip("no C++ compiler that takes our sources here")
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3], ids=["1 thread", "3 threads"])
def threads(request: pytest.FixtureRequest) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def cells(batch: int) -> Tensor:
    """The whole image, an even grid's corner, one much wider than high, one partly outside, a mirrored one, and others."""
    some = [[0, 0, 1, 1], [0, 0, 0.25, 0.25], [0.1, 0.4, 0.9, 0.45], [-0.2, 0.8, 0.3, 1.3], [0.7, 0.2, 0.4, 0.6], [0.5, 0.5, 0.5, 0.5]]
    low = torch.rand(batch, 9, 2) * 0.8
    return torch.cat([torch.tensor(some).float().expand(batch, -1, -1), torch.cat([low, low + torch.rand(batch, 9, 2) * 0.3], -1)], dim=1)


@dtypes
@pytest.mark.parametrize("size", [32, 14])
@pytest.mark.parametrize("canvas", [(224, 224), (97, 333), (1, 200), (20, 20)])
def test_cells_are_cut_as_they_are_sampled(dtype: torch.dtype, size: int, canvas: tuple[int, int], threads: None) -> None:
    pixels, rois = torch.randn(2, 3, *canvas).to(dtype), cells(2)
    found = native.crop_rois(pixels, rois, size)
    assert found.dtype == dtype and found.shape == (2, 15, 3, size, size)
    assert (found.double() - crop_rois(pixels.double(), rois, size)).abs().max() < DTYPES[dtype]


@dtypes
@pytest.mark.parametrize("sides", [(60, 97), (61, 33), (1, 1), (96, 128)])
def test_nothing_beyond_an_image_is_read(dtype: torch.dtype, sides: tuple[int, int], threads: None) -> None:
    canvas, rois = torch.full((2, 3, 96, 128), torch.nan, dtype=dtype), cells(2)
    extent = torch.tensor([[sides[1] / 128, sides[0] / 96], [1.0, 1.0]])
    alone = torch.randn(3, *sides).to(dtype)
    canvas[0, :, : sides[0], : sides[1]], canvas[1] = alone, 7.0
    found = native.crop_rois(canvas, rois, 16, extent)
    sampled = crop_rois(alone[None].float(), rois[:1], 16)
    on_canvas = crop_rois(canvas.nan_to_num().float(), rois, 16, extent)
    assert (found[1].float() - 7).abs().max() < DTYPES[dtype]
    assert (found.float() - on_canvas).abs().max() < DTYPES[dtype]
    assert (found[:1].float() - sampled).abs().max() < DTYPES[dtype], "as on a canvas that ends where the image does"


@dtypes
def test_positions_are_means_over_cells(dtype: torch.dtype, threads: None) -> None:
    positions, rois = torch.randn(16 * 16, 40), cells(3)
    wanted = roi_average_weights(rois, 16, 16, 4) @ positions
    found = native.average_positions(rois, positions, 4, dtype)
    assert found.dtype == dtype and (found.float() - wanted).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


def focus(**changes: object) -> Focus:
    made = Focus(FocusConfig(**changes)).requires_grad_(False)
    for parameter in made.parameters():
        # large enough that maps differ from place to place
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim < 2 else 1.4 * parameter[0].numel() ** -0.5)
    return made


@dtypes
@pytest.mark.parametrize("changes", [{}, {"size": 75, "channels": (16, 48, 32, 16)}])
def test_the_focus_predicts_the_same_maps(dtype: torch.dtype, changes: dict[str, object], threads: None) -> None:
    plain, pixels = focus(**changes).to(dtype), torch.randn(4, 3, 96, 120).to(dtype)
    ours, exact = CompiledFocus(plain), focus(**changes).double()
    exact.load_state_dict(plain.state_dict())
    region, extent = torch.tensor([[0.1, 0.2, 0.7, 0.9]]).expand(4, 4), torch.tensor([[0.5, 1.0]]).expand(4, 2)
    for asked in ((None, None), (region, None), (None, extent), (region, extent)):
        wanted = exact(pixels.double(), *asked)
        assert wanted.std() > 0.02
        for count in (1, 4):  # fewer images than threads, and more
            found = ours(pixels[:count], *(None if each is None else each[:count] for each in asked))
            assert found.dtype == torch.float32
            assert (found - wanted[:count]).abs().max() < (2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("count", [9, 10, 11, 12, 16, 25, 36, 48, 49, 64])
def test_cells_are_placed_as_torch_places_them(count: int, threads: None) -> None:
    plain = focus()
    ours = CompiledFocus(plain)
    aspects = torch.cat([torch.tensor([1.0, 4.0, 0.25, 4 / 3, 16 / 9, 0.1]), (torch.randn(58) * 0.7).exp()])
    maps = torch.nn.functional.interpolate(torch.randn(64, 3, 4, 4), 8, mode="bilinear")
    wanted, found = plain.place(maps, aspects, count), ours.place(maps, aspects, count)
    assert found.shape == (64, count, 4) and (found - wanted).abs().max() < 1e-6
    if count >= 16:
        assert len({round(area.item(), 5) for area in (found[..., 2:] - found[..., :2]).prod(-1).unique()}) > 2


def test_maps_that_are_no_numbers_place_cells_that_tile_the_image(threads: None) -> None:
    found = CompiledFocus(focus()).place(torch.full((1, 3, 8, 8), torch.nan), torch.ones(1), 49)
    assert (found[..., 2:] - found[..., :2]).prod(-1).sum().item() == pytest.approx(1)


def test_shapes_that_are_not_whole_vectors_are_left_to_torch() -> None:
    assert native.Focus.is_supported(focus()) and not native.Focus.is_supported(focus(channels=(16, 24, 32, 48)))
