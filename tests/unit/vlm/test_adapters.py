"""Adapters that somebody puts on a tower or an LLM by PEFT: heard by every way of computing, and lost by no way of saving."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import ask, picture, save_llm, save_tower, stir, tower_config
from torch import nn

from sparse_vlm import SparseFormer, SparseFormerConfig
from sparse_vlm.errors import UserError
from sparse_vlm.tower.config import RoIPatchConfig
from sparse_vlm.tower.layers import is_plain
from sparse_vlm.vlm import VLM

peft = pytest.importorskip("peft", reason="peft is not installed")


def glancing(kind: str) -> SparseFormerConfig:
    """A tower with all that takes weights: a glance, a stage embedding, looks, and a head that attends."""
    config = tower_config()
    looking, *others = config.units
    return dataclasses.replace(
        config,
        units=(dataclasses.replace(looking, repeats=2), *others),
        cls_before_unit=None,
        head="map",
        token_init="glance" if kind else "shared",
        glance=RoIPatchConfig(8, 4, kind=kind) if kind else None,
    )


def with_lora(config: SparseFormerConfig) -> tuple[SparseFormer, SparseFormer]:
    """A tower with an adapter that does something on each layer that takes one, and the same with the adapters in its weights."""
    found = []
    for folded in (False, True):
        torch.manual_seed(0)
        tower = SparseFormer(config)
        layers = [name for name, module in tower.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)]
        layers.remove("initial_roi")
        wrapped = peft.get_peft_model(tower, peft.LoraConfig(r=2, target_modules=layers))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
        found.append(wrapped.merge_and_unload() if folded else tower)
    return found[0].eval(), found[1].eval()


@pytest.mark.parametrize("kind", ["pool", "crop", ""])
@torch.no_grad()
def test_adapters_on_every_layer_of_a_tower_are_heard(kind):
    tower, folded = with_lora(glancing(kind))
    pixels = torch.randn(2, 3, 32, 32)
    for heard, expected in zip(tower(pixels)[:3], folded(pixels)[:3], strict=True):
        torch.testing.assert_close(heard, expected, atol=2e-3, rtol=1e-3)
    assert (SparseFormer(glancing(kind)).eval()(pixels).image_embeds - folded(pixels).image_embeds).abs().max() > 0.1


BY_KERNELS = """
import sys
sys.path[:0] = {tests!r}
import torch
from test_adapters import glancing, with_lora
from sparse_vlm import kernels
tower, folded = with_lora(glancing("crop"))
pixels = torch.randn(2, 3, 32, 32)
with torch.no_grad(), kernels.using("kernels"):
    print((tower(pixels).last_hidden_state - folded(pixels).last_hidden_state).abs().max().item())
