"""DeepSpeed's configurations by name; what several processes compute with them is in `test_bootstrap.py`."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_vlm.cli.bootstrap import bootstrap
from sparse_vlm.errors import UserError
from sparse_vlm.train import zero


@pytest.fixture
def under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="sharing optimizer and weights needs DeepSpeed")
    monkeypatch.setenv("LOCAL_RANK", "0")


def test_what_is_wrong_is_one_line(under_torchrun: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are zero1, zero2, zero3, zero2-offload, zero3-offload"):
        zero.find_config("zero9")
    with pytest.raises(UserError, match="--gradient-checkpointing"):
        bootstrap(teacher="any", deepspeed="zero3", gradient_checkpointing=True)
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="holds no json object"):
        zero.find_config(str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="not a json file"):
        zero.find_config(str(tmp_path / "a.json"))
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="start it with torchrun"):
        zero.find_config("zero2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sparse-vlm\[deepspeed\]'"):
        zero.find_config("zero2")


def test_a_file_of_ones_own_keeps_what_it_says(under_torchrun: None, tmp_path: Path) -> None:
    own = {"zero_optimization": {"stage": 1}, "torch_autocast": {"enabled": False}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    assert zero.find_config(str(tmp_path / "own.json")) == own
    named = zero.find_config("zero3-offload")
    assert named["zero_optimization"]["offload_param"]["device"] == "cpu" and "torch_autocast" in named
    assert "torch_autocast" not in zero.CONFIGS["zero3-offload"], "the named one is not changed"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ({"optimizer": {"type": "AdamW"}}, "names an optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "names a scheduler"),
        ({"bf16": {"enabled": True}}, "bf16.enabled must be auto or false"),
        ({"fp16": True}, "fp16.enabled must be auto or false"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization must be an object whose stage is 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": "auto"}}, "zero_optimization.allgather_bucket_size is auto"),
        ({"steps_per_print": "auto"}, "steps_per_print is auto"),
    ],
)
def test_what_a_run_would_not_follow_is_refused_by_name(under_torchrun: None, tmp_path: Path, entry: dict, line: str) -> None:
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | entry))
    with pytest.raises(UserError, match=line):
        zero.find_config(str(tmp_path / "own.json"))


def test_sizes_that_a_file_leaves_open_are_those_of_the_models_width(under_torchrun: None, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
    own = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, **sizes, "overlap_comm": True}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    found = zero.with_sizes(zero.find_config(str(tmp_path / "own.json")), 100)
    assert found["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 9_000,
        "stage3_param_persistence_threshold": 1_000,
    }
    assert zero.with_sizes(None, 100) is None


def test_tensors_that_are_whole_are_left_alone() -> None:
    layer = nn.Linear(2, 2)
    with zero.gathered_parameters(layer.parameters(), change=True), torch.no_grad():
        layer.weight.zero_()
    assert not layer.weight.any()
