"""Training a VLM whose optimizer, gradients and weights two processes share: DeepSpeed's ZeRO on CPUs, over gloo."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_vlm
import torch
from commands import TWO, finish
from safetensors.torch import load_file

from sparse_vlm import VLM

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="sharing optimizer and weights needs DeepSpeed")


@pytest.fixture(scope="module")
def verb(tmp_path_factory) -> list[str]:
    """A run on photos and, as often, text alone: of two samples a step, one a process, every other step one process has no image."""
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for number, colour in enumerate(["red", "blue", "green", "yellow"] * 2):
        tiny_vlm.picture(colour, (40 + number, 40)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat color is it?"}, {"from": "gpt", "value": f"It is {colour}."}]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
        example = [{"from": "human", "value": "What color is it? You know it"}, {"from": "gpt", "value": f"It is {colour}."}]
        samples.append({"id": f"text {number}", "conversations": example})
    (folder / "data.json").write_text(json.dumps(samples))
    tower, llm = tiny_vlm.save_tower(folder / "tower"), tiny_vlm.save_llm(folder / "llm")
    start = ["train", "--stage", "instruct", "--tower", tower, "--llm", llm]
    data = ["--data", str(folder / "data.json"), "--images", str(folder), "--batch-size", "2", "--threads", "1"]
    return [*start, *data, "--lr", "1e-2", "--lr-llm", "1e-2", "--lr-tower", "1e-3"]


def start(line: list[str], out: Path, more: list[str]) -> subprocess.Popen[str]:
    """Two processes."""
    return subprocess.Popen([*TWO, *line, *where(out), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def where(out: Path) -> list[str]:
    return ["--out", str(out), "--cache", str(out.parent / "cache")]


def learn(line: list[str], out: Path, more: list[str]) -> list[float]:
    """Losses of a whole run of two processes."""
    assert "model written to" in finish(*line, *where(out), *more, start=TWO)
    return losses(out)


def losses(out: Path) -> list[float]:
    history = json.loads((out / "training.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


# what is frozen, what learns through adapters, what learns itself, and what is computed again: all in one
MORE = ["--rank", "2", "--tune-tower", "--gradient-checkpointing"]


@pytest.fixture(scope="module")
def alone(verb, tmp_path_factory) -> list[float]:
    """Losses of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    finish(*verb, *where(out), *MORE)
    return losses(out)


def check_whole(out: Path) -> None:
    """The folder holds whole tensors and answers."""
    assert json.loads((out / "vlm.json").read_text())["holds"] == {"tower": "tuned", "projector": "trained", "llm": "adapters"}
    assert all(tensor.numel() for file in out.glob("*.safetensors") for tensor in load_file(file).values())
    assert VLM.from_pretrained(out).generate([tiny_vlm.ask("What color is it?", tiny_vlm.picture("red"))], 4)


def test_two_processes_that_share_gradients_learn_in_parts_what_one_does_at_once(verb, tmp_path):
    more = [*MORE, "--batch-size", "4"]
    finish(*verb, *where(tmp_path / "alone"), *more, "--at-once", "4")
    found = learn(verb, tmp_path / "run", [*more, "--at-once", "1", "--deepspeed", "zero2"])
    assert len(found) == 4 and found == pytest.approx(losses(tmp_path / "alone"), rel=1e-2)  # bfloat16, where the machine has it
    check_whole(tmp_path / "run")


def test_two_processes_that_share_weights_learn_what_one_does_also_after_a_stop(verb, alone, tmp_path):
    out, more = tmp_path / "run", [*MORE, "--deepspeed", "zero3"]
    process = start(verb, out, more)
    until = time.monotonic() + 400
    while not list(out.glob("checkpoints/checkpoint-*/complete")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=200)
    saved = [path.name for path in out.glob("checkpoints/checkpoint-*")]
    assert saved and "checkpoint-8" not in saved, "it was stopped halfway"
    for path in out.rglob("*model_states.pt"):
        assert not torch.load(path, weights_only=False)["frozen_param_fragments"], "what is frozen is in no checkpoint"
    assert learn(verb, out, more) == pytest.approx(alone, rel=1e-2)
    check_whole(out)
