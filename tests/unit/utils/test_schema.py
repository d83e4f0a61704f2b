"""What a tower's `config.json` and a VLM's `vlm.json` may say: whatever else they say is one line, before anything of its size is made."""

from __future__ import annotations

import dataclasses
import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vlm import save_llm, save_tower, tower_config

from sparse_vlm.errors import UserError
from sparse_vlm.tower import SparseFormer, SparseFormerConfig
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.config import parts_of
from sparse_vlm.vlm.tokenization import load_renderer

GLANCE = {"patch_size": 8, "grid": 4, "points_per_side": 2, "norm_pre": False, "kind": "crop"}
UNIT = {"width": 64, "ops": ["ATTN", "MLP"], "repeats": 1, "activation": "gelu"}
# What is changed in a good configuration, and the field that the line names.
TOWERS = [
    *(({name: value}, name) for name in ("num_latent_tokens", "embed_dim", "conv_dim", "image_size") for value in (0, -1, 1.5, True)),
    *(({"num_latent_tokens": value}, "num_latent_tokens") for value in (10**9, 10**4000, "four", None, [4], float("nan"))),
    *(({"num_points": value}, "num_points") for value in (1, 0, 10**8, "4", 4.0)),
    *(({"embed_dim": value}, "embed_dim") for value in (10**9, "16")),
    ({"image_size": 200_000}, "image_size"),
    ({"image_size": 4097}, "image_size"),
    *(({"image_std": value}, "image_std") for value in ([0, 0, 0], [float("nan")] * 3, [-1, 1, 1], [1, 1], "abc")),
    *(({"image_std": value}, "image_std") for value in (1, ["1", "1", "1"], [1e-300] * 3)),
    *(({"image_mean": value}, "image_mean") for value in ([float("inf")] * 3, None, {}, [True] * 3)),
    *(({"ln_eps": value}, "ln_eps") for value in (float("nan"), 0, -1e-5, "1e-5", float("inf"))),
    *(({"generator_dim": value}, "generator_dim") for value in (0, -8, 1e-9, 10**9, "8", float("nan"))),
    *(({"units": value}, "units") for value in ([], {}, "ATTN", None, 5)),
    *(({"units": [value]}, "unit") for value in ([], None, "ATTN", {"ops": ["ATTN"]}, {"width": 64}, {**UNIT, "size": 1})),
    *(({"units": [{**UNIT, "width": value}]}, "width") for value in (0, -64, 64.0, "64", 65, 10**9)),
    *(({"units": [{**UNIT, "ops": value}]}, "operations?") for value in ([], ["NONE"], [5], ["ATTN", "ATTN"])),
    *(({"units": [{**UNIT, "repeats": value}]}, "repeats") for value in (0, -1, 10**9, 1.0, "2")),
    ({"units": [UNIT] * 2000}, "units"),
    ({"units": [{**UNIT, "repeats": 64}] * 20}, "repeats"),
    ({"units": [{**UNIT, "activation": "relu"}]}, "activation"),
    *(({"num_heads": value}, "num_heads|heads") for value in (0, -1, 3, "1", 1.0)),
    *(({"cls_before_unit": value}, "cls_before_unit") for value in (2, -1, 1.0, "1")),
    *(({name: "evil"}, name) for name in ("head", "token_init", "rois_init", "padding")),
    *(({name: "evil"}, name) for name in ("head_bias", "stage_embedding", "budgets", "glance")),
    ({"head": ["cls"]}, "head"),
    ({"mixing_bias": 1}, "mixing_bias"),
    *(({"budgets": value}, "budgets") for value in ([9, 2], [4], [0, 9], [4, 10**9], ["1", "9"], {"a": 1})),
    *(({"token_init": "glance", "glance": {**GLANCE, name: 0}}, name) for name in ("patch_size", "grid", "points_per_side")),
    *(({"token_init": "glance", "glance": value}, "glance") for value in ({**GLANCE, "kind": "x"}, {}, 5)),
    ({"token_init": "glance", "glance": {**GLANCE, "patch_size": 512, "grid": 512}}, "glance"),
    ({"format": "sparse-vlm/tower/9"}, "format"),
    ({"evil": 1}, "evil"),
]  # fmt: skip


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return save_tower(tmp_path_factory.mktemp("schema") / "tower")


@pytest.fixture
def folder(tower, tmp_path):
    """A good tower's folder, to be spoilt."""
    SparseFormer.from_pretrained(tower).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize(("change", "named"), TOWERS, ids=lambda value: repr(value)[:60])
def test_tower_that_cannot_be_is_one_line(folder, change, named):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **change}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=named) as caught:
        SparseFormer.from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and len(str(caught.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("gone", ["units", "num_latent_tokens", "embed_dim", "image_mean", "image_std"])
def test_tower_that_lacks_a_field_is_one_line(folder, gone):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in said.items() if name != gone}))
    with pytest.raises(UserError, match=gone):
        SparseFormer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["[]", "5", "null", "", "{", "\udce9", "[" * 100_000, '{"a": ' * 100_000])
