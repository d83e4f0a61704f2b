"""The ablation's rows, and what it runs and shows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import ablation
import pytest
import scaling
import typer
from typer.testing import CliRunner

from sparse_vlm.distill.recipes import changed, get_recipe
from sparse_vlm.errors import UserError

ARGUMENTS = ["--teacher", "local-dir:t", "--data", "a.tar", "--data", "b.tar", "--views", "64"]


def invoke(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(ablation.main)
    done = CliRunner().invoke(app, [*ARGUMENTS, *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_row_is_a_student_of_its_own() -> None:
    spec = scaling.RUNS[0].teacher
    for row in ablation.ROWS:
        changed(get_recipe(row.recipe), row.changes).config(spec)
    assert len({row.slug for row in ablation.ROWS}) == len(ablation.ROWS)


def test_what_is_missing_is_run_and_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def bootstrap(line: list[str], stdout: object) -> SimpleNamespace:
        ran.append(line[1:])
        cosine = 0.8 + 0.01 * len(ran)
        folder = Path(line[line.index("--out") + 1])
        folder.mkdir(parents=True)
        history = [{"eval_cosine": 0.1, "eval_token_cosine": 0.1}, {"eval_cosine": cosine, "eval_token_cosine": 0.9}]
        (folder / "training.json").write_text(json.dumps({"history": history}))
        spec = scaling.RUNS[0].teacher
        (folder / "config.json").write_text(json.dumps(get_recipe("elastic").config(spec).to_dict()))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", bootstrap)
    said = invoke("--only", "objective", "--seed", "0", "--seed", "1", "--out", str(tmp_path))
    assert len(ran) == 2 * 4, "the reference and three objectives, two seeds"
    first = ran[1]
    assert first[:3] == ["bootstrap", "--recipe", "elastic"] and "dense_weight=0" in first and first.count("--data") == 2
    # the reference was run first and fifth, 0.81 and 0.85, the first objective second and sixth
    assert "| reference | elastic | `--recipe elastic` | 5.09 | 2 | 0.830 | 0.040 |  | 0.900 | 0.000 |  |" in said
    assert "`--set dense_weight=0` | 5.09 | 2 | 0.840 | 0.040 | +0.010 | 0.900 | 0.000 | +0.000 |" in said
    for folder in tmp_path.glob("*-seed*"):
        shutil.rmtree(folder)  # results.json is enough
    again = invoke("--only", "objective", "--seed", "0", "--seed", "1", "--out", str(tmp_path))
    assert again == said and len(ran) == 8
    assert invoke("--out", str(tmp_path), "--table").count("\n") == len(ablation.ROWS) + 2
    with pytest.raises(UserError, match="is of {'views': 64}, this is {'views': 65}"):
        invoke("--out", str(tmp_path), "--views", "65")
    with pytest.raises(UserError, match="--only looking: no such group; there are reference, looks"):
        invoke("--only", "looking")
