"""Fine-tuning from Python: one config in, a result out."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_vlm import picture, save_llm, save_tower

from sparse_vlm.errors import UserError
from sparse_vlm.train import Reporter, SFTConfig, sft
from sparse_vlm.train.finetuning import check_data
from sparse_vlm.train.loss_module import VLMTrainer
from sparse_vlm.vlm import VLM


class Recorder(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.tables: list[tuple[str, ...]] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def table(self, title, columns, rows) -> None:
        self.tables += map(tuple, rows)


@pytest.fixture
def config(tmp_path: Path) -> SFTConfig:
    """A run of four steps."""
    parts = {"tower": save_tower(tmp_path / "tower"), "llm": save_llm(tmp_path / "llm")}
    samples = []
    for number, colour in enumerate(["red", "blue"] * 8):
        picture(colour).save(tmp_path / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": f"It is {colour}."}]
        samples.append({"id": number, "image": f"{colour}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(samples))
    data = {"data": [str(tmp_path / "data.json")], "images": tmp_path, "cache": tmp_path / "cache"}
    return SFTConfig(**data, **parts, out=tmp_path / "run", batch_size=4, threads=1)


def test_a_run_is_reported_and_not_repeated(config: SFTConfig, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder()
    result = sft(config, recorder)
    assert result.completed and result.out == config.out
    history = json.loads((result.out / "training.json").read_text())["history"]
    assert result.metrics == {"loss": history[-1]["loss"]}
    assert [row[0] for row in recorder.tables] == ["tower", "projector", "LLM"] and [row[3] != "frozen" for row in recorder.tables] == [
        0,
        1,
        0,
    ]
    assert any("[[It is red." in text for text in recorder.messages), "what carries loss is shown"
    assert capsys.readouterr().out == "", "only a reporter prints"
    assert VLM.from_pretrained(result.out).tokens_per_image == 5
    written = (result.out / "training.json").stat().st_mtime_ns
    assert sft(config) == result and (result.out / "training.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="seed"):
        sft(dataclasses.replace(config, seed=1))


def test_an_interrupted_run_says_so_and_goes_on(config: SFTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, original = [], VLMTrainer.compute_loss

    def interrupting(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "compute_loss", interrupting)
    result = sft(config)
    assert not result.completed and not result.metrics and len(steps) == 2
    assert sft(config).completed and len(steps) == 4


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"out": None}, "--out"),
        ({"stage": "fly"}, "--stage fly"),
        ({"on_bad_image": "cry"}, "--on-bad-image cry"),
        ({"keep_projector": True}, "--keep-projector"),
        ({"lr_llm": 1e-3}, "--lr-llm"),
        ({"lr_tower": 1e-3}, "--lr-tower"),
        ({"stage": "read", "tune_tower": True}, "--tune-tower"),
        ({"tune_tower": True, "tower_lora_rank": 2}, "--tower-lora"),
        ({"report_to": ["paper"]}, "paper"),
    ],
)
def test_what_does_not_go_together_is_refused_before_data_is_read(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        sft(dataclasses.replace(SFTConfig(data=["missing.json"], out="run"), **changes))


def test_data_is_checked_without_a_folder(config: SFTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Callable[..., None] = lambda *args, **options: pytest.fail("a model was started")  # noqa: E731
    monkeypatch.setattr(VLM, "build", refuse)
    report = check_data(dataclasses.replace(config, out=None))
    assert report.samples == 16 and not report.problems and report.context
