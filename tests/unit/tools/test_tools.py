"""The two campaigns of tools/: a handful of rounds and files each, and that both find what is planted."""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytest.importorskip("open_clip", reason="teachers of toy size are made with open_clip")


def run(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str | Path) -> int:
    """A program's exit code, without the seconds in which it imports everything first."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module(program)
    monkeypatch.setattr(module, "WARM", ())
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    return module.main()


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]) -> tuple[Any, Any]:
    """What a campaign finds in a format that is read so: verdicts, and faults by root."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import fuzz
    from formats import Format

    form = Format(lambda folder: (folder / "a.json").write_text('{"a": 1}') and None, ("a.json",), read)
    return fuzz.campaign(3, 0, [], tmp_path / "keep", tmp_path / "work", {"planted": form}, lambda line: None, limit_s=0.5)


def whole(folder: Path) -> bool:
    return (folder / "a.json").read_bytes() == b'{"a": 1}'


def test_reading_and_refusing_is_no_fault(tmp_path, monkeypatch):
    from sparse_vlm.errors import UserError

    def read(folder: Path) -> float:
        if not whole(folder):
            raise UserError(f"{folder / 'a.json'}: not what it was")
        return 1.0

    counts, faults = planted(tmp_path, monkeypatch, read)
    assert counts["planted"]["refused"] == 3 and not faults


def _user_error(message: str) -> None:
    from sparse_vlm.errors import UserError

    class Unruly(UserError):
        def __str__(self) -> str:
            return message

    raise Unruly(message)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an exception": (lambda folder: json.loads("{"), "JSONDecodeError"),
    "several lines": (lambda folder: _user_error("a.json: one\ntwo"), "a message of several lines"),
    "a control character": (lambda folder: _user_error("a.json: \x1b[2J"), r"control character '\x1b'"),
    "a control character that is printed": (lambda folder: print("a name \x1b[2J"), r"control character '\x1b'"),
    "no name": (lambda folder: _user_error("something is wrong"), "a message that names no file"),
    "a number": (lambda folder: float("nan"), "a number is not finite"),
    "a crash": (lambda folder: __import__("ctypes").string_at(0), "SIGSEGV"),
    "no end": (lambda folder: __import__("time").sleep(30), "not done"),
    "memory": (lambda folder: bytearray(8 << 30), "MemoryError"),
    "written outside": (lambda folder: (folder.parent.parent / "escaped").write_text(""), "outside: open"),
    "a program": (lambda folder: subprocess.run(["true"], check=True), "outside: subprocess.Popen"),
    "foreign code": (lambda folder: (folder / "CANARY").touch(), "foreign code was run"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(tmp_path, monkeypatch, kind):
    does, root = FAULTS[kind]
    counts, faults = planted(tmp_path, monkeypatch, lambda folder: None if whole(folder) else does(folder) and None)
    if kind == "a number":
        counts, faults = planted(tmp_path / "again", monkeypatch, lambda folder: 1.0 if whole(folder) else does(folder))
    assert counts["planted"]["FAULT"] == 3
    ((found, cases),) = faults.items()
    assert root in found and len(cases) == 3
    assert (tmp_path / ("again/keep" if kind == "a number" else "keep") / "planted-00000" / "example" / "a.json").exists()


def test_damage_is_the_same_for_the_same_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from mutate import mutate

    whole = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()
    made = [[mutate(whole, name, random.Random(seed)) for seed in range(200)] for name in ("a.json", "a.bin", "a.json")]
    assert made[0] == made[2]
    assert len({new for new, _ in made[0]}) > 60 and len({new for new, _ in made[1]}) > 100


def test_pictures_and_ratios_are_fuzzed(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "fuzz", "--files", 4, "--only", "jpeg", "--only", "ratios", "--work", tmp_path / "work") == 0
    assert "| all | 4 |" in capsys.readouterr().out


def test_a_killed_fetch_goes_on(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "kill_and_resume", "--rounds", 1, "--only", "zoo", "--out", tmp_path / "kills") == 0
    assert "| zoo | 1 |" in capsys.readouterr().out


def test_what_differs_is_named(tmp_path, monkeypatch):
    import torch
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from kill_and_resume import differences

    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([[0.0, value]])}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "training.json").write_text(json.dumps({"history": [{"loss": value, "train_runtime": value}]}))
    (tmp_path / "b" / "x.tmp").touch()
    assert differences(tmp_path / "a", tmp_path / "a") == []
    assert differences(tmp_path / "a", tmp_path / "b") == [
        "x.tmp: does not lie there after an undisturbed run",
        "model.safetensors: tensor w: first at [0, 1]: 1.0 and 2.0",
        "training.json: /history/0/loss: 1.0 and 2.0",
    ]