def test_tower_whose_configuration_is_no_object_is_one_line(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    for load in (SparseFormer.from_pretrained, lambda path: load_renderer(path, "nothing")):
        with pytest.raises(UserError, match="not a tower folder"):
            load(folder)


def test_configuration_that_does_not_fit_the_weights_is_refused_before_they_are_read(folder, monkeypatch):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "embed_dim": 100_000}))
    monkeypatch.setattr("sparse_vlm.hub.weights.part_tensors", lambda *arguments: pytest.fail("the weights were read"))
    with pytest.raises(UserError, match=r"proj.weight has shape \(16, 64\), expected \(100000, 64\)"):
        SparseFormer.from_pretrained(folder)


def test_good_towers_are_as_they_were():
    for config in (
        tower_config(),
        SparseFormerConfig.named("sparseformer_v1_base"),
        SparseFormerConfig.named("sparseformer_btsp_openai_clip_large"),
    ):
        assert SparseFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    wide = dataclasses.replace(tower_config(), budgets=(2, 9))
    assert SparseFormerConfig.from_dict(wide.to_dict()) == wide


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tower_with_a_weight_that_is_no_number_is_refused(folder, value, dtype):
    path = folder / "model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    state["layers.1.mlp.fc1.weight"][3, 5] = value
    save_file(state, path)
    with pytest.raises(UserError, match=r"model\.safetensors: tensor layers\.1\.mlp\.fc1\.weight holds numbers that are not finite"):
        SparseFormer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (b"", "cannot be read"),
        (b"\xff" * 100, "cannot be read"),
        (b"\x02\0\0\0\0\0\0\0{}x", "missing tensor|cannot be read"),
    ],
)
def test_tower_whose_weights_are_no_tensors_is_one_line(folder, content, why):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=why):
        SparseFormer.from_pretrained(folder)


# ---- vlm.json

GOOD = {"tower": "as named", "projector": "trained", "llm": "as named"}
VLMS = [
    ({"ways": None}, "ways"),
    ({"ways": []}, "ways"),
    ({"ways": {"a": 5}}, "ways"),
    ({"ways": {"a": "b\0c"}}, "ways"),
    ({"tower": 5}, "tower"),
    ({"tower": ""}, "tower"),
    ({"llm": None}, "llm"),
    ({"llm": ["a"]}, "llm"),
    ({"llm": "a\0b"}, "llm"),
    ({"holds": {}}, "holds|tower"),
    ({"holds": []}, "holds"),
    *(({"holds": {**GOOD, part: word}}, f"holds of {part}") for part in GOOD for word in ("evil", None, 5, ["tuned"], "")),
    ({"projector": 5}, "projector"),
    ({"projector": None}, "projector"),
    ({"projector": {}}, "tokens"),
    *(({"projector": {"tokens": value, "tower_width": 64, "llm_width": 16}}, "tokens") for value in (0, -1, 5.0, "5", None, True, 10**12)),
    ({"projector": {"kind": "evil", "tokens": 5, "tower_width": 64, "llm_width": 16}}, "kind"),
    ({"projector": {"kind": ["mlp"], "tokens": 5, "tower_width": 64, "llm_width": 16}}, "kind"),
    *(({"num_tokens": value}, "num_tokens") for value in (0, -4, "4", 4.0, None, 10**12)),
    *(({"new_projector": value}, "new_projector") for value in (0, "false", None)),
    ({"format": 5}, "format"),
]


@pytest.fixture(scope="module")
def vlm(tower, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    vlm = VLM.build(tower, save_llm(folder / "llm"), dtype=torch.float32)
    vlm.new_projector = False
    vlm.save_pretrained(folder / "vlm")
    return folder / "vlm"


@pytest.mark.parametrize(("change", "named"), VLMS, ids=lambda value: repr(value)[:60])
def test_vlm_that_cannot_be_is_one_line(vlm, tmp_path, monkeypatch, change, named):
    said = json.loads((vlm / "vlm.json").read_text())
    (tmp_path / "vlm.json").write_text(json.dumps({**said, "ways": {}, **change}))
    monkeypatch.setattr(VLM, "build", lambda *_, **__: pytest.fail("its parts were loaded"))
    for load in (VLM.from_pretrained, parts_of):
        with pytest.raises(UserError, match=named) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "null", "5", "", "{", "[" * 100_000])
def test_vlm_whose_description_is_no_object_is_one_line(tmp_path, text):
    (tmp_path / "vlm.json").write_text(text)
    for load in (VLM.from_pretrained, parts_of):
        with pytest.raises(UserError, match="not a VLM folder"):
            load(tmp_path)


def test_projector_with_a_weight_that_is_no_number_is_refused(vlm, tmp_path):
    said = json.loads((vlm / "vlm.json").read_text())
    (tmp_path / "vlm.json").write_text(json.dumps({**said, "ways": {}}))
    state = load_file(vlm / "projector.safetensors")
    state["linear_1.bias"][2] = float("nan")
    save_file(state, tmp_path / "projector.safetensors")
    with pytest.raises(UserError, match=r"projector\.safetensors: tensor linear_1\.bias holds numbers that are not finite"):
        VLM.from_pretrained(tmp_path)
