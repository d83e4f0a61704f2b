"""The text side: what is saved is what is loaded, what it computes is what open_clip computes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_vlm.errors import UserError
from sparse_vlm.teachers.text import TEXT_TOWERS, TextEncoder

TEXTS = ["a dog runs", "the cat sat on the mat and the dog ran", "  a   cat\nran &amp; sat ", "a " * 40]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "mat", "sat", "ran", "runs", "on", "and", "&", ";", "amp"]
TEACHER = Path(__file__).resolve().parents[3] / "build" / "teacher"


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text tower of random weights with a tokenizer of eighteen words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text-tower")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    BertModel(config, add_pooling_layer=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder whose text side is that tower."""
    import open_clip

    folder = tmp_path_factory.mktemp("teacher")
    for file in tower.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    text = {
        "hf_model_name": str(tower),
        "hf_tokenizer_name": "a/tiny-tower",
        "hf_proj_type": "linear",
        "hf_pooler_type": "mean_pooler",
        "context_length": 12,
    }
    vision = {"image_size": 28, "layers": 1, "width": 64, "head_width": 64, "patch_size": 14}
    config = {"embed_dim": 24, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    model.text.transformer.load_state_dict(
        {k: v for k, v in load_file(tower / "model.safetensors").items() if not k.startswith("pooler.")}, strict=False
    )
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def encoder(tower: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> TextEncoder:
    monkeypatch.setitem(TEXT_TOWERS, "a/tiny-tower", str(tower))
    return TextEncoder.from_teacher(f"local-dir:{teacher}")


def open_clip_embeds(teacher: Path, texts: list[str]) -> torch.Tensor:
    import open_clip

    model = open_clip.create_model(f"local-dir:{teacher}").eval()
    with torch.inference_mode():
        return model.encode_text(open_clip.get_tokenizer(f"local-dir:{teacher}")(texts))


def test_computes_what_open_clip_computes(encoder: TextEncoder, teacher: Path) -> None:
    ours, theirs = encoder.encode(TEXTS), open_clip_embeds(teacher, TEXTS)
    assert ours.shape == (len(TEXTS), 24)
    assert encoder.width == 24
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_a_batch_changes_nothing(encoder: TextEncoder) -> None:
    many = TEXTS * 30
    torch.testing.assert_close(encoder.encode(many)[:4], torch.cat([encoder.encode([text]) for text in TEXTS]), atol=1e-5, rtol=0)


def test_saved_is_loaded(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "text")
    assert set(load_file(tmp_path / "text" / "model.safetensors")) == {"projection.weight", "logit_scale"}
    again = TextEncoder.from_pretrained(tmp_path / "text")
    assert torch.equal(again.encode(TEXTS), encoder.encode(TEXTS))
    assert torch.equal(again.logit_scale, encoder.logit_scale)
    assert again.config == encoder.config


@pytest.mark.skipif(not TEACHER.is_dir(), reason="no teacher at build/teacher")
def test_the_real_teacher() -> None:
    texts = ["A photo of a tench.", "Two dogs play in the snow .", "t-shirt &amp; jeans"]
    difference = (TextEncoder.from_teacher(f"local-dir:{TEACHER}").encode(texts) - open_clip_embeds(TEACHER, texts)).abs().max()
    assert difference < 1e-5, f"max difference {difference:.2e}"


def test_a_tuned_text_tower_is_refused(encoder: TextEncoder, teacher: Path, tmp_path: Path) -> None:
    tensors = load_file(teacher / "open_clip_model.safetensors")
    tensors["text.transformer.embeddings.word_embeddings.weight"][7] += 1e-3
    (tmp_path / "open_clip_config.json").write_bytes((teacher / "open_clip_config.json").read_bytes())
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match="differs from .* in embeddings.word_embeddings.weight"):
        TextEncoder.from_teacher(f"local-dir:{tmp_path}")


def test_teachers_without_such_a_text_side(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give local-dir:PATH"):
        TextEncoder.from_teacher("ViT-B-16")
    with pytest.raises(UserError, match="the zoo has no text tower a/tiny-tower"):
        TextEncoder.from_teacher(f"local-dir:{teacher}")
    config = json.loads((teacher / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_pooler_type"] = "cls_pooler"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="hf_pooler_type 'cls_pooler'"):
        TextEncoder.from_teacher(f"local-dir:{tmp_path}")


def test_damaged_folders(encoder: TextEncoder, tmp_path: Path) -> None:
    def expect(line: str) -> None:
        with pytest.raises(UserError, match=line) as caught:
            TextEncoder.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)

    expect("not a text side")
    encoder.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"projection.weight": tensors["projection.weight"]}, tmp_path / "model.safetensors")
    expect("tensor logit_scale is missing")
    save_file({**tensors, "projection.weight": torch.zeros(3, 16)}, tmp_path / "model.safetensors")
    expect(r"projection.weight is \(3, 16\), expected \(24, 16\)")
    save_file({**tensors, "bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    expect("unexpected tensor bias")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "format": "other"}))
    expect("format is 'other'")
    (tmp_path / "config.json").write_text(json.dumps({**config, "pooling": "max"}))
    expect("pooling 'max'")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "config.json").write_text(json.dumps(config))
    expect("not a text side")


def test_no_text(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="no text"):
        encoder.encode([])
