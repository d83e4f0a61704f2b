"""The tower in stock transformers: Auto classes, LlavaForConditionalGeneration and LlavaProcessor, without a line of theirs changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_vlm import ask, picture, save_llm, save_tower, tower_config
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from sparse_vlm.hosts.transformers import SparseFormerHostConfig, SparseFormerHostModel, SparseFormerImageProcessor
from sparse_vlm.preprocess import preprocess
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
    import dataclasses

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


def test_image_changes_what_the_model_sees(tmp_path):
    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    text = vlm.renderer.text(ask("What is it?", picture("red")), answer_next=True)

    def logits(color: str) -> torch.Tensor:
        return vlm.model(**vlm.processor(text=[text], images=[picture(color)], return_tensors="pt")).logits[0, -1]

    assert torch.equal(logits("red"), logits("red"))
    assert not torch.allclose(logits("red"), logits("blue"))
