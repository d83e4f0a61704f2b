"""Models of transformers come in by one door: no code of theirs runs, nobody is asked, and whatever is wrong with them is one line."""

from __future__ import annotations

import ast
import io
import json
import shutil
import struct

import pytest
import torch
from modules import MODULES
from safetensors.torch import load_file, save_file
from tiny_vlm import save_llm, save_tower

from sparse_vlm.bench.llms import plan_llm
from sparse_vlm.errors import UserError
from sparse_vlm.teachers import TeacherError, load_teacher
from sparse_vlm.teachers.text import TextEncoder, _load_text_tower
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.llm import load_llm, load_tokenizer

CODE = """\
open({canary!r}, "w")
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig):
    model_type = "evilmodel"
class M(LlamaForCausalLM):
    config_class = C
"""
MAPS = {
    "config.json": {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoModel": "evil.M"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.T", None]}},
    "processor_config.json": {"auto_map": {"AutoProcessor": "evil.P"}},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "llm"
    save_llm(folder)
    return folder


@pytest.fixture
def llm(good, tmp_path):
    """A good model's folder, to be spoilt."""
    return shutil.copytree(good, tmp_path / "llm")


def edit(path, **change) -> None:
    said = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**said, **change}))


def refused(folder, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_llm(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("file", MAPS)
@pytest.mark.parametrize("kind", ["evilmodel", "llama"])
def test_code_of_a_models_folder_is_never_run_and_nobody_is_asked(llm, tmp_path, monkeypatch, file, kind):
    canary = tmp_path / "canary"
    (llm / "evil.py").write_text(CODE.format(canary=str(canary)))
    edit(llm / "config.json", model_type=kind)
    edit(llm / file, **MAPS[file])
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    (llm / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    for load in (
        load_llm,
        load_tokenizer,
        lambda folder: _load_text_tower(folder),
        lambda folder: load_teacher(f"transformers:{folder}"),
        plan_llm,
    ):
        with pytest.raises(UserError, match=rf"{file}: asks for remote code \(auto_map\), which is never run") as caught:
            load(str(llm)) if load is plan_llm else load(llm)
        assert "\n" not in str(caught.value)
    assert not canary.exists() and answers.tell() == 0


@pytest.mark.parametrize("change", [{"attn_implementation": "evil/kernel"}, {"text_config": {"_attn_implementation": "evil/kernel"}}])
def test_kernels_of_the_hub_are_code_as_well(llm, change):
    edit(llm / "config.json", **change)
    refused(llm, r"config\.json: asks for remote code")


def test_other_libraries_that_call_transformers_ask_nobody(llm, tmp_path, monkeypatch):
    """open_clip has text sides of transformers, and says nothing about trust."""
    from transformers import AutoConfig

    from sparse_vlm.hub.pretrained import without_prompts

    edit(llm / "config.json", model_type="evilmodel", **MAPS["config.json"])
    (llm / "evil.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    monkeypatch.setattr("sys.stdin", answers := io.StringIO("y\n"))
    with without_prompts(), pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(llm)
    assert answers.tell() == 0 and not (tmp_path / "canary").exists()


def test_every_call_of_transformers_goes_through_the_door():
    """`AutoX.from_pretrained` and `AutoX.from_config` are called in one place, or say themselves that nothing is trusted."""
    found = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            if node.func.attr in ("from_pretrained", "from_config") and called.lower().startswith("auto"):
                trusts = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "trust_remote_code"]
                found.append(called)
                assert trusts == ["False"], f"{name}:{node.lineno}: {called} does not say trust_remote_code=False"
    assert "auto.from_pretrained" in found


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), r"lack 1 tensor, model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda state: [state.pop(name) for name in list(state) if "layers.1" in name], r"lack 9 tensors, model\.layers\.1\."),
        (lambda state: [state.update({f"language_{name}": state.pop(name)}) for name in list(state)], "lack .* tensors, (model|lm_head)"),
        (lambda state: state.update(evil=torch.zeros(2)), "no place for, evil for one"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight|mismatched_sizes"),
        (lambda state: state["model.norm.weight"].fill_(float("nan")), r"tensor model\.norm\.weight holds numbers that are not finite"),
        (
            lambda state: state["model.layers.0.mlp.up_proj.weight"].fill_(float("inf")),
            r"tensor model\.layers\.0\.mlp\.up_proj\.weight holds",
        ),
    ],
)
def test_weights_that_are_not_whole_are_refused(llm, change, named):
    state = load_file(llm / "model.safetensors")
    change(state)
    save_file(state, llm / "model.safetensors", metadata={"format": "pt"})
    refused(llm, named)


def test_tied_weights_lack_nothing(llm):
    assert "lm_head.weight" not in load_file(llm / "model.safetensors")
    model = load_llm(llm).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


class Pickled:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({self.canary!r}, 'w')",)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0garbage"),
        ("model.safetensors", b"\xff" * 64),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b"null"),
        ("config.json", b'{"a": ' * 50_000),
        ("config.json", b"\xff\xfe"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "evil"}}'),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("chat_template.jinja", b"\xff\xfe"),
        ("generation_config.json", b"[]"),
    ],
)
def test_file_that_is_spoilt_is_one_line(llm, file, content):
    (llm / file).write_bytes(content)
    if file == "tokenizer_config.json":
        (llm / "chat_template.jinja").unlink(missing_ok=True)
    refused(llm, "not a language model that transformers can load|no chat template|its weights|chat template must be text|nested too deep")


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": -1},
        {"num_attention_heads": "two"},
        {"hidden_size": 10**9},
        {"hidden_size": 0},
        {"vocab_size": 10**9},
        {"intermediate_size": 10**9},
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": True},
        {"dtype": "evil", "torch_dtype": "evil"},
        {"model_type": "evil"},
        {"model_type": 5},
        {"model_type": "llava"},
        {"hidden_act": "evil"},
        {"rope_parameters": 5},
        {"pad_token_id": 10**9},
    ],
    ids=repr,
)
def test_configuration_that_cannot_be_is_one_line(llm, change):
    edit(llm / "config.json", **change)
    with pytest.raises(UserError) as caught:
        load_llm(llm)
    assert "\n" not in str(caught.value) and str(llm) in str(caught.value)


