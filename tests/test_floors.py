"""The floors of docs/design.md: a module imports from its own floor or a lower one, wherever in the file the import stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sparse_vlm": "sparse_vlm", "train": "sparse_vlm.train", "eval": "sparse_vlm.eval"}
# (importer, imported) and why it may look upward.
UPWARD = {
    ("vlm", "hosts"): "registers the tower with transformers' Auto classes when a VLM is made",
    ("tower", "hosts"): "`for_open_clip` wraps the tower when it is called; the wrapper needs torch alone",
}


def floors() -> dict[str, int]:
    """Module to floor, as the table of docs/design.md says."""
    table = re.findall(r"^\| (\d) \| ([^|]+) \|", (ROOT / "docs" / "design.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {module: int(floor) for floor, modules in table for module in re.findall(r"`(\w+)`", modules)}


def sources() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in inner if part != "__init__")]), path


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports of ours; `from sparse_vlm import store` counts as sparse_vlm.store."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = ["." * node.level + module] if module != "sparse_vlm" else [f"sparse_vlm.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(("sparse_vlm.", ".")):
                yield node.lineno, name


MODULES = dict(sources())


def test_table_names_every_module_and_no_other():
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(floors())


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_imports_go_down(name):
    known, own = floors(), name.split(".")[1]
    for line, imported in imports(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        where = f"{MODULES[name].relative_to(ROOT)}:{line}"
        assert not imported.startswith("."), f"{where} imports relatively; write the whole name"
        part = imported.split(".")[1]
        if part == "__version__" or (own, part) in UPWARD:
            continue
        assert known[part] <= known[own], f"{where} imports {imported} of floor {known[part]} from floor {known[own]}"


def test_every_exception_is_in_use():
    used = {
        (name.split(".")[1], imported.split(".")[1])
        for name, path in MODULES.items()
        if "." in name
        for _, imported in imports(ast.parse(path.read_text()))
    }
    assert set(UPWARD) <= used
