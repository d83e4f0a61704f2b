"""Damage that tools/fuzz.py came upon: each kind is one line that names the file, before anything large is made of it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from eval_fakes import FakeVLM, asked, evaluate, photos_of, write_tar
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_vlm import save_llm, save_tower
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_vlm import SparseFormer
from sparse_vlm.data.conversations import MIXTURES, examples_of_photos
from sparse_vlm.errors import UserError, naming
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.teachers import load_teacher
from sparse_vlm.utils.files import locked
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.llm import load_llm


def test_what_is_wrong_is_one_printable_line():
    error = UserError("a.json: 'x\x1b[2J\ny' is no name")
    assert str(error) == r"a.json: 'x\x1b[2J\ny' is no name"


def test_a_name_is_said_once():
    for said, whole in (("no size", "b: no size"), ("b: no size", "b: no size")):
        with pytest.raises(UserError) as caught, naming("b"):
            raise UserError(said)
        assert str(caught.value) == whole


def test_numbers_that_no_model_computes_with_are_refused(tmp_path):
    save_tower(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["norm.weight"][0] = 3e38
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="model.safetensors: tensor norm.weight holds numbers beyond 1e\\+18"):
        SparseFormer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("generation_config.json", {"eos_token_id": {"a": None}}, "eos_token_id in generation_config.json is"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "not a language model"),
    ],
)
def test_settings_of_other_types_are_met_when_a_model_is_loaded(tmp_path, file, changes, what):
    save_llm(tmp_path)
    settings = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(settings | changes))
    with pytest.raises(UserError, match=f"{tmp_path}: {what}"):
        load_llm(tmp_path)


def test_logits_that_are_not_finite_are_refused(tmp_path):
    save_tower(tmp_path / "tower")
    save_llm(tmp_path / "llm")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e17)
    model.save_pretrained(tmp_path / "llm")
    with pytest.raises(UserError, match=f"{tmp_path / 'llm'}: its logits are not finite"):
        VLM.build(tmp_path / "tower", tmp_path / "llm", dtype=torch.float32)


def test_a_template_that_fails_is_of_an_llm_with_a_name(tmp_path):
    save_tower(tmp_path / "tower")
    save_llm(tmp_path / "llm")
    (tmp_path / "llm" / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content' }}{% endfor %}")
    with pytest.raises(UserError, match=f"{tmp_path / 'llm'}: .*chat template"):
        VLM.build(tmp_path / "tower", tmp_path / "llm", dtype=torch.float32)


@pytest.mark.parametrize(
    ("side", "change", "line"),
    [
        ("vision_cfg", {"layers": 65535}, r"model_cfg\.vision_cfg\.layers is 65535, expected a whole number from 1 to 1024"),
        ("vision_cfg", {"layers": "x"}, r"model_cfg\.vision_cfg\.layers is 'x'"),
        ("vision_cfg", {"layers": [3, 4, 10**6, 3]}, r"model_cfg\.vision_cfg\.layers is 1000000"),
        ("vision_cfg", {"width": 10**6}, r"model_cfg\.vision_cfg\.width is 1000000"),
        ("vision_cfg", {"mlp_ratio": 1e9}, r"model_cfg\.vision_cfg\.mlp_ratio is 1000000000\.0"),
        ("vision_cfg", {"patch_size": 0}, r"model_cfg\.vision_cfg\.patch_size is 0"),
        ("vision_cfg", {"image_size": 8000, "patch_size": 1, "pos_embed_type": "sin_cos_2d"}, "says 4,096,000,000 positions of the image"),
        ("text_cfg", {"context_length": 10**5}, r"model_cfg\.text_cfg\.context_length is 100000"),
        ("text_cfg", {"vocab_size": 10**9}, r"model_cfg\.text_cfg\.vocab_size is 1000000000"),
        (None, {"embed_dim": 10**6}, r"model_cfg\.embed_dim is 1000000"),
        (None, {}, "says [0-9,]+ parameters, the weights beside it are [0-9,]+ bytes; they are of two models"),
        # with a side that cannot be made, the other one would be allocated first
        ("text_cfg", {"width": "wide"}, r"model_cfg\.text_cfg\.width is 'wide'"),
        ("text_cfg", {"deep": True}, "open_clip cannot create this model .*deep"),
    ],
)
def test_an_open_clip_configuration_of_another_model_is_not_allocated(tmp_path, monkeypatch, side, change, line):
    open_clip = pytest.importorskip("open_clip", reason="the teacher is one of open_clip")
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *args, **more: pytest.fail("it was built"))
    vision = {"image_size": 28, "layers": 2, "width": 64, "head_width": 64, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (model[side] if side else model).update(change)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": {}}))
    with pytest.raises(UserError, match="holds no weights"):
        load_teacher(f"local-dir:{tmp_path}")
    save_file({"a": torch.ones(128)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=f"open_clip_config.json: {line}"):
        load_teacher(f"local-dir:{tmp_path}")


def test_a_gguf_of_more_layers_than_it_holds_is_not_allocated(tmp_path, monkeypatch, home):
    gguf = pytest.importorskip("gguf", reason="the model is a GGUF file")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    from formats import FORMATS

    FORMATS["gguf"].make(tmp_path)
    assert load_llm(tmp_path / "llm").model.config.num_hidden_layers == 1
    path = tmp_path / "llm" / "tiny.gguf"
    field = gguf.GGUFReader(path).fields["llama.block_count"]
    data = bytearray(path.read_bytes())
    start = data.find(b"llama.block_count") + len("llama.block_count") + 4
    assert int.from_bytes(data[start : start + 4], "little") == 1 == int(field.parts[-1][0])
    data[start : start + 4] = (900).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"llm: .*its configuration says [\d,]+ parameters"):
        load_llm(tmp_path / "llm")


def test_names_that_are_no_text_are_photos_like_others(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    with tarfile.open(tmp_path / "p.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for name, data in (("\xff.png", stream.getvalue()), ("\xff.json", b'{"captions": ["a wall"]}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    photos = PhotoSet(str(tmp_path / "p.tar"))
    assert [photo.key.isascii() for photo in photos] == [True]
    assert len(examples_of_photos(list(photos), MIXTURES["align"])) == 1


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    from formats import FORMATS

    FORMATS["teacher-transformers"].make(folder := tmp_path_factory.mktemp("teacher"))
    monkeypatch.undo()
    return folder / "vit"


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("preprocessor_config.json", {"image_std": 0.5}, "std: is 0.5, and must be a list"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, r"std: \[1\] is 0, and must be a number above 0"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "mean has 1 numbers"),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "weights are quantized"),
        ("config.json", {"projection_dim": 24}, "of another shape than its configuration says"),
    ],
)
def test_a_teacher_of_transformers_that_is_not_as_it_says(vit, tmp_path, file, changes, what):
    shutil.copytree(vit, tmp_path / "vit")
    said = json.loads((vit / file).read_text())
    (tmp_path / "vit" / file).write_text(json.dumps(said | changes))
    with pytest.raises(UserError, match=f"teacher transformers:{tmp_path / 'vit'}: .*{what}"):
        load_teacher(f"transformers:{tmp_path / 'vit'}")


def test_adapters_of_an_infinite_scale_are_refused(tmp_path):
    save_tower(tmp_path / "tower")
    save_llm(tmp_path / "llm")
    vlm = VLM.build(tmp_path / "tower", tmp_path / "llm", dtype=torch.float32)
    vlm.add_adapters(2)
    vlm.new_projector = False
    vlm.save_pretrained(tmp_path / "vlm")
    path = tmp_path / "vlm" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": "@"}).replace('"@"', "-1e999"))
    with pytest.raises(UserError, match="adapter_config.json: lora_alpha is -inf"):
        VLM.from_pretrained(tmp_path / "vlm")


# ---- benchmarks


@pytest.mark.parametrize(
    ("task", "changes", "what"),
    [
        ("captions", {"captions": []}, "photo photo_001 has no captions"),
        ("pope", {"pope": [{"q": 5, "a": "yes", "s": "x"}]}, r"photo_001: pope: \[0\].q is 5, and must be a text"),
        ("pope", {"pope": [{"q": "\ud800", "a": "yes", "s": "x"}]}, r"photo_001: pope\[0\]: a text holds half of a character"),
        ("aokvqa", {"aokvqa": [{"question": "What?", "choices": ["a"], "correct_choice_idx": 4}]}, "correct_choice_idx is 4 of 1"),
        ("aokvqa", {"aokvqa": [[]]}, r"aokvqa: \[0\] is a list, and must be an object"),
        ("counting", {"qa": [{"q": "How many?", "a": "some", "s": "gvt_oc"}]}, "photo_001: the answer is 'some', expected a number"),
    ],
)
def test_questions_of_another_form_are_named(tmp_path, monkeypatch, task, changes, what):
    rows = [(key, tint, info | asked(i) | (changes if i == 1 else {})) for i, (key, tint, info) in enumerate(photos_of(4))]
    write_tar(tmp_path / "eval/coco_vqa.tar", rows)
    monkeypatch.setattr("sparse_vlm.vlm.VLM.from_pretrained", lambda name, device, num_tokens: FakeVLM())
    monkeypatch.setattr("sparse_vlm.vlm.config.parts_of", lambda name: None)
    with pytest.raises(UserError, match=f"coco_vqa.tar: .*{what}"):
        evaluate(["m"], [task], tmp_path, controls=["none"])


# ---- what killed runs leave


def test_what_safetensors_was_writing_goes_where_nobody_else_writes(tmp_path):
    for name in (".tmpAb3dE9", ".tmp-notes"):
        (tmp_path / name).touch()
    with locked(tmp_path):
        assert not (tmp_path / ".tmpAb3dE9").exists() and (tmp_path / ".tmp-notes").exists()


def test_configuration_of_a_llama_is_still_what_the_tests_make(tmp_path):
    """So that the cases above fail for what they change, and for nothing else."""
    save_llm(tmp_path)
    assert isinstance(load_llm(tmp_path).model.config, LlamaConfig)
