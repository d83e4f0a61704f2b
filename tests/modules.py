"""Every module of the project, and what it imports of ours."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sparse_vlm": "sparse_vlm", "train": "sparse_vlm.train", "eval": "sparse_vlm.eval"}


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
