"""The comparison's rows: what it runs, keeps and shows."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare_reductions as comparison
import pytest
import typer
from typer.testing import CliRunner

from sparse_vlm.errors import UserError
from sparse_vlm.vlm.projectors import PROJECTORS

ARGUMENTS = ["--vit", "tiny", "--init", "build/read", "--data", "a.tar", "--eval-data", "data"]


def invoke(*arguments: str, exit_code: int = 0) -> str:
    app = typer.Typer()
    app.command()(comparison.main)
    done = CliRunner().invoke(app, [*ARGUMENTS, *arguments], catch_exceptions=False)
    assert done.exit_code == exit_code, done.output
    return done.stdout


def test_rows_differ_in_tower_and_projector_alone(tmp_path: Path) -> None:
    plan = comparison.Plan("V", "I", ("a", "b"), "E", tmp_path, 49, 30, 960, 1)
    pool, ours = (plan.commands(next(r for r in comparison.BASELINES if r.name == name), 3) for name in ("pool", "tiny"))
    assert pool[0][pool[0].index("--tower") + 1] == "V" and ours[0][ours[0].index("--tower") + 1] == "tiny"
    assert pool[0][pool[0].index("--projector") + 1] == "pool" and "--projector" not in ours[0]
    for one, other in zip(pool[1:], ours[1:], strict=True):
        assert [word.replace("pool", "tiny") for word in one] == other
    assert all(baseline.projector in {"mlp", *PROJECTORS} for baseline in comparison.BASELINES)


class Commands:
    """Stands in for `subprocess.run`: an evaluation writes its report, with 0.5 for the first row that gets there and 0.6 for others.

    Args:
        fails: the verb of a command that ends with exit code 3.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.ran: list[str] = []
        self.fails = fails
        monkeypatch.setattr(subprocess, "run", self)

    def __call__(self, line: list[str], stdout: Any, stderr: Any = None) -> SimpleNamespace:
        self.ran.append(line[1])
        if stderr is not None:
            stdout.write(f"{line[1]} said\n".encode())
        if line[1] == self.fails:
            return SimpleNamespace(returncode=3)
        if line[1] == "eval":
            folder = Path(line[line.index("--out") + 1])
            folder.mkdir(parents=True)
            value = 0.5 + 0.1 * (self.ran.count("eval") > 1)
            names = {"captions": ["CIDEr"], "pope": ["accuracy"], "aokvqa": ["accuracy"]}
            rows = [{"task": task, "control": "none", "metrics": {name: {"value": value} for name in of}} for task, of in names.items()]
            (folder / "report.json").write_text(json.dumps({"results": rows}))
        return SimpleNamespace(returncode=0)


def test_what_is_missing_is_run_and_the_rest_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    said = invoke("--only", "pool", "--seed", "0", "--seed", "1", "--out", str(tmp_path))
    assert commands.ran == ["train", "train", "eval"] * 2
    assert "| pool | the whole ViT, tokens averaged | 1.59 | 2 | 55.0 (10.0) | 55.0 (10.0) | 55.0 (10.0) |" in said
    assert invoke("--only", "pool", "--seed", "0", "--seed", "1", "--out", str(tmp_path)) == said and len(commands.ran) == 6
    with pytest.raises(UserError, match="choose another --out"):
        invoke("--samples", "3", "--out", str(tmp_path))
    with pytest.raises(UserError, match="no such row; there are tiny, pool"):
        invoke("--only", "average")


def test_rows_that_run_beside_each_other_keep_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(monkeypatch)
    said = invoke("--only", "pool", "--seed", "0", "--seed", "1", "--at-once", "2", "--out", str(tmp_path))
    assert sorted(commands.ran) == ["eval"] * 2 + ["train"] * 4
    assert "| 2 | 55.0 (10.0) |" in said
    for seed in (0, 1):
        assert (tmp_path / f"pool-seed{seed}" / "log.txt").read_text() == "train said\ntrain said\neval said\n"


def test_a_row_that_fails_ends_the_table_and_says_where_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Commands(monkeypatch, fails="eval")
    plan = comparison.Plan("V", "I", ("a",), "E", tmp_path, 49, 30, 960, 1)
    with pytest.raises(typer.Exit) as failed:
        comparison.run(comparison.Scores(plan), comparison.BASELINES[0], 0, log=True)
    assert failed.value.exit_code == 3
    assert f"failed, with exit code 3; {tmp_path / 'tiny-seed0' / 'log.txt'} says why: sparse-vlm eval" in capsys.readouterr().err


def test_no_row_begins_after_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where who waits for rows hears late of it."""
    commands = Commands(monkeypatch, fails="train")
    monkeypatch.setattr(comparison, "as_completed", lambda rows: wait(rows).done)
    invoke("--only", "pool", "--seed", "0", "--seed", "1", "--seed", "2", "--out", str(tmp_path), exit_code=3)
    assert commands.ran == ["train"]
