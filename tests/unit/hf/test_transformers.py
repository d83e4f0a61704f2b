"""The tower in stock transformers: Auto classes, LlavaForConditionalGeneration and LlavaProcessor, without a line of theirs changed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_vlm import ask, picture, save_llm, save_tower, tower_config
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sparse_vlm.errors import UserError
from sparse_vlm.hf.model import SparseFormerBackbone, SparseFormerHostConfig, SparseFormerHostModel, SparseFormerImageProcessor
from sparse_vlm.images.preprocess import preprocess
from sparse_vlm.integrations.after_import import AfterImport
from sparse_vlm.tower import SparseFormer
from sparse_vlm.vlm import VLM


@pytest.fixture
def tower() -> SparseFormer:
    torch.manual_seed(0)
    return SparseFormer(tower_config()).eval()


def test_auto_classes_bring_back_the_same_tower(tower, tmp_path):
    SparseFormerHostModel.wrap(tower).save_pretrained(tmp_path)
    SparseFormerImageProcessor.of(tower.config).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).unwrap() == tower.config
    model = AutoModel.from_pretrained(tmp_path).eval()
    assert type(model) is SparseFormerHostModel
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, model.tower.state_dict()[name]), name
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture("red"), return_tensors="pt")["pixel_values"]
    out, ours = model(pixels), tower(pixels)
    assert torch.equal(out.hidden_states[-1], ours.last_hidden_state)
    torch.testing.assert_close(out.pooler_output, ours.image_embeds)


def test_rois_stay_float32_in_a_bfloat16_tower(tower, tmp_path):
    SparseFormerHostModel.wrap(tower).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.tower.initial_roi.weight, tower.initial_roi.weight)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed, and wants a GPU")
def test_an_llms_attention_is_not_refused_for_the_towers_sake(tower):
    config = SparseFormerHostConfig.wrap(tower.config)
    with pytest.raises(ImportError, match="(?i)flash"):  # the package is missing, and not the tower's consent
        AutoModel.from_config(config, attn_implementation="flash_attention_2")
    model = AutoModel.from_config(config, attn_implementation="flex_attention").eval()
    model.tower.load_state_dict(tower.state_dict())
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(pixels).last_hidden_state, SparseFormerHostModel.wrap(tower)(pixels).last_hidden_state)


def test_image_processor_is_the_one_way_in(tower):
    processor = SparseFormerImageProcessor.of(tower.config)
    images = [picture("red"), picture("blue", (20, 90))]
    expected = preprocess(images, 32, tower.config.image_mean, tower.config.image_std)
    assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], expected)
    arrays = [np.array(image) for image in images]
    assert torch.equal(processor(arrays, return_tensors="pt")["pixel_values"], expected)
    tensors = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    assert torch.equal(processor(tensors, return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="uint8"):
        processor(expected)


@pytest.mark.parametrize("tokens", [1, 5, 12])
def test_processor_writes_one_placeholder_a_token(tokens, tmp_path):
    vlm = VLM.build(save_tower(tmp_path / "tower", tokens) if tokens > 1 else _one_token(tmp_path), save_llm(tmp_path / "llm"))
    inputs = vlm.processor(text=["<image> and <image>"], images=[picture("red"), picture("blue")], return_tensors="pt")
    assert int((inputs["input_ids"] == vlm.renderer.image_id).sum()) == 2 * tokens == 2 * vlm.tokens_per_image
    vlm.model(**inputs)


def _one_token(tmp_path) -> str:
    config = dataclasses.replace(tower_config(2), num_latent_tokens=1, head="avg", cls_before_unit=None)
    SparseFormer(config).save_pretrained(tmp_path / "one")
    return str(tmp_path / "one")


def test_stock_llava_saves_loads_and_answers_bit_for_bit(tmp_path):
    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    assert type(vlm.model) is LlavaForConditionalGeneration
    assert type(vlm.processor) is LlavaProcessor
    vlm.model.save_pretrained(tmp_path / "stock")
    vlm.processor.save_pretrained(tmp_path / "stock")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    assert type(model) is LlavaForConditionalGeneration
    assert isinstance(model.config.vision_config, SparseFormerHostConfig)
    states = model.state_dict(), vlm.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    inputs = processor.apply_chat_template(
        ask("What is it?", picture("red")), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert [processor.decode(answer, skip_special_tokens=True).strip()] == vlm.generate([ask("What is it?", picture("red"))], 8)


def test_merged_adapters_are_saved_as_plain_weights(tmp_path):
    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    vlm.add_adapters(rank=2)
    vlm.add_tower_adapters(rank=2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with pytest.raises(UserError, match="adapters are not merged, and transformers' save_pretrained would lose them"):
        vlm.model.save_pretrained(tmp_path / "stock")
    vlm.new_projector = False
    vlm.save_pretrained(tmp_path / "vlm")
    folded = VLM.from_pretrained(tmp_path / "vlm", dtype=torch.float32)
    folded.model.save_pretrained(tmp_path / "stock")
    model, found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock", dtype=torch.float32, output_loading_info=True)
    assert not any(found.values()), found
    inputs = folded.processor(text=["<image> What is it?"], images=[picture("red")], return_tensors="pt")
    assert torch.equal(model(**inputs).logits, folded.model(**inputs).logits)
    plain = VLM.build(tmp_path / "tower", tmp_path / "llm", dtype=torch.float32)
    assert not torch.allclose(model(**inputs).logits, plain.model(**inputs).logits, atol=1e-3)


def test_image_changes_what_the_model_sees(tmp_path):
    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    text = vlm.renderer.text(ask("What is it?", picture("red")), answer_next=True)

    def logits(color: str) -> torch.Tensor:
        return vlm.model(**vlm.processor(text=[text], images=[picture(color)], return_tensors="pt")).logits[0, -1]

    assert torch.equal(logits("red"), logits("red"))
    assert not torch.allclose(logits("red"), logits("blue"))


# ---- registered by `import sparse_vlm`


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What a program does that knows transformers and has imported sparse_vlm; it prints the answer and a checksum of every weight.
STOCK = """
import json, sys
import torch
from PIL import Image
folder, tower = sys.argv[1:]
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
pipe = transformers.pipeline("image-text-to-text", model=folder, dtype=torch.float32)
red = Image.new("RGB", (48, 40), "red")
example = [{"role": "user", "content": [{"type": "image", "image": red}, {"type": "text", "text": "What is it?"}]}]
said = pipe(text=example, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
sums = {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}
alone = {name: tensor.double().sum().item() for name, tensor in transformers.AutoModel.from_pretrained(tower).tower.state_dict().items()}
processor = transformers.AutoImageProcessor.from_pretrained(tower)
print(json.dumps([said, sums, alone, type(processor).__name__, transformers.AutoConfig.from_pretrained(tower).model_type]))
"""
EARLIER, LATER = "import sparse_vlm, transformers", "import transformers; from transformers import AutoModel, pipeline; import sparse_vlm"


def test_import_alone_is_enough_before_or_after_transformers(tmp_path):
    vlm = VLM.build(save_tower(tmp_path / "native"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    for part in (vlm.model, vlm.processor):
        part.save_pretrained(tmp_path / "vlm")
    SparseFormerHostModel.wrap(vlm.tower).save_pretrained(tmp_path / "tower")
    SparseFormerImageProcessor.of(vlm.tower.config).save_pretrained(tmp_path / "tower")
    [answer] = vlm.generate([ask("What is it?", picture("red"))], 8)
    for order in (EARLIER, LATER):
        code = f"{order}\nfrom transformers import LlavaForConditionalGeneration\n{STOCK}"
        said, sums, alone, *names = json.loads(python(code, str(tmp_path / "vlm"), str(tmp_path / "tower")).splitlines()[-1])
        assert said.strip() == answer
        assert sums == {name: tensor.double().sum().item() for name, tensor in vlm.model.state_dict().items()}
        assert alone == {name: tensor.double().sum().item() for name, tensor in vlm.tower.state_dict().items()}
        assert names == ["SparseFormerImageProcessor", "sparseformer"]


def host_of(folder, version: str) -> None:
    """A package that has the place of transformers and nothing in it."""
    auto = folder / "transformers" / "models" / "auto"
    auto.mkdir(parents=True)
    (folder / "transformers" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    for path in (auto.parent / "__init__.py", auto / "__init__.py", auto / "configuration_auto.py"):
        path.write_text("")


@pytest.mark.parametrize(("version", "imported"), [("4.37.2", False), ("5.3.0", True), ("5.30.1", True)])
def test_an_old_transformers_is_left_alone(tmp_path, monkeypatch, version, imported):
    host_of(tmp_path, version)
    (tmp_path / "plug_in.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    AfterImport({"transformers.models.auto.configuration_auto": "plug_in"}).install()
    assert "plug_in" not in sys.modules
    import transformers.models.auto.configuration_auto

    assert transformers.__version__ == version
    assert (sys.modules.pop("plug_in", None) is not None) == imported
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)


# ---- backbone


def square(tower_tokens: int = 10) -> SparseFormer:
    torch.manual_seed(0)
    return SparseFormer(tower_config(tower_tokens)).eval()


def test_backbone_returns_the_tokens_as_maps(tmp_path):
    tower = square()  # 9 latent tokens and CLS
    SparseFormerHostModel.wrap(tower).save_pretrained(tmp_path)
    backbone = AutoBackbone.from_pretrained(tmp_path, out_features=["stage1", "stage2"]).eval()
    assert type(backbone) is SparseFormerBackbone
    assert backbone.out_features == ["stage1", "stage2"]
    assert backbone.channels == [64, 64]
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, last = backbone(pixels).feature_maps
        tokens = tower(pixels).last_hidden_state[:, 1:]
        inner = next(iter(tower.run_units(pixels)))[0]
    assert first.shape == last.shape == (2, 64, 3, 3)
    for row in range(3):
        for column in range(3):
            assert torch.equal(last[:, :, row, column], tokens[:, 3 * row + column])
            assert torch.equal(first[:, :, row, column], inner[:, 3 * row + column])
    by_default = AutoBackbone.from_pretrained(str(tmp_path))
    assert by_default.out_features == ["stage2"]
    assert torch.equal(by_default(pixels).feature_maps[0], last)
    backbone.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").out_features == ["stage1", "stage2"]


def test_backbone_of_no_square_is_refused(tmp_path):
    SparseFormerHostModel.wrap(SparseFormer(tower_config(7))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="6; use a tower of 4 or 9, or AutoModel"):
        AutoBackbone.from_pretrained(tmp_path)


def test_backbone_leaves_other_folders_to_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(Exception, match="repo|Repo|hub|offline"):
        AutoBackbone.from_pretrained(tmp_path)
