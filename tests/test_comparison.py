"""The comparison's rows: what it runs, keeps and shows."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from sparse_vlm.errors import UserError
from sparse_vlm.projectors import PROJECTORS
from sparse_vlm.train import comparison

ARGUMENTS = ["--vit", "tiny", "--init", "build/read", "--data", "a.tar", "--eval-data", "data"]


def invoke(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(comparison.main)
    done = CliRunner().invoke(app, [*ARGUMENTS, *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_rows_differ_in_tower_and_projector_alone(tmp_path: Path) -> None:
    plan = comparison.Plan("V", "I", ("a", "b"), "E", tmp_path, 49, 30, 960, 1)
    pool, ours = (plan.commands(next(r for r in comparison.RIVALS if r.name == name), 3) for name in ("pool", "tiny"))
    assert pool[0][pool[0].index("--tower") + 1] == "V" and ours[0][ours[0].index("--tower") + 1] == "tiny"
    assert pool[0][pool[0].index("--projector") + 1] == "pool" and "--projector" not in ours[0]
    for one, other in zip(pool[1:], ours[1:], strict=True):
        assert [word.replace("pool", "tiny") for word in one] == other
    assert all(rival.projector in {"mlp", *PROJECTORS} for rival in comparison.RIVALS)


def test_what_is_missing_is_run_and_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(line: list[str], stdout: object) -> SimpleNamespace:
        ran.append(line[1])
        if line[1] == "eval":
            folder = Path(line[line.index("--out") + 1])
            folder.mkdir(parents=True)
            value = 0.5 + 0.1 * (len(ran) > 3)
            names = {"captions": ["CIDEr"], "pope": ["accuracy"], "aokvqa": ["accuracy"]}
            rows = [{"task": task, "control": "none", "metrics": {name: {"value": value} for name in of}} for task, of in names.items()]
            (folder / "report.json").write_text(json.dumps({"results": rows}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    said = invoke("--only", "pool", "--seed", "0", "--seed", "1", "--out", str(tmp_path))
    assert ran == ["train", "train", "eval"] * 2
    assert "| pool | the whole ViT, tokens averaged | 1.59 | 2 | 55.0 (10.0) | 55.0 (10.0) | 55.0 (10.0) |" in said
    assert invoke("--only", "pool", "--seed", "0", "--seed", "1", "--out", str(tmp_path)) == said and len(ran) == 6
    with pytest.raises(UserError, match="choose another --out"):
        invoke("--samples", "3", "--out", str(tmp_path))
    with pytest.raises(UserError, match="no such row; there are tiny, pool"):
        invoke("--only", "average")
