"""One tower at any number of tokens, and inside any region."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_vlm
import torch
import torch.nn.functional as F
from tiny_tower import elastic

from sparse_vlm import VLM, SparseFormer
from sparse_vlm.errors import UserError
from sparse_vlm.roi import crop_boxes, crop_rois, grid_rois, roi_average_weights
from sparse_vlm.tower import RoIPatchConfig
from sparse_vlm.tower.cost import count_macs


def test_a_roi_on_pixel_borders_is_cropped_as_it_is() -> None:
    picture = torch.rand(2, 3, 32, 48)
    rois = torch.tensor([[0.0, 0.0, 1 / 3, 0.5], [1 / 3, 0.5, 2 / 3, 1.0]]).expand(2, -1, -1)
    crops = crop_rois(picture, rois, 16)
    assert crops.shape == (2, 2, 3, 16, 16)
    assert torch.allclose(crops[:, 0], picture[..., :16, :16], atol=1e-5)
    assert torch.allclose(crops[:, 1], picture[..., 16:, 16:32], atol=1e-5)


def test_a_larger_roi_is_averaged_and_not_skipped() -> None:
    picture = torch.rand(1, 3, 64, 64)
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    assert torch.allclose(crop_rois(picture, whole, 16)[:, 0], F.avg_pool2d(picture, 4), atol=1e-5)


def test_a_crop_by_products_is_the_crop_by_samples() -> None:
    images = torch.rand(3, 3, 40, 56)
    boxes = torch.tensor([[0.1, 0.2, 0.45, 0.7], [0.0, 0.0, 0.35, 0.5], [0.55, 0.3, 0.6, 0.9]])
    assert torch.allclose(crop_boxes(images, boxes, 16, 1), crop_rois(images, boxes.unsqueeze(1), 16)[:, 0], atol=1e-5)


def test_crops_follow_their_rois() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    rois = torch.tensor([[[0.25, 0.25, 0.5, 0.5]]], requires_grad=True)
    crop_rois(ramp, rois, 8).mean().backward()
    assert rois.grad[0, 0, 0] > 0.1 and rois.grad[0, 0, 2] > 0.1, "moved to the right, a crop of the ramp is brighter"
    assert rois.grad[0, 0, 1].abs() < 1e-5 and rois.grad[0, 0, 3].abs() < 1e-5


def test_cropping_begins_where_pooling_begins_when_cells_are_patches() -> None:
    crop, pool = elastic(), elastic(budgets=None, glance=RoIPatchConfig(14, 4, 1, norm_pre=True))
    pool.load_state_dict(crop.state_dict())
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert torch.allclose(crop(pixels).last_hidden_state, pool(pixels).last_hidden_state, atol=1e-5)


@pytest.mark.parametrize("count", [4, 7, 16, 25])
def test_one_set_of_weights_at_any_budget(count: int, tmp_path: Path) -> None:
    tower = elastic(looks=True)
    tower.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        out = tower(pixels, num_tokens=count, output_rois=True)
        assert (out.last_hidden_state.shape, out.rois.shape) == ((2, count + 1, 64), (2, count, 4))
        assert torch.allclose(tower.initial_rois(count), grid_rois(count))
        loaded = SparseFormer.from_pretrained(tmp_path, num_tokens=count)
        assert loaded.config.visual_tokens == count
        assert torch.equal(loaded(pixels).last_hidden_state, out.last_hidden_state)
        assert loaded.visual_tokens(pixels).shape == (2, count, 64)
    assert (count_macs(loaded.config).total < count_macs(tower.config).total) == (count < 16)


def test_budgets_that_a_tower_was_not_made_for_are_refused(tmp_path: Path) -> None:
    elastic().save_pretrained(tmp_path / "elastic")
    elastic(budgets=None).save_pretrained(tmp_path / "fixed")
    with pytest.raises(UserError, match="4 to 25 tokens, not 26"):
        SparseFormer.from_pretrained(tmp_path / "elastic", num_tokens=26)
    with pytest.raises(UserError, match="16 tokens only, not 9"):
        SparseFormer.from_pretrained(tmp_path / "fixed", num_tokens=9)
    with pytest.raises(ValueError, match="not 3"):
        elastic()(torch.zeros(1, 3, 56, 56), num_tokens=3)
    with pytest.raises(ValueError, match="outside of the budgets"):
        elastic(budgets=(20, 25))
    with pytest.raises(ValueError, match="token_init"):
        elastic(token_init="each", glance=None)
    assert not elastic().initial_roi.weight.requires_grad, "a grid at one budget and not at another would be no function of the budget"


def test_a_region_is_looked_at_as_if_it_were_all_there_is() -> None:
    tower = elastic()
    pixels = torch.randn(2, 3, 112, 224)
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0], [0.5, 0.0, 0.75, 0.5]])
    with torch.no_grad():
        one = tower(pixels, region=(0.25, 0.5, 0.5, 1.0))
        alone = tower(pixels[..., 56:, 56:112])
        each = tower(pixels, region=boxes)
        second = tower(pixels[1:, :, :56, 112:168])
    assert torch.allclose(one.last_hidden_state, alone.last_hidden_state, atol=1e-4)
    assert torch.allclose(each.image_embeds[1:], second.image_embeds, atol=1e-4)
    assert torch.allclose(one.rois[0, 0], torch.tensor([0.25, 0.5, 0.3125, 0.625])), "RoIs are of the whole image"


def test_cells_are_square_whatever_the_pictures_shape() -> None:
    tower = elastic()
    with torch.no_grad():
        wide = tower(torch.randn(1, 3, 56, 112), num_tokens=18)
        zoomed = tower(torch.randn(1, 3, 56, 56), num_tokens=18, region=(0.0, 0.0, 1.0, 0.5))
    sides = (wide.rois[0, :, 2:] - wide.rois[0, :, :2]) * torch.tensor([112, 56])
    assert torch.allclose(sides, torch.full((18, 2), 56 / 3), atol=1e-3), "3 rows of 6"
    assert torch.allclose(zoomed.rois[0, :, 2:] - zoomed.rois[0, :, :2], torch.tensor([1 / 6, 1 / 6]), atol=1e-4)
    fixed = elastic(budgets=None)
    with torch.no_grad():
        assert torch.equal(fixed(torch.randn(1, 3, 56, 112)).rois[0], grid_rois(16)), "a tower of one budget keeps what it learnt"


@pytest.mark.parametrize("region", [(0.5, 0.5, 0.5, 1.0), (0.0, 0.0, 1.1, 1.0), (0.9, 0.0, 0.1, 1.0)])
def test_what_is_no_region_is_refused(region: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= x0 < x1 <= 1"):
        elastic()(torch.zeros(1, 3, 56, 56), region=region)


def test_a_pooling_glance_cannot_begin_in_a_region() -> None:
    tower = elastic(budgets=None, glance=RoIPatchConfig(14, 4, 1, norm_pre=True))
    with pytest.raises(ValueError, match="region"):
        tower(torch.zeros(1, 3, 56, 56), region=(0.0, 0.0, 0.5, 0.5))


def test_the_objective_averages_the_teachers_patches_over_the_budgets_cells() -> None:
    from sparse_vlm.distill.loss import Distillation, Statistics

    tower = elastic()
    model = Distillation(tower, Statistics(torch.zeros(32), torch.zeros(64), torch.eye(32), torch.tensor(1.0)), dense_weight=1.0)
    pixels = torch.randint(0, 255, (2, 3, 56, 56), dtype=torch.uint8)
    embeds, patches = torch.randn(2, 32), torch.randn(2, 16, 64)
    with torch.no_grad():
        found = model(pixels, embeds, patches, num_tokens=9)
        out = tower((pixels / 255 - 0.5) / 0.5, num_tokens=9)
        wanted = roi_average_weights(grid_rois(9), 4, 4) @ patches
    assert found["token_cosine"] == pytest.approx(F.cosine_similarity(out.last_hidden_state[:, 1:], wanted, dim=-1).mean().item(), abs=1e-4)


def test_a_run_draws_budgets_and_draws_them_again_after_a_resume() -> None:
    from types import SimpleNamespace

    from sparse_vlm.train.distillation import BootstrapTrainer

    run = SimpleNamespace(args=SimpleNamespace(seed=0), budgets=(9, 64))
    drawn = [BootstrapTrainer.budget(run, step) for step in range(2000)]
    assert drawn[100:] == [BootstrapTrainer.budget(run, step) for step in range(100, 2000)]
    others = [count for count in drawn if count is not None]
    assert 900 < len(others) < 1100 and min(others) == 9 and max(others) == 64
    run.budgets = None
    assert BootstrapTrainer.budget(run, 0) is None


def test_a_vlm_keeps_the_budget_it_was_made_with(tmp_path: Path) -> None:
    config = dataclasses.replace(elastic().config, image_size=32)
    SparseFormer(config).save_pretrained(tmp_path / "tower")
    llm = tiny_vlm.save_llm(tmp_path / "llm")
    vlm = VLM.build(tmp_path / "tower", llm, num_tokens=9)
    vlm.new_projector = False
    vlm.save_pretrained(tmp_path / "vlm")
    assert vlm.tokens_per_image == VLM.from_pretrained(tmp_path / "vlm").tokens_per_image == 9
    fewer = VLM.from_pretrained(tmp_path / "vlm", num_tokens=4)
    assert fewer.tokens_per_image == 4
    assert fewer.image_features([tiny_vlm.picture("red")])[0].shape[0] == 4
    with pytest.raises(UserError, match="4 to 25 tokens"):
        VLM.from_pretrained(tmp_path / "vlm", num_tokens=49)


def test_the_command_line_looks_with_as_many_tokens_as_asked(command: Callable[..., Any], tmp_path: Path) -> None:
    elastic(looks=True).save_pretrained(tmp_path / "tower")
    tiny_vlm.picture("red").save(tmp_path / "red.png")
    verb = ["look", str(tmp_path / "red.png"), "--model", str(tmp_path / "tower"), "--json", "--tokens"]
    done = command(*verb, "7")
    assert done.returncode == 0, done.stderr
    assert {len(step["rois"]) for step in json.loads(done.stdout)["steps"]} == {7}
    done = command(*verb, "64")
    assert done.returncode == 2 and "4 to 25 tokens" in done.stderr and "Traceback" not in done.stderr


def test_a_budget_is_measured_under_a_name_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="measuring beside a teacher needs open_clip")
    from sparse_vlm.eval.embedders import tower_embedder

    elastic().save_pretrained(tmp_path)
    few, own = tower_embedder(str(tmp_path), num_tokens=9), tower_embedder(str(tmp_path))
    assert (few.name, few.tokens, own.name, own.tokens) == (f"{tmp_path}, 9 tokens", 9, str(tmp_path), 16)
    assert few.macs < own.macs
    red = few.pixels([tiny_vlm.picture("red")])
    assert not torch.equal(few.encode(red), own.encode(red))


def test_a_tower_of_one_number_of_tokens_stands_beside_one_of_several(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="measuring beside a teacher needs open_clip")
    from eval_fakes import evaluate, photos_of, write_tar

    from sparse_vlm.eval.tasks import TASKS

    elastic().save_pretrained(tmp_path / "elastic")
    elastic(budgets=None).save_pretrained(tmp_path / "fixed")
    for file in TASKS["knn"].files:
        rows = photos_of(50)
        if "misc" in file:
            sets = ("imagenette", "imagewoof", "pacs")
            rows = [(f"{name}_{key}", colour, {**info, "set": name}) for name in sets for key, colour, info in rows]
        write_tar(tmp_path / file, rows)
    both, fixed = [str(tmp_path / "elastic"), str(tmp_path / "fixed")], str(tmp_path / "fixed")
    report = evaluate(both, ["knn"], tmp_path, budgets=[9, 25])
    assert {name.removeprefix(f"{tmp_path}/"): model["tokens"] for name, model in report.models.items()} == {
        "elastic, 9 tokens": 9, "elastic, 25 tokens": 25, "fixed": 16,
    }  # fmt: skip
    with pytest.raises(UserError, match="16 tokens only"):
        evaluate([fixed], ["knn"], tmp_path, budgets=[9])


def test_a_tower_that_sees_whole_pictures_is_not_measured_on_regions(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="measuring beside a teacher needs open_clip")
    from sparse_vlm.eval.embedders import tower_embedder

    pools = elastic(budgets=None, glance=RoIPatchConfig(14, 4, 1, norm_pre=True))
    pools.save_pretrained(tmp_path)
    embedder, corner = tower_embedder(str(tmp_path)), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    with pytest.raises(UserError, match="region"):
        embedder.encode(embedder.pixels([tiny_vlm.picture("red")]), corner)
    with pytest.raises(ValueError, match="region"):
        pools(torch.rand(1, 3, 56, 56), region=corner)
