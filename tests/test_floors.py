"""The packages of docs/architecture.md: each imports only from those above it in the table, wherever in a file the import stands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sparse_vlm": "sparse_vlm", "train": "sparse_vlm.train", "eval": "sparse_vlm.eval"}


def order() -> dict[str, int]:
    """Package to its row in the table of docs/architecture.md."""
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Packages")[2].partition("\n## ")[0]
    return {name: row for row, name in enumerate(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))}


def sources() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in inner if part != "__init__")]), path


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports of ours; `from sparse_vlm import store` counts as sparse_vlm.hub.store."""
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


def test_table_names_every_package_and_no_other():
    assert {name.split(".")[1] for name in MODULES if "." in name} == set(order())


@pytest.mark.parametrize("name", [name for name in MODULES if "." in name])
def test_imports_go_up_the_table(name):
    rows, own = order(), name.split(".")[1]
    for line, imported in imports(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        where = f"{MODULES[name].relative_to(ROOT)}:{line}"
        assert not imported.startswith("."), f"{where} imports relatively; write the whole name"
        part = imported.split(".")[1]
        if part != "__version__" and part != own:
            assert rows[part] < rows[own], f"{where} imports {imported}, which stands below {own}"
