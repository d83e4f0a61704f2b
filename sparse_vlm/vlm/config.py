"""The configuration in a VLM's folder, checked before any of its parts is loaded.

It is `vlm.json`. A LLaVA of transformers with our tower inside, and PEFT's adapters of one, are read as VLMs, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.hub.host_format import is_llava
from sparse_vlm.tower.config import read_config
from sparse_vlm.utils.files import write_text
from sparse_vlm.utils.schema import read_json
from sparse_vlm.vlm.projectors import MLP, PROJECTORS

FORMAT = "sparse-vlm/vlm/1"
MAX_NUMBER = 1 << 20
PEFT_CONFIG = "adapter_config.json"
# Options of a LLaVA's configuration that the tower and our projector need.
LLAVA_OPTIONS = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu"}
# What a folder holds of a part: nothing (it is loaded by its name), LoRA adapters, or all of its weights.
AS_NAMED, ADAPTERS, TUNED = HOLDS = ("as named", "adapters", "tuned")
VALUES = {"tower": HOLDS, "projector": ("new", "trained"), "llm": HOLDS}


@dataclass(frozen=True)
class VLMConfig:
    """The contents of `vlm.json`.

    Attributes:
        tower, llm: names or folders, as `hub.store.locate_part` finds them.
        projector: its shape: `tokens`, `tower_width`, `llm_width`, and `kind` unless it is LLaVA's MLP.
        num_tokens: tokens per image, if a number was chosen.
        holds: what the folder holds of each part; keys and values as in `VALUES`.
        new_projector: whether the projector is untrained.
        projector_folder: the folder that holds it, if it is not the VLM's own.
    """

    tower: str
    llm: str
    projector: dict[str, int | str]
    num_tokens: int | None
    holds: dict[str, str]
    new_projector: bool
    projector_folder: Path | None = None

    @property
    def projector_kind(self) -> str:
        """`mlp` or a key of `PROJECTORS`."""
        return str(self.projector.get("kind", MLP))

    def save(self, folder: Path) -> None:
        """Write `vlm.json`; parts that are folders are also named by their path relative to this one."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "tower": self.tower,
            "llm": self.llm,
            "projector": self.projector,
            "holds": self.holds,
        }
        paths = {name: store.relative_path_to(name, folder) for name in (document["tower"], document["llm"])}
        if paths := {name: path for name, path in paths.items() if path is not None}:
            document["ways"] = paths  # the key's name is part of the format
        if self.num_tokens is not None:
            document["num_tokens"] = self.num_tokens
        if self.new_projector:
            document["new_projector"] = True
        write_text(folder / "vlm.json", json.dumps(document, indent=1) + "\n")


def read(path_or_zoo_name: str | Path) -> tuple[Path, VLMConfig]:
    """A VLM's folder and its configuration.

    Raises:
        UserError: no such folder or name, or not a VLM.
    """
    folder = store.locate(path_or_zoo_name, kind="vlm")
    if not (folder / "vlm.json").exists():
        if (folder / "config.json").is_file():
            return folder, _of_llava(folder)
        if (folder / PEFT_CONFIG).is_file():
            return folder, _of_adapters(folder)
    try:
        document = json.loads((folder / "vlm.json").read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"vlm.json must be an object, not {type(document).__name__}")
        if document.get("format") != FORMAT:
            raise UserError(f"{path_or_zoo_name}: vlm.json has format {document.get('format')!r}, this version reads {FORMAT!r}")
        return folder, _checked(folder, document)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RecursionError) as error:
        reason = f"vlm.json lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path_or_zoo_name}: not a VLM folder ({reason})") from error


def _of_llava(folder: Path) -> VLMConfig:
    """The configuration of a LLaVA of transformers, whose folder is also its tower's and its LLM's."""
    again = f"{folder}: not a VLM folder"
    config = read_json(folder / "config.json", again)
    if not isinstance(config, dict) or not is_llava(config):
        raise UserError(f"{again}: it holds no vlm.json, and its config.json is not that of a LLaVA with a tower of sparse-vlm")
    for name, value in LLAVA_OPTIONS.items():
        if config.get(name, value) != value:
            raise UserError(f"{folder / 'config.json'}: {name} is {config[name]!r}; with this tower it must be {value!r}")
    tower = read_config(folder, str(folder))
    width = config.get("text_config", {}).get("hidden_size")
    projector = {"tokens": tower.visual_tokens, "tower_width": tower.width, "llm_width": width}
    return VLMConfig(str(folder), str(folder), projector, None, {"tower": AS_NAMED, "projector": "trained", "llm": AS_NAMED}, False)


def _of_adapters(folder: Path) -> VLMConfig:
    """The configuration of PEFT's adapters of a LLaVA."""
    name = read_json(folder / PEFT_CONFIG, f"{folder}: not a VLM folder").get("base_model_name_or_path")
    bases = [base for base in (Path(name), folder / name) if base.is_dir()] if isinstance(name, str) and name else []
    if not bases:
        raise UserError(
            f"{folder / PEFT_CONFIG}: its base_model_name_or_path, {name!r}, is not a folder; write that of the base model there"
        )
    config = _of_llava(bases[0])
    return replace(config, holds=config.holds | {"llm": ADAPTERS}, projector_folder=bases[0])


def parts_of(vlm: str | Path) -> tuple[str, str, int | None, str]:
    """Tower, LLM, chosen number of tokens (or None), and kind of projector of a VLM's folder.

    Raises:
        UserError: no such folder or name, or not a VLM.
    """
    _, config = read(vlm)
    return config.tower, config.llm, config.num_tokens, config.projector_kind


def _checked(folder: Path, document: dict[str, Any]) -> VLMConfig:
    for part in ("tower", "llm"):
        _check_text(part, document[part])
    for name, path in _mapping("ways", document.get("ways", {})).items():
        _check_text(f"ways of {name!r}", path)
    projector = _mapping("projector", document["projector"])
    for name in ("tokens", "tower_width", "llm_width"):
        _check_number(f"projector's {name}", projector[name])
    if (kind := projector.get("kind", MLP)) not in (MLP, *PROJECTORS):
        raise ValueError(f"projector's kind is {kind!r}; known are {', '.join((MLP, *PROJECTORS))}")
    if "num_tokens" in document:
        _check_number("num_tokens", document["num_tokens"])
    new_projector = document.get("new_projector", False)
    if not isinstance(new_projector, bool):
        raise ValueError(f"new_projector is {new_projector!r}, neither true nor false")
    holds = document.get("holds")
    if holds is None:  # written before the format had this key
        holds = {"tower": AS_NAMED, "projector": "new" if new_projector else "trained", "llm": _llm_of_files(folder)}
    for part, values in VALUES.items():
        if (value := _mapping("holds", holds)[part]) not in values:
            raise ValueError(f"holds of {part} is {value!r}; known are {', '.join(values)}")
    tower, llm = (store.locate_part(folder, document, part) for part in ("tower", "llm"))
    return VLMConfig(tower, llm, projector, document.get("num_tokens"), holds, new_projector)


def _llm_of_files(folder: Path) -> str:
    if (folder / "llm.safetensors").is_file():
        return TUNED
    return ADAPTERS if (folder / PEFT_CONFIG).is_file() else AS_NAMED


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r}, not an object")
    return value


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"{name} is {value!r}, not a name or a path")


def _check_number(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_NUMBER:
        raise ValueError(f"{name} is {value!r}, not a whole number from 1 to {MAX_NUMBER:,}")
