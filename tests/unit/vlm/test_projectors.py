"""Projectors that reduce tokens: each against what it is said to do, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from tiny_vlm import ask, picture, save_llm, save_tower

from sparse_vlm.cli.train import train
from sparse_vlm.errors import UserError
from sparse_vlm.export.run import export
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.projectors import PROJECTORS, make_projector

WIDTH, LLM, SIDE = 64, 48, 4


@pytest.fixture
def tokens() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, SIDE**2, WIDTH)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_each_makes_fewer_tokens_and_learns(kind: str, tokens: torch.Tensor) -> None:
    if kind == "abstractor":
        pytest.importorskip("timm", reason="its convolution blocks are timm's")
    projector = make_projector(kind, WIDTH, LLM, SIDE**2, 9)
    out = projector(tokens.requires_grad_())
    assert out.shape == (2, 9, LLM)
    out.square().sum().backward()
    assert tokens.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_reductions_by_hand(tokens: torch.Tensor) -> None:
    grid = tokens.unflatten(1, (SIDE, SIDE))
    upper_right = grid[:, :2, 2:]
    assert torch.allclose(make_projector("pool", WIDTH, LLM, 16, 4).reduce(tokens)[:, 1], upper_right.mean((1, 2)), atol=1e-6)
    assert torch.equal(make_projector("stride", WIDTH, LLM, 16, 4).reduce(tokens)[:, 1], grid[:, 1, 3])
    shuffled = make_projector("shuffle", WIDTH, LLM, 16, 4).reduce(tokens)[:, 1].sort().values
    assert torch.equal(shuffled, upper_right.flatten(1).sort().values), "all numbers of the cell, and no others"
    chosen = make_projector("random", WIDTH, LLM, 16, 4).reduce(tokens)
    assert all((chosen[0, i] == tokens[0]).all(-1).sum() == 1 for i in range(4))
    assert torch.equal(chosen, make_projector("random", WIDTH, LLM, 16, 4).reduce(tokens)), "the same tokens in every run"


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("count", [4, 9])
def test_each_computes_in_bfloat16(kind: str, count: int, tokens: torch.Tensor) -> None:
    if kind == "abstractor":
        pytest.importorskip("timm", reason="its convolution blocks are timm's")
    projector = make_projector(kind, WIDTH, LLM, SIDE**2, count)
    exact = projector(tokens)
    rounded = projector.bfloat16()(tokens.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), exact, atol=0.1 * exact.abs().max().item())


def test_a_resampler_knows_where_a_token_stands(tokens: torch.Tensor) -> None:
    resampler = make_projector("resampler", WIDTH, LLM, 16, 4)
    assert not torch.allclose(resampler(tokens), resampler(tokens.flip(1)), atol=1e-4)
    resampler.positions_in.zero_()
    assert torch.allclose(resampler(tokens), resampler(tokens.flip(1)), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "count", "message"),
    [("pool", 5, "both must be squares"), ("pool", 25, "the tower has 16"), ("average", 9, "no such kind; known are mlp, pool")],
)
def test_what_cannot_be_is_said(kind: str, count: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_projector(kind, WIDTH, LLM, 16, count)


def test_a_model_with_one_shows_its_llm_fewer_tokens_and_comes_back_from_disk(tmp_path: Path) -> None:
    tower, llm = save_tower(tmp_path / "tower", tokens=16), save_llm(tmp_path / "llm")
    vlm = VLM.build(tower, llm, num_tokens=4, projector="resampler")
    vlm.new_projector = False
    assert vlm.tokens_per_image == 4 and vlm.image_features([picture("red")]).shape == (1, 4, 32)
    rendered = vlm.renderer.text(ask("What is it?", picture("red")), answer_next=True)
    inputs = vlm.processor(text=[rendered], images=[picture("red")], return_tensors="pt")
    assert int((inputs["input_ids"] == vlm.renderer.image_id).sum()) == 4
    said = vlm.generate([ask("What is it?", picture("red"))], max_new_tokens=8)
    vlm.save_pretrained(tmp_path / "vlm")
    again = VLM.from_pretrained(tmp_path / "vlm")
    assert again.projector_kind == "resampler" and again.tokens_per_image == 4
    assert again.generate([ask("What is it?", picture("red"))], max_new_tokens=8) == said
    with pytest.raises(UserError, match="tensor queries is"):
        VLM.from_pretrained(tmp_path / "vlm", num_tokens=9, new_tower=save_tower(tmp_path / "other", tokens=9), keep_projector=True)
    under_another = VLM.from_pretrained(tmp_path / "vlm", new_tower=tower, fold=False, num_tokens=9, projector="pool")
    assert under_another.new_projector and under_another.image_features([picture("red")]).shape == (1, 9, 32)


def test_one_is_trained_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, llm = save_tower(tmp_path / "tower", tokens=16), save_llm(tmp_path / "llm")
    samples = [
        {"image": "red.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": said}]}
        for said in ("A wall.", "A door.", "A roof.", "A gate.")
    ]
    picture("red").save(tmp_path / "red.png")
    (tmp_path / "data.json").write_text(json.dumps(samples))
    shared = {"data": [str(tmp_path / "data.json")], "images": tmp_path, "cache": tmp_path / "cache", "batch_size": 2}
    with pytest.raises(typer.Exit) as checked:
        train(**shared, tower=tower, llm=llm, tokens=4, projector="pool", check=True)
    assert checked.value.exit_code == 0 and "4 " in capsys.readouterr().out
    train(**shared, tower=tower, llm=llm, tokens=4, projector="pool", out=tmp_path / "align")
    made = VLM.from_pretrained(tmp_path / "align")
    assert (made.projector_kind, made.tokens_per_image) == ("pool", 4)
    with pytest.raises(UserError, match="projector .pool. is not supported by transformers' LLaVA"):
        export(str(tmp_path / "align"), "transformers", tmp_path / "exported")
    with pytest.raises(UserError, match="--projector pool: is for a new projector"):
        train(**shared, init=str(tmp_path / "align"), projector="pool", out=tmp_path / "again")
