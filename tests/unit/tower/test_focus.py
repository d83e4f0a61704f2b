"""Cells by content, and images of any shape on one canvas."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_tower import elastic

from sparse_vlm import SparseFormer
from sparse_vlm.distill.recipes import changed, get_recipe
from sparse_vlm.distill.shrink import clip_to_boxes, place_patches, shrink
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.roi import crop_level, crop_rois, grid_rois, grid_rois_for, image_pyramid, pyramid_row
from sparse_vlm.teachers import TeacherSpec
from sparse_vlm.tower import FocusConfig
from sparse_vlm.tower.focus import MAP, SCALES, Focus, area_bias, coarse_cells, variation
from sparse_vlm.train.batches import LiveViews, collate, live_statistics


def focused(**changes: object) -> SparseFormer:
    """A warm-start tower for 4 to 25 tokens that places its cells."""
    tower = elastic(focus=FocusConfig(size=32, channels=(4, 4, 8, 8)), image_size=112, fit="whole", **changes)
    torch.nn.init.normal_(tower.focus.head.weight)
    return tower


def maps(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, len(SCALES), MAP, MAP, generator=torch.Generator().manual_seed(seed))


def covered(cells: torch.Tensor, side: int = 96) -> torch.Tensor:
    """How many cells lie over each point of a fine raster, (B, side, side)."""
    at = (torch.arange(side) + 0.5) / side
    inside = [(at >= cells[..., i : i + 1]) & (at < cells[..., i + 2 : i + 3]) for i in (0, 1)]
    return torch.einsum("bny,bnx->byx", inside[1].float(), inside[0].float())


@pytest.mark.parametrize("aspect", [0.1, 0.75, 1.0, 1.5, 10.0])
def test_grids_of_several_images_are_those_of_each(aspect: float) -> None:
    for count in (1, 7, 16, 48, 49, 64):
        both = grid_rois_for(count, torch.tensor([1.0, aspect]))
        assert torch.allclose(both[0], grid_rois(count)) and torch.allclose(both[1], grid_rois(count, aspect))


@pytest.mark.parametrize("count", range(9, 65, 5))
def test_cells_tile_the_image_at_any_budget_and_aspect(count: int) -> None:
    cells = Focus(FocusConfig()).place(maps(4), torch.tensor([1.0, 4 / 3, 0.4, 6.0]), count)
    assert cells.shape == (4, count, 4)
    assert torch.equal(covered(cells), torch.ones(4, 96, 96)), "every point lies in one cell"
    assert len(torch.unique(cells[0], dim=0)) == count


def test_splits_are_those_that_a_greedy_search_finds() -> None:
    """Split the cell of the highest score, again and again; no cell scores above the one that it is a quarter of."""
    focus = Focus(FocusConfig(evenness=0.0))  # no image is even
    field = maps(1, seed=5)
    found = focus.place(field, torch.ones(1), 25)[0]
    from sparse_vlm.tower.focus import _gain, _quarters

    open_cells = [(_gain(field, cell.view(1, 1, 4)).item(), 0, cell) for cell in grid_rois(coarse_cells(25))]
    leaves: list[torch.Tensor] = []
    while len(open_cells) + len(leaves) < 25:
        open_cells.sort(key=lambda each: -each[0])
        score, level, cell = open_cells.pop(0)
        for quarter in _quarters(cell.view(1, 1, 1, 4))[0, 0]:
            if level == 1:
                leaves.append(quarter)
            else:
                open_cells.append((min(0.999 * score, _gain(field, quarter.view(1, 1, 4)).item()), 1, quarter))
    wanted = torch.stack(leaves + [cell for _, _, cell in open_cells])
    assert {tuple(c) for c in found.mul(96).round().tolist()} == {tuple(c) for c in wanted.mul(96).round().tolist()}


def test_an_even_image_keeps_the_grid_and_an_uneven_one_gets_small_cells() -> None:
    even = torch.zeros(1, len(SCALES), MAP, MAP)
    corner = torch.full_like(even, -6.0)
    corner[..., :2, :2] = 2.0
    focus = Focus(FocusConfig())
    cells = focus.place(torch.cat([even, corner]), torch.ones(2), 49)
    assert torch.allclose(cells[0], grid_rois(49))
    areas = (cells[1, :, 2:] - cells[1, :, :2]).prod(-1)
    smallest = cells[1, areas < 1.1 / 256]
    assert len(smallest) == 16 and smallest[:, 2:].max() < 0.3, "the smallest cells lie where the map is high"


def test_variation_is_the_variance_of_patches_in_windows() -> None:
    patches = torch.zeros(1, 256, 2)
    patches[0, :, 0] = (torch.arange(256) % 2) * 2.0  # columns of 0 and 2: variance 1 in any even window
    assert torch.allclose(variation(patches, torch.tensor(1.0)), torch.zeros(1, 3, MAP, MAP), atol=1e-5)
    half = torch.zeros(1, 16, 16, 1)
    half[:, :, 8:] = torch.randn(1, 16, 8, 1, generator=torch.Generator().manual_seed(0))
    found = variation(half.flatten(1, 2), torch.tensor(1.0))
    assert found[0, 2, :, :4].max() < -9 < -3 < found[0, 2, :, 4:].mean()


def test_keys_count_by_their_area() -> None:
    cells = torch.tensor([[[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 0.5], [0.5, 0.5, 1.0, 1.0]]])
    assert torch.allclose(area_bias(cells, 0.5).exp(), torch.tensor([[0.5, 0.25, 0.25]]).div(1 / 3).sqrt())
    assert torch.allclose(area_bias(grid_rois(9)[None], 0.5), torch.zeros(1, 9), atol=1e-5)


def test_a_cell_is_read_from_the_level_nearest_to_its_size() -> None:
    image = torch.rand(1, 3, 64, 48)
    levels = crop_level(64, 48, 8)
    atlas = image_pyramid(image, levels)
    half = torch.nn.functional.avg_pool2d(image, 2)
    assert torch.equal(atlas[..., :32, 48:72], half) and torch.equal(atlas[..., 32:48, 48:60], torch.nn.functional.avg_pool2d(half, 2))
    assert [pyramid_row(64, k) for k in (1, 2, 3)] == [0, 32, 48]
    rois = torch.tensor([[[0.0, 0.0, 16 / 48, 16 / 64], [16 / 48, 16 / 64, 24 / 48, 24 / 64]]])
    crops = crop_rois(image, rois, 8)
    assert torch.allclose(crops[0, 0], half[0, :, :8, :8], atol=1e-5) and torch.allclose(crops[0, 1], image[0, :, 16:24, 16:24], atol=1e-5)


@pytest.mark.parametrize("looks", [False, True])
def test_nothing_beyond_an_image_matters(looks: bool) -> None:
    tower = focused(looks=looks)
    image = torch.randn(1, 3, 72, 100)
    canvas = 100 * torch.randn(2, 3, 112, 128)
    canvas[0, :, :72, :100] = image[0]
    canvas[1] = torch.randn(3, 112, 128)
    with torch.no_grad():
        alone = tower(image)
        together = tower(canvas, image_sizes=torch.tensor([[72, 100], [112, 128]]))
    assert torch.allclose(alone.rois[0], together.rois[0], atol=1e-5)
    assert torch.allclose(alone.last_hidden_state[0], together.last_hidden_state[0], atol=1e-4)


def test_sizes_that_do_not_fit_are_refused() -> None:
    tower, pixels = focused(), torch.randn(2, 3, 64, 64)
    for sizes in ([[64, 65], [64, 64]], [[0, 64], [64, 64]], [[64, 64]]):
        with pytest.raises(ValueError, match="image_sizes"):
            tower(pixels, image_sizes=torch.tensor(sizes))
    with pytest.raises(ValueError, match="cells"):
        tower(pixels, cells=torch.rand(1, 9, 4))
    with pytest.raises(ValueError, match="not 26"):
        tower(pixels, cells=torch.rand(2, 26, 4))


def test_cells_can_be_placed_by_hand_and_follow_a_region(tmp_path: Path) -> None:
    tower, pixels = focused(), torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        out = tower(pixels)
        assert torch.equal(tower(pixels, cells=out.rois).last_hidden_state, out.last_hidden_state)
        inside = tower(pixels, region=(0.5, 0.0, 1.0, 0.5))
        alone = tower(pixels[..., :56, 56:])
    assert torch.allclose(inside.rois, alone.rois / 2 + torch.tensor([0.5, 0.0, 0.5, 0.0]), atol=1e-5)
    tower.save_pretrained(tmp_path)
    assert torch.equal(SparseFormer.from_pretrained(tmp_path)(pixels).last_hidden_state, out.last_hidden_state)
    assert SparseFormer.from_pretrained(tmp_path).config == tower.config


def test_a_focus_needs_budgets_and_crops() -> None:
    with pytest.raises(ValueError, match="focus"):
        dataclasses.replace(focused().config, budgets=None)


def test_a_view_that_is_shown_small_is_the_view() -> None:
    pixels = torch.randint(0, 256, (8, 3, 96, 64), dtype=torch.uint8)
    sizes = torch.tensor([[96, 64]] * 8)
    shown, new, boxes = shrink(pixels, sizes, 1.0, 80, torch.Generator().manual_seed(0))
    again = shrink(pixels, sizes, 1.0, 80, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip((shown, new, boxes), again, strict=True))
    assert shown.shape == (8, 3, 96, 80) and torch.equal(new, torch.full((8, 2), 80))
    for image, view, box in zip(shown, pixels, boxes, strict=True):
        left, top, right, bottom = (box * 80).round().long().tolist()
        wanted = torch.nn.functional.interpolate(view[None].float(), size=(bottom - top, right - left), mode="bilinear", antialias=True)[0]
        assert (image[:, top:bottom, left:right].float() - wanted).abs().max() <= 0.5 + 1e-3
    untouched, same, whole = shrink(pixels, sizes, 0.0, 80, torch.Generator().manual_seed(0))
    assert (
        torch.equal(untouched[..., :64], pixels) and torch.equal(same, sizes) and torch.equal(whole[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    )


def test_what_the_teacher_says_of_a_view_lies_in_its_box() -> None:
    patches, background = torch.randn(1, 16, 3), torch.tensor([5.0, 6.0, 7.0])
    box = torch.tensor([[0.5, 0.0, 1.0, 0.5]])
    part, inside = clip_to_boxes(torch.tensor([[[0.5, 0.0, 0.75, 0.25], [0.25, 0.0, 0.75, 0.5], [0.0, 0.5, 0.5, 1.0]]]), box)
    assert inside.tolist() == [[1.0, 0.5, 0.0]] and part[0, 1].tolist() == [0.0, 0.0, 0.5, 1.0]
    put = place_patches(patches, box, background).unflatten(1, (4, 4))[0]
    assert torch.allclose(put[2:], background.expand(2, 4, 3)) and torch.allclose(put[:2, :2], background.expand(2, 2, 3))
    assert torch.allclose(put[0, 2], patches[0].unflatten(0, (4, 4))[:2, :2].mean((0, 1)), atol=0.5)
    even = torch.ones(1, 16, 3)
    assert torch.allclose(place_patches(even, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), background), even)


def test_a_tower_that_places_cells_compiles_whole() -> None:
    """Nothing in it depends on values but the choice of cells, also of images of several sizes, in a batch of any."""
    tower, pixels = focused().requires_grad_(False), torch.randn(2, 3, 112, 96)
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for sizes in (None, torch.tensor([[112, 40], [33, 96]])):
        wanted, found = tower(pixels, image_sizes=sizes), compiled(pixels, image_sizes=sizes)
        assert torch.allclose(found.last_hidden_state, wanted.last_hidden_state, atol=1e-5)


def test_quarters_that_vary_alike_beyond_the_whole_are_told_apart() -> None:
    """All that a cell gains may lie at a finer scale; which quarters are split does not hang on how equals are ordered."""
    fine = maps()
    fine[:, :2] -= 9
    place, aspects = Focus(FocusConfig(evenness=0.0)).place, torch.ones(3)
    plain = place(fine, aspects, 36)
    mirrored = place(fine.flip(-1), aspects, 36)
    mirrored = torch.stack([1 - mirrored[..., 2], mirrored[..., 1], 1 - mirrored[..., 0], mirrored[..., 3]], dim=-1)

    def ordered(cells: torch.Tensor) -> list[list[list[float]]]:
        return [sorted(image) for image in cells.mul(1e4).round().tolist()]

    assert ordered(plain) == ordered(mirrored)


def test_a_teacher_is_shown_squares_of_whole_views(tmp_path: Path) -> None:
    for i, size in enumerate([(80, 60), (60, 90), (70, 70)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{i}.png")
    views = ViewSet(PhotoSet(tmp_path), 2, 56, fit="whole")
    asked: list[tuple[int, ...]] = []

    def ask(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(tuple(pixels.shape))
        return torch.randn(len(pixels), 8), torch.randn(len(pixels), 16, 4)

    live_statistics(views, [0, 1, 2], ask)
    assert asked == [(3, 3, 56, 56)]
    batch = collate([LiveViews(views, [0, 1, 2], 112)[i] for i in range(3)])
    assert batch["image_sizes"].tolist() == [[60, 80], [90, 60], [70, 70]] and batch["teacher_pixels"].shape == (3, 3, 56, 56)
    assert torch.equal(batch["pixels"][1, :, :90, :60], views.for_student(1, 112)) and not batch["pixels"][1, :, 90:].any()


@pytest.mark.parametrize(("recipe", "change"), [("adaptive", "mixed=0.5"), ("tiny", "small=0.25")])
def test_numbers_that_do_not_go_together_are_refused_with_the_teacher(recipe: str, change: str) -> None:
    spec = TeacherSpec("vit", 64, 2, 1, 56, 14, 32, (0.5,) * 3, (0.5,) * 3, "gelu", 1e-5, norm_pre=False)
    with pytest.raises(UserError, match=change.partition("=")[0]):
        changed(get_recipe(recipe), [change]).config(spec)


def test_the_grid_that_is_split_has_full_rows_where_it_can() -> None:
    assert [coarse_cells(number) for number in (16, 25, 36, 49, 64)] == [4, 16, 12, 16, 25]
    assert all(0 < coarse_cells(number) < number and (number - coarse_cells(number)) % 3 == 0 for number in range(9, 65))
