"""README and guides: every command and every piece of Python is run, or its block begins with what it needs that a test has not.

A block of `sh` or `python` is marked by its first line, `# needs: network, GPU, ...`. Options of marked commands must exist all the same.
Blocks of plug-in.md and export.md that are Python have tests of their own (test_plug_in.py, test_export.py, test_llava.py).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from sparse_vlm.cli import app
from sparse_vlm.hub import store

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_TESTS = {"plug-in.md", "export.md"}
NEEDS = {
    "GPU", "several GPUs", "network", "data", "teacher", "minutes", "a quiet machine", "a running server", "LLaVA", "lmms-eval",
}  # fmt: skip
COMMAND = re.compile(r"^(?:\$ |    )(?:sparse-vlm|python|torchrun|make|pip|lmms-eval|hf) ", re.MULTILINE)


def blocks(language: str) -> list[tuple[Path, str, list[str]]]:
    """(page, code, what it needs) of every fenced block."""
    found = []
    for page in PAGES:
        for code in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            first = re.match(r"# needs: (.+)\n", code)
            found.append((page, code, first[1].split(", ") if first else []))
    return found


def named(block: tuple[Path, str, list[str]]) -> str:
    return f"{block[0].stem}: {block[1].splitlines()[bool(block[2])][:60]}"


SHELL, PYTHON = blocks("sh"), blocks("python")


def test_what_blocks_need_is_one_of_few_things() -> None:
    assert {need for _, _, needs in SHELL + PYTHON for need in needs} <= NEEDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_stand_in_blocks_that_are_tested(page: Path) -> None:
    text = re.sub(r"^```(?:sh|python)\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert not COMMAND.findall(text)


@pytest.mark.parametrize("block", SHELL, ids=named)
def test_options_exist(block: tuple[Path, str, list[str]]) -> None:
    cli = typer.main.get_command(app)
    context = typer.Context(cli)
    for line in block[1].replace("\\\n", " ").splitlines():
        if command := re.search(r"(?:^|[ |])sparse-vlm (\w+)(.*)", line):
            known = cli.resolve_command(context, [command[1]])[1]
            options = {name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
        elif command := re.search(r"python (tools/\w+\.py)(.*)", line):
            source = (ROOT / command[1]).read_text(encoding="utf-8")
            options = {f"--{name.replace('_', '-')}" for name in re.findall(r"(\w+): ", source)} | set(
                re.findall(r"\"(--[\w-]+)\"", source)
            )
        else:
            continue
        arguments = shlex.split(command[2], comments=True)
        assert {word for word in arguments if word.startswith("--")} <= options, line


@pytest.mark.parametrize("block", [block for block in SHELL if not block[2]], ids=named)
def test_commands_run(block: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    code = block[1]
    if ("tiny-chat" in code or " chat " in code) and store.find_local(store.entry("smollm2-135m-instruct")) is None:
        pytest.skip("the language model has not been fetched; `make chat` does")
    for folder in ("examples", "tools", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "MPLBACKEND": "Agg"},
        input="",
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", [block for block in PYTHON if not block[2] and block[0].name not in OWN_TESTS], ids=named)
def test_python_runs(block: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with torch.no_grad():
        exec(compile(block[1], block[0].name, "exec"), {})
