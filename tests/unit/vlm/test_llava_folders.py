"""LLaVA folders of transformers with a tower inside, and PEFT's adapters of them, as VLMs and as towers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_vlm import ask, photo, save_llm, save_whole_tower, stir
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparse_vlm.errors import UserError
from sparse_vlm.export.run import export
from sparse_vlm.export.source import find
from sparse_vlm.tower import SparseFormer
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.config import parts_of
from sparse_vlm.vlm.prompts import assistant, mark_answers, user

IMAGE = photo(90, 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A VLM in our format, and its export."""
    root = tmp_path_factory.mktemp("folders")
    vlm = VLM.build(save_whole_tower(root / "tower"), save_llm(root / "llm"), dtype=torch.float32)
    stir(vlm, 0.3)
    vlm.save_pretrained(root / "vlm")
    export(str(root / "vlm"), "transformers", root / "exported", dtype="float32")
    return root / "vlm", root / "exported"


def answers(vlm: VLM) -> list[str]:
    return vlm.generate([ask("What is it?", IMAGE), ask("Why?")], max_new_tokens=8)


def test_an_exported_folder_is_a_vlm_a_tower_and_an_llm(folders: tuple[Path, Path], tmp_path: Path) -> None:
    own, exported = folders
    expected = VLM.from_pretrained(own, dtype=torch.float32)
    vlm = VLM.from_pretrained(exported, dtype=torch.float32)
    assert answers(vlm) == answers(expected)
    assert parts_of(exported) == (str(exported), str(exported), None, "mlp")
    assert find(str(exported)).kind == "vlm"
    for name, tensor in SparseFormer.from_pretrained(exported).state_dict().items():
        assert torch.equal(tensor, expected.tower.state_dict()[name].float()), name
    vlm.add_adapters(2)
    vlm.save_pretrained(tmp_path / "again")
    assert answers(VLM.from_pretrained(tmp_path / "again", dtype=torch.float32)) == answers(expected)


def test_a_folder_in_shards_is_read_part_by_part(folders: tuple[Path, Path], tmp_path: Path) -> None:
    own, exported = folders
    AutoModelForImageTextToText.from_pretrained(exported).save_pretrained(tmp_path, max_shard_size="40KB")
    AutoProcessor.from_pretrained(exported).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert answers(VLM.from_pretrained(tmp_path, dtype=torch.float32)) == answers(VLM.from_pretrained(own, dtype=torch.float32))


def test_a_tower_in_the_format_of_transformers_is_a_tower(folders: tuple[Path, Path], tmp_path: Path) -> None:
    own, exported = folders
    export(parts_of(own)[0], "transformers", tmp_path / "tower", dtype="float32")
    assert torch.equal(SparseFormer.from_pretrained(tmp_path / "tower").proj.weight, SparseFormer.from_pretrained(exported).proj.weight)
    assert find(str(tmp_path / "tower")).kind == "tower"


def test_adapters_of_peft_are_read_with_their_base(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, exported = folders
    model = AutoModelForImageTextToText.from_pretrained(exported)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False))
    peft.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(exported)
    inputs = processor.apply_chat_template(
        ask("What is it?", IMAGE), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    vlm = VLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = peft.merge_and_unload()(**inputs).logits
        torch.testing.assert_close(vlm.model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        assert (expected - AutoModelForImageTextToText.from_pretrained(exported)(**inputs).logits).abs().max() > 1e-3
    trainable = VLM.from_pretrained(tmp_path, dtype=torch.float32, fold=False)
    assert any(parameter.requires_grad for parameter in trainable.model.parameters())


def test_adapters_without_their_base_are_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere/else"}))
    with pytest.raises(UserError, match="adapter_config.json: its base_model_name_or_path, 'somewhere/else', is not a folder"):
        VLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_feature_layer": -2}, "vision_feature_layer is -2; with this tower it must be -1"),
        ({"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"model_type": "llava_next"}, "not that of a LLaVA with a tower of sparse-vlm"),
    ],
)
def test_a_llava_of_other_options_is_one_line(change: dict, named: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((folders[1] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=named):
        VLM.from_pretrained(tmp_path)


def test_the_exported_template_marks_what_carries_loss(folders: tuple[Path, Path]) -> None:
    """What trainers mask by the chat template is what our own label mask is."""
    own, exported = folders
    renderer, processor = VLM.from_pretrained(own).renderer, AutoProcessor.from_pretrained(exported)
    conversation = [user("What is it?", 1), assistant("A cat."), user("Sure?"), assistant(" Yes.")]
    conversation[0]["content"][0]["image"] = IMAGE
    inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    rendered = renderer.render(conversation)
    assert inputs["input_ids"][0] == list(rendered.ids)
    assert list(map(bool, inputs["assistant_masks"][0])) == list(rendered.supervised)
    assert sum(rendered.supervised) > 0


def test_marks_change_no_text(folders: tuple[Path, Path]) -> None:
    renderer = VLM.from_pretrained(folders[0]).renderer
    conversation = [user("a"), assistant("b"), user("c")]
    for answer_next in (True, False):
        plain = renderer.text(conversation, answer_next)
        marked = renderer.tokenizer.apply_chat_template(
            conversation, chat_template=mark_answers(renderer.template), tokenize=False, add_generation_prompt=answer_next
        )
        assert marked == plain


def test_a_process_that_imports_only_transformers_opens_the_folder(folders: tuple[Path, Path]) -> None:
    code = (
        "from transformers import AutoModelForImageTextToText as Model, AutoProcessor as Processor; import sys; "
        "print(type(Processor.from_pretrained(sys.argv[1], trust_remote_code=True).image_processor).__name__, "
        "type(Model.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folders[1])], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["SparseFormerImageProcessor", "LlavaForConditionalGeneration"]
