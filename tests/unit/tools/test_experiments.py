"""Where finished runs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from experiments import FinishedRuns

from sparse_vlm.errors import UserError


def test_processes_keep_each_others_runs(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "results.json"
    here, there = FinishedRuns(path, {"views": 64}), FinishedRuns(path, {"views": 64})
    here.add("a-seed0", {"cosine": 0.8})
    there.add("b-seed0", {"cosine": 0.9})
    assert FinishedRuns(path, {"views": 64}).runs == {"a-seed0": {"cosine": 0.8}, "b-seed0": {"cosine": 0.9}} == there.runs


def test_runs_of_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    FinishedRuns(path, {"views": 64}).add("a-seed0", {"cosine": 0.8})
    with pytest.raises(UserError, match="is of {'views': 64}, this is {'views': 65}; choose another --out"):
        FinishedRuns(path, {"views": 65})
