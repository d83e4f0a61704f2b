"""The scripts of examples/ run, on models of toy size."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_vlm import photo, save_llm, save_tower, stir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls `main` of a script of examples/ with the arguments of a command line."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *arguments: str | Path) -> Any:
        spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main([str(argument) for argument in arguments])

    return run


def test_a_tower_is_bootstrapped(example: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("open_clip")
    from tiny_teacher import write_teacher

    (tmp_path / "photos").mkdir()
    for index in range(40):
        photo(64, 60, index).save(tmp_path / "photos" / f"{index}.png")
    folders = ["--data", tmp_path / "photos", "--cache", tmp_path / "cache", "--out", tmp_path / "tower"]
    result = example("bootstrap_tower", "--teacher", write_teacher(tmp_path / "vit"), "--recipe", "tiny", "--views", 32, *folders)
    assert result.completed and (tmp_path / "tower" / "model.safetensors").is_file()
    assert f"{tmp_path / 'tower'}: 49 tokens of width 64" in capsys.readouterr().out


def test_a_tower_goes_into_a_stock_llava_and_its_projector_learns(example: Callable[..., Any], tmp_path: Path) -> None:
    losses = example("swap_tower", "--llava", stock_llava(tmp_path), "--tower", save_tower(tmp_path / "tower"), "--steps", 3)
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_questions_are_answered(example: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_vlm import VLM

    vlm = VLM.build(save_tower(tmp_path / "tower"), save_llm(tmp_path / "llm"), dtype=torch.float32)
    stir(vlm, 0.5)
    vlm.save_pretrained(tmp_path / "vlm")
    answers = example("chat", "--model", tmp_path / "vlm", "--max-new-tokens", 4, "What?", "And now?")
    assert len(answers) == 2 and all(answers)
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


def test_costs_are_measured(example: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = save_tower(tmp_path / "tower")
    (request,) = example("token_cost", "--model", tower, "--llm", save_llm(tmp_path / "llm"), "--dtype", "float32", "--rounds", 3)
    assert request["tokens"] == 5 and request["macs"] > 0 and all(math.isfinite(ms) and ms > 0 for ms in request["ms"].values())
    assert tower in capsys.readouterr().out


def stock_llava(folder: Path) -> Path:
    """A LLaVA with CLIP's ViT, both of toy size, as transformers saves one."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    from sparse_vlm import VLM

    vlm = VLM.build(save_tower(folder / "any"), save_llm(folder / "llm"), dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=16
    )
    config = LlavaConfig(
        vision_config=vision, text_config=vlm.model.config.text_config, image_token_index=vlm.model.config.image_token_index
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "llava")
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, vlm.tokenizer, patch_size=8, chat_template=vlm.processor.chat_template, num_additional_image_tokens=1
    ).save_pretrained(folder / "llava")
    return folder / "llava"