def test_pickle_is_not_run(llm, tmp_path):
    (llm / "model.safetensors").unlink()
    torch.save({"a": Pickled(str(tmp_path / "canary")), "b": torch.zeros(9000)}, llm / "pytorch_model.bin")
    refused(llm, "not a language model")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointer_of_git_lfs_says_what_it_is(llm, file):
    (llm / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refused(llm, rf"{file}: a git-lfs pointer")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GARBAGE",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
        b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ],
)
def test_gguf_that_is_none_is_one_line(tmp_path, monkeypatch, content):
    monkeypatch.setenv("SPARSE_VLM_HOME", str(tmp_path / "home"))
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "m.gguf").write_bytes(content)
    refused(tmp_path / "g", "not a language model that transformers can load|git-lfs pointer")
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"])
def test_template_that_fails_is_one_line_when_a_vlm_is_built(llm, tmp_path, monkeypatch, template):
    monkeypatch.setattr("sparse_vlm.vlm.prompts.TEMPLATE_SECONDS", 0.2)
    (llm / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="the LLM's chat template (fails|does not finish)"):
        VLM.build(save_tower(tmp_path / "tower"), llm)


def test_bench_of_a_model_of_pictures_is_one_line(llm):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=8, patch_size=4), text_config=LlamaConfig(**small, vocab_size=300)
    )
    config.save_pretrained(llm)
    with pytest.raises(UserError, match=r"^--llm .*llm: not a language model that transformers can load \(") as caught:
        plan_llm(str(llm))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"embed_dim": 0}, {"embed_dim": "8"}, {"context_length": True}, {"text_tower": 5}, {"pooling": "max"}])
def test_text_side_that_cannot_be_is_one_line(tmp_path, change):
    said = {"format": "sparse-vlm/text/1", "text_tower": "x", "embed_dim": 8, "context_length": 9, "pooling": "mean"}
    (tmp_path / "config.json").write_text(json.dumps({**said, **change}))
    with pytest.raises(UserError, match=f"not a text side .*{next(iter(change))}"):
        TextEncoder.from_pretrained(tmp_path)


def test_teacher_with_a_weight_that_is_no_number_is_refused(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(TeacherError, match=r"tensor blocks\.0\.attn\.qkv\.weight holds numbers that are not finite"):
        load_teacher(f"timm:vit_tiny_patch16_224@{tmp_path / 'm.safetensors'}")
    (tmp_path / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(TeacherError, match="git-lfs pointer"):
        load_teacher(f"timm:vit_tiny_patch16_224@{tmp_path / 'm.safetensors'}")


def test_a_tokenizer_with_numbers_beyond_all_rows_is_refused() -> None:
    from sparse_vlm.vlm.vocabulary import add_image_row

    class Tokenizer:
        name_or_path = "odd-tokenizer"

        def get_vocab(self) -> dict[str, int]:
            return {"<image>": 1, "far": 2_147_483_648}

        def add_special_tokens(self, *tokens: object, **options: object) -> None:
            """It has the image's already."""

        def convert_tokens_to_ids(self, token: str) -> int:
            return self.get_vocab()[token]

    class Model:
        def get_input_embeddings(self) -> torch.nn.Embedding:
            return torch.nn.Embedding(8, 4)

    with pytest.raises(UserError, match="odd-tokenizer.*2,147,483,648"):
        add_image_row(Tokenizer(), Model())
