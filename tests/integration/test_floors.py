"""The packages of docs/architecture.md: each imports only from those above it in the table, wherever in a file the import stands."""

from __future__ import annotations

import ast
import re

import pytest
from modules import MODULES, ROOT, imports


def order() -> dict[str, int]:
    """Package to its row in the table of docs/architecture.md."""
    table = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Packages")[2].partition("\n## ")[0]
    return {name: row for row, name in enumerate(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))}


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
