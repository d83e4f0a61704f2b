"""The model to export, a tower or a VLM, and the parts that it consists of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.export.formats import KINDS
from sparse_vlm.hub import store
from sparse_vlm.hub.host_format import is_llava, tower_config
from sparse_vlm.hub.store import Entry
from sparse_vlm.hub.zoo import card

TOWER_FORMAT = "sparse-vlm/tower/"


@dataclass(frozen=True)
class Part:
    """A model whose weights go into an export.

    Attributes:
        name: of the zoo, else the last component of its folder's path.
        entry: of the zoo; None for a folder.
        card: text of its card; None where a folder has none.
    """

    name: str
    entry: Entry | None
    card: str | None


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        given: the user's argument: a folder, or a name of the zoo.
        kind: a key of `KINDS`.
        parts: the model itself, then the parts that a VLM refers to.
        tower: name of its tower; its own where it is one.
    """

    given: str
    kind: str
    parts: tuple[Part, ...]
    tower: str

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.parts[0].name


def find(model: str) -> Source:
    """A tower or a VLM by its folder or its name in the zoo.

    Raises:
        UserError: no such model, or one of another kind.
    """
    if not Path(model).expanduser().is_dir():
        kind = store.entry(model).kind
        if kind not in KINDS:
            fitting = [entry.name for entry in store.entries().values() if entry.kind in KINDS]
            raise UserError(f"{model}: is {store.KINDS[kind]}; what can be exported is a tower or a VLM, as {' or '.join(fitting)}")
    folder = store.locate(model)
    described = _described(folder)
    config = described.get("config.json", {})
    kind = "vlm" if "vlm.json" in described or is_llava(config) else "tower"
    if kind == "tower" and tower_config(config) is None and not str(config.get("format", "")).startswith(TOWER_FORMAT):
        raise UserError(
            f"{model}: holds neither a tower nor a VLM of sparse-vlm; give a folder that bootstrap or train wrote, or a name of the zoo"
        )
    says = described.get("vlm.json", {})
    names = [store.locate_part(folder, says, part) for part in ("tower", "llm") if part in says]
    parts = (_part(model, folder), *(_part(name, Path(name)) for name in names))
    return Source(model, kind, parts, names[0] if names else model)


def _described(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in ("vlm.json", "config.json"):
        try:
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / name}: cannot be read ({error})") from None
        if not isinstance(found[name], dict):
            raise UserError(f"{folder / name}: holds no JSON object")
    return found


def _part(name: str, folder: Path) -> Part:
    known = store.entries()
    if not Path(name).expanduser().is_dir() and name in known:
        return Part(name, known[name], card(name))
    written = folder.expanduser() / "card.md"
    return Part(folder.expanduser().resolve().name, None, written.read_text(encoding="utf-8") if written.is_file() else None)
