"""Which attention kernel ran, as torch's profiler says; on a CPU for real, and by name what other devices would record."""

from __future__ import annotations

import json

import attention_kernels as attention
import pytest
import torch
import torch.nn.functional as F
from attention_kernels import BACKWARD, FORWARD, PLAIN, as_table, attended, kernels
from tiny_vlm import save_llm, save_tower, stir
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_vlm.errors import UserError
from sparse_vlm.vlm import VLM


def qkv(requires_grad: bool = False) -> list[torch.Tensor]:
    return [torch.randn(1, 2, 8, 16, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize(("backend", "kernel"), [(SDPBackend.MATH, "SDPA, math"), (SDPBackend.FLASH_ATTENTION, "SDPA, flash for CPUs")])
def test_what_sdpa_took_is_told(backend, kernel):
    with sdpa_kernel(backend):
        assert kernels(lambda: [F.scaled_dot_product_attention(*qkv()) for _ in range(3)]) == ({kernel: 3}, {})


def test_backward_kernels_are_told():
    def step() -> None:
        F.scaled_dot_product_attention(*qkv(requires_grad=True)).sum().backward()

    assert kernels(step) == ({"SDPA, flash for CPUs": 1}, {"SDPA, flash for CPUs": 1})
    with sdpa_kernel(SDPBackend.MATH):
        assert kernels(step) == ({"SDPA, math": 1}, {PLAIN: 1})


def test_attention_without_an_operator_shows_by_its_softmax():
    def plain() -> None:
        query, key, value = qkv(requires_grad=True)
        ((query @ key.mT).softmax(-1) @ value).sum().backward()
        torch.randn(8, 4).softmax(-1)  # a router's
        F.log_softmax(torch.randn(1, 2, 8, 16), -1)

    assert kernels(plain) == ({PLAIN: 1}, {PLAIN: 1})


def test_names_are_those_of_torch():
    known = {schema.name for schema in torch._C._jit_get_all_schemas()}
    named = {name for name in (*FORWARD, *BACKWARD) if name.startswith("aten::")}
    missing = named - known
    # older releases lack some
    assert len(missing) <= 2, missing
    attending = {name for name in known if name.startswith("aten::_scaled_dot_product") and "attention" in name}
    assert attending <= named, "an operator of this torch that would not be seen"


class Event:
    """What the profiler records of a call on another device."""

    def __init__(self, name: str, parent: Event | None = None) -> None:
        self.name, self.cpu_parent, self.input_shapes = name, parent, [[1, 2, 8, 16]]


def test_of_nested_operators_the_outermost_counts(monkeypatch):
    sdpa = Event("aten::_scaled_dot_product_flash_attention", Event("aten::scaled_dot_product_attention"))
    package = Event("FlashAttnVarlenFunc")
    back = Event("FlashAttnVarlenFuncBackward")
    events = [sdpa, Event("aten::_flash_attention_forward", sdpa), package, Event("flash_attn::_flash_attn_varlen_forward", package)]
    events += [
        back,
        Event("flash_attn::_flash_attn_varlen_backward", back),
        Event("aten::mm"),
        Event("aten::_efficient_attention_backward"),
    ]

    class Recorded:
        def __init__(self, **_) -> None: ...
        def __enter__(self) -> Recorded:
            return self

        def __exit__(self, *_) -> None: ...
        def events(self) -> list[Event]:
            return events

    monkeypatch.setattr(attention, "profile", Recorded)
    assert kernels(lambda: None) == (
        {"SDPA, flash": 1, "flash-attn, packed": 1},
        {"flash-attn, packed": 1, "torch's memory-efficient": 1},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A VLM's folder."""
    made = tmp_path_factory.mktemp("vlm")
    vlm = VLM.build(save_tower(made / "tower"), save_llm(made / "llm"), dtype=torch.float32)
    vlm.add_adapters(2)
    stir(vlm, 0.1)
    vlm.save_pretrained(made / "vlm")
    return str(made / "vlm")


def test_every_part_of_a_vlm_is_told(folder):
    vlm = VLM.from_pretrained(folder, dtype=torch.float32, fold=False)
    found = {one.part: one for one in attended(vlm)}
    units, layers = 2, 2
    assert sum(found["tower"].forward.values()) == units and not found["tower"].backward
    assert found["projector, mlp"].forward == {}
    assert sum(found["projector, a resampler in its place"].forward.values()) == 1
    for part in ("prefill, one prompt", "prefill, two prompts, padded", "decode, one prompt", "decode, two prompts, padded"):
        assert sum(found[f"LLM, {part}"].forward.values()) == layers, part
    for part in ("two conversations", "a photo with several, as one tree"):
        trained = found[f"LLM, training, {part}"]
        assert trained.forward == trained.backward == {PLAIN: layers}


def test_the_command_prints_a_table_or_json(folder, capsys, tmp_path):
    attention.main(folder, "cpu", None)
    table = capsys.readouterr().out
    assert "| projector, mlp | does not attend |  |" in table
    attention.main(folder, "cpu", "-")
    document = json.loads(capsys.readouterr().out)
    assert document["parts"][0]["part"] == "tower" and document["format"] == attention.FORMAT
    assert as_table([attention.Attended(**one) for one in document["parts"]]) == table
    with pytest.raises(UserError, match="--device tpu: known are cpu and cuda"):
        attention.main(folder, "tpu", None)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU here"):
            attention.main(folder, "cuda", None)
