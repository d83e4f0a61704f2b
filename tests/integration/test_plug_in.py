"""docs/plug-in.md: what it shows is run, and says what is printed there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sparse_vlm.hub import store

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "plug-in.md"
# Section and what it takes beside the package that it is named after.
SECTIONS = {"open_clip": ROOT / "build" / "teacher" / "open_clip_config.json", "timm": None}


@pytest.mark.parametrize("section", SECTIONS)
def test_ten_lines_print_what_the_page_says(section, monkeypatch):
    needs = SECTIONS[section]
    if importlib.util.find_spec(section) is None:
        pytest.skip(f"{section} is not installed")
    if needs is not None and not needs.is_file():
        pytest.skip(f"{needs.relative_to(ROOT)} is not there; README says how it is assembled")
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    check(section, *re.search(r"```python\n(.*?)```\n```\n(.*?)```", body, re.DOTALL).groups(), monkeypatch)


def test_the_tower_in_transformers_prints_what_the_page_says(tmp_path, monkeypatch):
    from sparse_vlm.export.run import export

    export("tiny", "transformers", tmp_path / "hf", images=[ROOT / "examples" / "coffee.jpg"])
    code, said = re.search(r"```python\n(.*?)```\n```\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL).groups()
    assert code.count('"build/tiny-hf"') == 3
    check("transformers", code.replace("build/tiny-hf", str(tmp_path / "hf")), said, monkeypatch)


def test_the_vlm_in_transformers_answers_as_the_page_says(tmp_path, monkeypatch):
    """By pipeline and by hand, with the weights that `make chat` fetches."""
    from sparse_vlm.export.run import export

    if store.find_local(store.entry("smollm2-135m-instruct")) is None:
        pytest.skip("the language model has not been fetched; `make chat` does")
    export("tiny-chat", "transformers", tmp_path / "hf", images=[ROOT / "examples" / "chelsea.jpg"])
    body = PAGE.read_text(encoding="utf-8").partition("\n## TRL\n")[0]
    blocks = re.findall(r"```python\n([^`]*\"build/tiny-chat-hf\"[^`]*)```\n```\n(.*?)```", body, re.DOTALL)
    assert len(blocks) == 2
    for code, said in blocks:
        check("transformers", code.replace("build/tiny-chat-hf", str(tmp_path / "hf")), said, monkeypatch)


def test_trl_masks_what_the_page_says(tmp_path):
    from sparse_vlm.export.run import export

    pytest.importorskip("trl")
    if store.find_local(store.entry("smollm2-135m-instruct")) is None:
        pytest.skip("the language model has not been fetched; `make chat` does")
    export("tiny-chat", "transformers", tmp_path / "hf", images=[ROOT / "examples" / "chelsea.jpg"])
    body = PAGE.read_text(encoding="utf-8").partition("\n## TRL\n")[2]
    code, said = re.search(r"```python\n(.*?)```\n```\n(.*?)```", body, re.DOTALL).groups()
    assert sum(bool(line) for line in code.splitlines()) <= 13
    code = code.replace("build/tiny-chat-hf", str(tmp_path / "hf")).replace("build/trl", str(tmp_path / "trl"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)  # datasets pickles globals
    assert done.stdout.splitlines()[-1] == said.strip()


def check(section: str, code: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(bool(line) for line in code.splitlines()) <= 10
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, f"{PAGE.name}, {section}", "exec"), {})
    assert rounded(printed.getvalue()) == rounded(said)


def rounded(text: str) -> list[str]:
    """Words, with numbers as they are whatever the machine's rounding."""
    return [f"{float(word):.2f}" for word in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", text)] + re.findall(r"[a-z]{2,}", text)
