"""`vlm.json`: what a VLM's folder says of its parts. Read here alone, and checked before any part is looked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.vlm.projectors import MLP, PROJECTORS

FORMAT = "sparse-vlm/vlm/1"
MOST = 1 << 20  # of any number that it holds
HELD = ("as named", "adapters", "tuned")
FATES = {"tower": HELD, "projector": ("new", "trained"), "llm": HELD}


@dataclass(frozen=True)
class Described:
    """What `vlm.json` says.

    Attributes:
        tower, llm: names or folders, as `hub.store.locate_part` finds them.
        shape: of the projector: `tokens`, `tower_width`, `llm_width`, and `kind` where it is not LLaVA's.
        num_tokens: tokens an image, where their number was chosen.
        holds: what the folder holds of each part, by keys and values of `FATES`.
        new_projector: whether its projector has learnt nothing yet.
    """

    tower: str
    llm: str
    shape: dict[str, int | str]
    num_tokens: int | None
    holds: dict[str, str]
    new_projector: bool

    @property
    def kind(self) -> str:
        """Of the projector."""
        return str(self.shape.get("kind", MLP))


def read(path_or_zoo_name: str | Path) -> tuple[Path, Described]:
    """A VLM's folder and what it says.

    Raises:
        UserError: no such folder or name, or not a VLM.
    """
    folder = store.locate(path_or_zoo_name, kind="vlm")
    try:
        said = json.loads((folder / "vlm.json").read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"vlm.json is no object but a {type(said).__name__}")
        if said.get("format") != FORMAT:
            raise UserError(f"{path_or_zoo_name}: vlm.json has format {said.get('format')!r}, this version reads {FORMAT!r}")
        return folder, _checked(folder, said)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RecursionError) as error:
        why = f"vlm.json lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path_or_zoo_name}: not a VLM folder ({why})") from error


def _checked(folder: Path, said: dict[str, Any]) -> Described:
    for part in ("tower", "llm"):
        _text(part, said[part])
    ways = said.get("ways", {})
    for name, way in _mapping("ways", ways).items():
        _text(f"ways of {name!r}", way)
    shape = _mapping("projector", said["projector"])
    for name in ("tokens", "tower_width", "llm_width"):
        _number(f"projector's {name}", shape[name])
    if (kind := shape.get("kind", MLP)) not in (MLP, *PROJECTORS):
        raise ValueError(f"projector's kind is {kind!r}; known are {', '.join((MLP, *PROJECTORS))}")
    if "num_tokens" in said:
        _number("num_tokens", said["num_tokens"])
    blank = said.get("new_projector", False)
    if not isinstance(blank, bool):
        raise ValueError(f"new_projector is {blank!r}, neither true nor false")
    holds = said.get("holds")
    if holds is None:  # a folder of the format's early days
        holds = {"tower": "as named", "projector": "new" if blank else "trained", "llm": _llm_of_files(folder)}
    for part, fates in FATES.items():
        if (fate := _mapping("holds", holds)[part]) not in fates:
            raise ValueError(f"holds of {part} is {fate!r}; known are {', '.join(fates)}")
    tower, llm = (store.locate_part(folder, said, part) for part in ("tower", "llm"))
    return Described(tower, llm, shape, said.get("num_tokens"), holds, blank)


def _llm_of_files(folder: Path) -> str:
    if (folder / "llm.safetensors").is_file():
        return "tuned"
    return "adapters" if (folder / "adapter_config.json").is_file() else "as named"


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, no object")
    return value


def _text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{name} is {value!r}, no name and no path")


def _number(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"{name} is {value!r}, no whole number from 1 to {MOST:,}")
