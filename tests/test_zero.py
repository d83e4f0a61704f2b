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
    with pytest.raises(UserError, match="ZeRO-3 has a process's own part of the weights alone"):
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


def test_tensors_that_are_whole_are_left_alone() -> None:
    layer = nn.Linear(2, 2)
    with zero.whole(layer.parameters(), change=True), torch.no_grad():
        layer.weight.zero_()
    assert not layer.weight.any()
