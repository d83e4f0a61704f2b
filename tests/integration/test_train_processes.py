"""Training a VLM in several processes, as torchrun starts them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_vlm
from commands import ALONE, TWO, finish

from sparse_vlm import VLM


def run(folder: Path, name: str, verb: list[str], start: list[str]) -> tuple[str, list[float]]:
    """What a run says, and its losses; each looks into a cache of its own."""
    said = finish(*verb, "--out", str(folder / name), "--cache", str(folder / f"{name}-cache"), start=start)
    history = json.loads((folder / name / "training.json").read_text())["history"]
    return said, [entry["loss"] for entry in history if "loss" in entry]


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    tower, llm = tiny_vlm.save_tower(tmp_path / "tower"), tiny_vlm.save_llm(tmp_path / "llm")
    samples = []
    for number, colour in enumerate(["red", "blue", "green", "yellow"] * 6):
        tiny_vlm.picture(colour, (40 + number, 40)).save(tmp_path / f"{number}.png")
        # answers of different lengths: a process must not count its own as much as the other's, whatever their number
        turns = [
            {"from": "human", "value": "<image>\nWhat color is it?"},
            {"from": "gpt", "value": f"It is {colour}{' indeed' * (number % 5)}."},
        ]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    # and steps in which one process, or both, have no image
    example = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "Yes."}]
    samples += [{"id": f"text {number}", "conversations": example} for number in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    verb = [
        "train",
        "--stage",
        "instruct",
        "--tower",
        tower,
        "--llm",
        llm,
        "--data",
        str(tmp_path / "data.json"),
        "--images",
        str(tmp_path),
    ]
    verb += ["--batch-size", "4", "--lr", "1e-2", "--lr-llm", "1e-2", "--threads", "1"]
    _, alone = run(tmp_path, "one", verb, ALONE)
    said, together = run(tmp_path, "two", verb, TWO)
    assert len(alone) == 9
    assert together == pytest.approx(alone, rel=1e-2)
    assert said.count("model written to") == 1
    VLM.from_pretrained(tmp_path / "two")
