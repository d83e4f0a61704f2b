"""The profile of a tower and the ratios of times: what is counted where, and what is printed."""

from __future__ import annotations

import json
import time

import profile_tower as profiling
import pytest
import speed_ratios as comparing
import torch
from profile_tower import REST, as_table, clocked, profile
from speed_ratios import Comparison, Ratio, ratios
from speed_ratios import as_table as ratio_table

from sparse_vlm.bench.vision import BASELINES, Baseline
from sparse_vlm.errors import UserError
from sparse_vlm.tower import FocusConfig, RoIPatchConfig, SparseFormer, SparseFormerConfig, UnitConfig
from sparse_vlm.tower import layers as tower_modules
from sparse_vlm.tower.cost import count_macs, count_operations
from sparse_vlm.tower.inference import CompiledUnit

ALL = SparseFormerConfig(
    units=(
        UnitConfig(64, ("SAMPLING_M", "PE_INJECT", "ATTN", "MLP", "ROI_ADJ"), repeats=2),
        UnitConfig(128, ("ATTN", "MLP")),
    ),
    num_latent_tokens=9, embed_dim=32, image_size=56, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, conv_dim=16, cls_before_unit=0,
    token_init="glance", glance=RoIPatchConfig(14, 4, norm_pre=True, kind="crop"), budgets=(4, 16),
    focus=FocusConfig(size=32, channels=(16, 16, 16, 16)),
)  # fmt: skip
OPERATIONS = {
    "early convolution", "focus", "glance", "points", "sampling", "parameter generation", "mixing", "output projection",
    "position injection", "RoI adjusting", "attention", "MLP", "transition", "head",
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower with every operation, and a ViT."""
    monkeypatch.setitem(BASELINES, "all", Baseline("a tower with every operation", ALL))
    vit = SparseFormerConfig(
        units=(UnitConfig(64, ("ATTN", "MLP")),), num_latent_tokens=16, embed_dim=32, image_size=56, image_mean=(0.5,) * 3,
        image_std=(0.5,) * 3, cls_before_unit=0, token_init="glance", glance=RoIPatchConfig(14, 4, 1),
    )  # fmt: skip
    monkeypatch.setitem(BASELINES, "plain", Baseline("a ViT", vit))


def test_operations_are_counted_where_they_are_timed() -> None:
    assert set(count_operations(ALL)) == OPERATIONS


@pytest.mark.parametrize("count", [25, 36, 49, 64])
def test_a_focus_takes_three_percent_of_its_tower_at_most(count: int) -> None:
    macs = count_macs(BASELINES["adaptive-s"].config.at_budget(count), 224, 224)
    assert 0.01 < macs.focus / macs.total < 0.03
    assert count_macs(BASELINES["uniform-s"].config).focus == 0


@pytest.mark.parametrize("optimized", [False, True])
def test_every_operation_is_timed_once_and_nothing_is_lost(optimized: bool) -> None:
    tower = SparseFormer(ALL).eval()
    if optimized:
        tower.optimize_for_inference()
    pixels = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        tower(pixels)
        began = time.perf_counter()
        with clocked(tower) as clock:
            plain = tower(pixels).image_embeds
        whole = time.perf_counter() - began
        within = {"sampling"} if isinstance(tower.units()[0], CompiledUnit) else set()  # which is mixing's then
        assert set(clock.seconds) == OPERATIONS - within | {"norms", REST}
        assert min(clock.seconds.values()) > 0
        assert sum(clock.seconds.values()) <= whole
        before = dict(clock.seconds)
        assert torch.equal(tower(pixels).image_embeds, plain)
    assert clock.seconds == before, "a clock that is put away stands still"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tower.modules())


def test_time_counts_as_that_of_the_innermost_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = SparseFormer(ALL).eval()
    sample, attention = tower_modules.sample_bilinear, tower.units()[1].attn.proj.forward
    monkeypatch.setattr(tower_modules, "sample_bilinear", lambda *args: (time.sleep(0.05), sample(*args))[1])
    monkeypatch.setattr(tower.units()[1].attn.proj, "forward", lambda x: (time.sleep(0.1), attention(x))[1])
    with torch.inference_mode(), clocked(tower) as clock:
        tower(torch.randn(1, 3, 56, 56))
    assert clock.seconds["sampling"] > 0.1, "two looks"
    assert clock.seconds["attention"] > 0.1
    assert clock.seconds["mixing"] < 0.05 and clock.seconds["head"] < 0.1 and clock.seconds[REST] < 0.1


def test_a_profile_says_what_each_operation_takes_of_the_machine(small: None) -> None:
    peak, (all_of_it, vit) = profile(["all", "plain"], "float32", batch=2, rounds=3, copied_bytes=1 << 20)
    rows = {row["operation"]: row for row in all_of_it["operations"]}
    assert list(rows)[-1] == REST and rows[REST]["macs"] is None and rows["norms"]["of_macs"] is None
    mlp = rows["MLP"]
    assert mlp["macs"] == 2 * count_operations(ALL)["MLP"].macs
    assert mlp["of_macs"] == pytest.approx(mlp["macs"] / (mlp["ms"] / 1000) / peak["macs_per_second"])
    assert mlp["of_bytes"] == pytest.approx(mlp["bytes"] / (mlp["ms"] / 1000) / peak["bytes_per_second"])
    assert {row["operation"] for row in vit["operations"]} == {"glance", "attention", "MLP", "norms", "head", REST}
    table = as_table(peak, all_of_it)
    assert table.count("\n") == 4 + len(rows) and "| MLP | " in table and "all, float32, batch of 2" in table


def test_what_cannot_be_profiled_is_refused(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--rounds is 2"):
        profile(["all"], "float32", rounds=2)
    with pytest.raises(UserError, match="--dtype float8: known are float32, bfloat16"):
        profiling.main(["all"], dtype=["float8"])
    with pytest.raises(UserError, match="--model nothing"):
        profile(["nothing"], "float32", rounds=3)


def test_profiles_are_json_as_well(small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "COPIED_BYTES", 1 << 20)
    profiling.main(["plain"], dtype=["float32"], batch=1, threads=None, rounds=3, optimized=True, json_file="-")
    data = json.loads(capsys.readouterr().out)
    assert data["format"] == "sparse-vlm/profile/1" and data["machine"]["threads"] == torch.get_num_threads()
    [model] = data["models"]
    assert (model["model"], model["optimized"], model["dtype"]) == ("plain", True, "float32")
    assert min(row["ms"] for row in model["operations"]) > 0 and model["ms"] > 0 and model["whole_ms"] > 0


def test_ratios_are_of_both_forms_in_turn(small: None) -> None:
    compared = [Comparison("all", "plain", 1e9), Comparison("all", "all", 0.0)]
    found = ratios(compared, ["float32", "bfloat16"], [1], rounds=3, forms=("plain", "optimized"))
    assert [(r.dtype, r.form, r.rival) for r in found] == [
        (dtype, form, rival) for dtype in ("float32", "bfloat16") for form in ("plain", "optimized") for rival in ("plain", "all")
    ]
    for ratio in found:
        assert ratio.low <= ratio.ratio <= ratio.high and ratio.rounds == 3
    assert all(r.ratio == 1.0 and not r.holds for r in found if r.rival == "all"), "a model beside itself is the same turn"
    assert all(r.holds for r in found if r.rival == "plain")
    assert ratio_table(found).count("\n") == 2 + len(found)


def test_a_ratio_is_of_rounds_that_both_took_part_in(small: None) -> None:
    with pytest.raises(UserError, match="--rounds is 2"):
        ratios([Comparison("all", "plain", 1.0)], ["float32"], [1], rounds=2)
    with pytest.raises(UserError, match="--form folded: known are plain, optimized"):
        comparing.main(form=["folded"])
    with pytest.raises(UserError, match="--beside clip-z: known are clip-b32, clip-b16, vit-s14, uniform-s"):
        comparing.main(beside=["clip-z"])
    data = comparing.document([Ratio("a", "b", 0.5, "float32", 1, 2, 1.0, 2.0, 0.5, 0.4, 0.6, 3)])
    assert data["ratios"][0]["holds"] is True and data["machine"]["cores"] >= 1
