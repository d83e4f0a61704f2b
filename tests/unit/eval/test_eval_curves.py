"""The plot of what a model is worth against its number of tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_vlm.eval import curves
from sparse_vlm.eval.metrics import mean
from sparse_vlm.eval.report import save
from sparse_vlm.eval.run import Column, Report
from sparse_vlm.eval.task import Result
from sparse_vlm.eval.tasks import TASKS

FEW, MANY, TEACHER = Column("elastic, 9 tokens"), Column("elastic, 36 tokens"), Column("teacher")


def report(*counts: int) -> Report:
    """A model of right answers in a quarter and in a half of the cases, and its teacher of always right ones."""
    models = {
        column.model: {
            "kind": "tower",
            "model": column.model.partition(",")[0],
            "tokens": tokens,
            "macs": 1,
            "parameters": 1,
            "ms": {"median": 2.0 * tokens, "low": 1.0, "high": 99.0, "threads": 1},
        }
        for column, tokens in zip((MANY, FEW, TEACHER), counts, strict=True)
    }
    right = {MANY: [1, 1, 0, 0], FEW: [1, 0, 0, 0], TEACHER: [1, 1, 1, 1]}
    found = Report(models, {name: TASKS[name] for name in ("imagenet", "cosine")}, teacher="teacher")
    found.results["imagenet"] = {column: Result({"top-1": mean(np.array(hits))}, []) for column, hits in right.items()}
    closeness = {MANY: 0.9, FEW: 0.7}
    found.results["cosine"] = {c: Result({"centred": mean(np.full(2, v), unit="")}, []) for c, v in closeness.items()}
    return found


def test_a_panel_a_task_and_a_line_a_model(tmp_path: Path) -> None:
    panels = curves.panels(report(36, 9, 257))
    assert list(panels) == ["all tasks", "imagenet", "cosine", "time"]
    assert panels["imagenet"] == ("% of the teacher", {MANY: 50.0, FEW: 25.0})
    assert panels["cosine"] == ("centred", {MANY: pytest.approx(0.9), FEW: pytest.approx(0.7)})
    assert panels["time"].values == {MANY: 72.0, FEW: 18.0, TEACHER: 514.0}
    assert curves.lines(report(36, 9, 257)) == {"elastic": [MANY, FEW], "teacher": [TEACHER]}
    save(report(36, 9, 257), tmp_path)
    with Image.open(tmp_path / "tokens.png") as picture:
        assert picture.width > picture.height > 200


def test_without_several_budgets_there_is_no_picture(tmp_path: Path) -> None:
    save(report(49, 49, 257), tmp_path)
    assert not (tmp_path / "tokens.png").exists()