"""


def test_adapters_are_heard_where_the_kernels_run():
    pytest.importorskip("triton", reason="triton is not installed")
    program = BY_KERNELS.format(tests=[str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-3


def test_only_layers_as_torch_made_them_may_be_taken_for_their_weight():
    layer = nn.Linear(2, 2)
    assert is_plain(layer)
    nn.utils.parametrizations.weight_norm(other := nn.Linear(2, 2))
    assert not is_plain(other)
    hook = layer.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not is_plain(layer)
    hook.remove()
    layer.forward = lambda x: x
    assert not is_plain(layer)
    assert not is_plain(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2))


def test_tower_with_adapters_is_not_folded_without_them():
    tower, folded = with_lora(tower_config())
    with pytest.raises(RuntimeError, match=r"is a (Linear|Conv2d) with adapters, .*merge_and_unload"):
        tower.optimize_for_inference()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = folded(pixels).image_embeds
        torch.testing.assert_close(folded.optimize_for_inference()(pixels).image_embeds, expected, atol=1e-4, rtol=1e-4)


# ---- on a VLM that has adapters


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    vlm = VLM.build(save_tower(folder / "tower"), save_llm(folder / "llm"), dtype=torch.float32)
    vlm.add_adapters(rank=2)
    vlm.add_tower_adapters(rank=2)
    stir(vlm, 0.1)
    vlm.save_pretrained(folder / "vlm")
    return folder / "vlm"


def likely(vlm: VLM) -> float:
    [[score]] = vlm.score([ask("What is it?", picture("red"))], [["A cat"]])
    return score.total


def stirred(vlm: VLM):
    """Somebody's own adapter on the LLM, as trl's SFTTrainer puts it there, as if it had learnt."""
    other = peft.get_peft_model(vlm.model, peft.LoraConfig(r=3, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return other


def test_a_second_adapter_is_saved_and_loaded_as_it_was(saved, tmp_path):
    vlm = VLM.from_pretrained(saved, dtype=torch.float32)
    before = likely(vlm)
    stirred(vlm).save_pretrained(tmp_path / "second")
    learnt = likely(vlm)
    assert abs(learnt - before) > 0.01
    again = VLM.from_pretrained(saved, dtype=torch.float32)
    peft.PeftModel.from_pretrained(again.model, tmp_path / "second")
    assert likely(again) == pytest.approx(learnt, abs=1e-5)
    with pytest.raises(UserError, match="the LLM has adapters that were not added by this VLM; save them with PEFT's save_pretrained"):
        again.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_a_second_adapter_over_one_that_is_not_folded_is_refused(saved, tmp_path):
    vlm = VLM.from_pretrained(saved, dtype=torch.float32, fold=False)
    before = likely(vlm)
    for name in ("default", "second"):
        with pytest.raises(UserError, match=r"the model already has adapters, and PEFT would overwrite them"):
            peft.get_peft_model(vlm.model, peft.LoraConfig(r=3, target_modules=["q_proj"]), adapter_name=name)
    assert likely(vlm) == before
    vlm.save_pretrained(tmp_path / "again")  # as if nothing had been tried
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (saved / file).read_bytes()


def test_adapters_that_are_folded_later_are_saved_as_they_were(saved, tmp_path):
    vlm = VLM.from_pretrained(saved, dtype=torch.float32, fold=False)
    before = likely(vlm)
    vlm.merge_adapter()
    vlm.merge_adapter()  # there is nothing more to fold
    assert likely(vlm) == pytest.approx(before, abs=1e-4)
    assert vlm.peft is None and vlm.tower_peft is None and set(vlm.merged) == {"llm", "tower"}
    vlm.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        for folder in ("", "tower_adapter"):
            assert (tmp_path / "again" / folder / file).read_bytes() == (saved / folder / file).read_bytes()
    stirred(vlm)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 0}, "r 0"),
        ({"r": 10**9}, "r 1000000000"),
        ({"r": "2"}, "r '2'"),
        ({"r": 3}, "rank 3, but the tensors beside it have rank 2"),
        ({"target_modules": 5}, "target_modules"),
        ({"target_modules": ["nowhere"]}, "adapters of this model"),
        ({"peft_type": "EVIL"}, "adapter_config.json"),
        ({"peft_type": "IA3"}, "adapter_config.json"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "asks for remote code"),
        ({"lora_dropout": "evil"}, "adapter_config.json"),
    ],
    ids=repr,
)
def test_configuration_of_adapters_that_cannot_be_is_one_line(saved, tmp_path, change, named):
    for path in saved.rglob("*.*"):
        (tmp_path / path.relative_to(saved)).parent.mkdir(exist_ok=True)
        (tmp_path / path.relative_to(saved)).write_bytes(path.read_bytes())
    said = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, **change}))
    described = json.loads((saved / "vlm.json").read_text())
    (tmp_path / "vlm.json").write_text(json.dumps({**described, "ways": {}}))
    with pytest.raises(UserError, match=named) as caught:
        VLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_adapters_with_a_weight_that_is_no_number_are_refused(saved, tmp_path):
    for path in ("vlm.json", "adapter_config.json", "projector.safetensors"):
        (tmp_path / path).write_bytes((saved / path).read_bytes())
    (tmp_path / "vlm.json").write_text(json.dumps({**json.loads((saved / "vlm.json").read_text()), "ways": {}}))
    state = load_file(saved / "adapter_model.safetensors")
    name = sorted(state)[3]
    state[name][0, 0] = float("nan")
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"adapter_model.safetensors: tensor {name} holds numbers that are not finite"):
        VLM.from_pretrained(tmp_path, dtype=torch.float32)
