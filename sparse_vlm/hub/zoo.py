"""The model zoo: what it holds, and how a maintainer puts a model into it.

`sparse-vlm zoo list|show|pull` is for everyone; publishing is for maintainers, from a checkout:

    python -m sparse_vlm.zoo add tiny build/tiny --kind tower --license Apache-2.0 --summary "..." --card build/card.md

copies the folder's files to model_zoo/NAME/, writes their sizes and sha256 into the index, and refuses what the zoo cannot hold.
`python -m sparse_vlm.zoo check` says what is wrong with the zoo as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError, about
from sparse_vlm.hub import store
from sparse_vlm.hub.store import Entry, FileSpec
from sparse_vlm.utils.files import sweep, temporary_prefix, write_text

MAX_FILE_BYTES = 60_000_000
MAX_ZOO_BYTES = 170_000_000
WEIGHT_SUFFIXES = (".safetensors",)
OTHER_SUFFIXES = (".json", ".txt", ".md")
TRAINED_KINDS = ("tower", "teacher", "text", "vlm")
# Required sections of a card: of models trained here (True) and of others' models that are only referred to.
CARD_SECTIONS = {
    True: ("Data", "Recipe", "Command", "Results", "Licence", "Provenance"),
    False: ("Licence", "Provenance"),
}


def describe(model: Entry) -> dict[str, Any]:
    """An entry as plain data, with its folder (None before it is downloaded)."""
    folder = store.find_local(model)
    return {
        "name": model.name,
        "kind": model.kind,
        "summary": model.summary,
        "license": model.license,
        "bytes": model.size,
        "folder": None if folder is None else str(folder),
        "needs": list(model.needs),
        "sources": [dict(source) for source in model.sources],
        "files": {name: {"size": spec.size, "sha256": spec.sha256} for name, spec in model.files.items()},
    }


# File of each part in a VLM's folder, by how the part is held.
HELD_IN = {
    "tower": {"tuned": "tower.safetensors", "adapters": "tower_adapter/adapter_model.safetensors"},
    "projector": {"trained": "projector.safetensors", "new": "projector.safetensors"},
    "llm": {"tuned": "llm.safetensors", "adapters": "adapter_model.safetensors"},
}


def describe_folder(folder: Path) -> dict[str, Any]:
    """The parts of a VLM's folder, without loading them: `how` each is held, the `name` it was loaded by, and `file`, `tensors` and
    `parameters` of what is in the folder.

    Raises:
        UserError: not a VLM's folder, or a file that cannot be read.
    """
    try:
        described = json.loads((folder / "vlm.json").read_text(encoding="utf-8"))
        held = described.get("holds") or _held_by_files(folder)
        parts: dict[str, Any] = {}
        for part, files in HELD_IN.items():
            parts[part] = {"how": held[part], "name": described[part] if part != "projector" else None}
            if file := files.get(held[part]):
                sizes = _sizes(folder / file)
                parts[part] |= {"file": file, "tensors": len(sizes), "parameters": sum(sizes)}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: not a VLM folder, or a damaged one ({error})") from error
    return parts


def _held_by_files(folder: Path) -> dict[str, str]:
    """How each part is held, for folders without `holds`."""
    return {part: next((how for how, file in files.items() if (folder / file).is_file()), "as named") for part, files in HELD_IN.items()}


def _sizes(path: Path) -> list[int]:
    """Number of values of each tensor in a safetensors file, from its header."""
    with open(path, "rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"]


def card(name: str) -> str:
    """The text of a model's card.

    Raises:
        UserError: no such model.
    """
    path = store.zoo_folder() / store.entry(name).name / "card.md"
    with about(path, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")


def pull(name: str) -> dict[str, Path]:
    """Download and verify a model and those it depends on.

    Returns:
        Folder by name, the model itself first.

    Raises:
        UserError: no such model, or a model that no source could deliver.
    """
    folders = {name: store.locate(store.entry(name).name)}
    for needed in store.entry(name).needs:
        folders.update({key: value for key, value in pull(needed).items() if key not in folders})
    return folders


def check() -> list[str]:
    """Problems of the zoo on disk, one line each; empty if there are none."""
    root = store.zoo_folder()
    models = store.entries()
    found = []
    for model in models.values():
        folder = root / model.name
        found += [f"{model.name}: needs {needed}, which the zoo does not have" for needed in model.needs if needed not in models]
        found += [f"{model.name}: kind {model.kind!r} is none of {', '.join(store.KINDS)}"] * (model.kind not in store.KINDS)
        found += [f"{model.name}: source {source!r} is of no known type" for source in model.sources if source["type"] not in store.SOURCES]
        if not model.sources:
            found += [f"{model.name}: {what}" for what in store.problems(folder, model.files)]
            found += [f"{model.name}: {what}" for what in _unwelcome(model.files)]
            strangers = {path.name for path in folder.glob("*")} - {*model.files, "card.md"}
            found += [f"{model.name}: {stranger} is not in the index" for stranger in sorted(strangers)]
        found += [f"{model.name}: {what}" for what in _card_problems(folder / "card.md", model.kind)]
    found += [f"{path.name}: a folder without an entry" for path in root.iterdir() if path.is_dir() and path.name not in models]
    total = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    if total > MAX_ZOO_BYTES:
        found.append(f"the zoo is {total / 1e6:.0f} MB; it may have {MAX_ZOO_BYTES / 1e6:.0f} MB")
    return found


def _unwelcome(files: dict[str, FileSpec]) -> list[str]:
    found = []
    for name, spec in files.items():
        if Path(name).suffix not in WEIGHT_SUFFIXES + OTHER_SUFFIXES:
            found.append(f"{name} is neither safetensors nor text")
        if spec.size > MAX_FILE_BYTES:
            found.append(f"{name} is {spec.size / 1e6:.0f} MB; a file may have {MAX_FILE_BYTES / 1e6:.0f} MB")
    return found


def _card_problems(path: Path, kind: str) -> list[str]:
    if not path.is_file():
        return ["it has no card.md"]
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for section in CARD_SECTIONS[kind in TRAINED_KINDS]:
        if f"## {section}" not in lines:
            found.append(f"its card has no section '## {section}'")
            continue
        body = lines[lines.index(f"## {section}") + 1 :]
        end = next((i for i, line in enumerate(body) if line.startswith("## ")), len(body))
        if not any(line.strip() for line in body[:end]):
            found.append(f"its card says nothing under '## {section}'")
    return found


def add(name: str, folder: Path, *, kind: str, license: str, summary: str, card: Path | None = None, needs: Sequence[str] = ()) -> Entry:
    """Add or update a model in the zoo of this checkout (for maintainers).

    Args:
        folder: as `from_pretrained` loads it; safetensors, json and txt files are copied, subfolders are not.
        card: the model's card; by default the one in model_zoo/NAME/.
        needs: zoo names of the models that it depends on.

    Raises:
        UserError: a kind, file, card or size that the zoo does not accept; the zoo is left unchanged.
    """
    root = store.zoo_folder()
    target = root / name
    if kind not in TRAINED_KINDS:
        raise UserError(f"{name}: kind {kind!r} cannot be added; it must be one of {', '.join(TRAINED_KINDS)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    models = store.entries()
    if absent := [needed for needed in needs if needed not in models]:
        raise UserError(f"{name}: needs {absent[0]}, which the zoo does not have; add that first")
    card = card or target / "card.md"
    sources = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (*WEIGHT_SUFFIXES, ".json", ".txt"))
    files = {path.name: FileSpec(path.stat().st_size, store.sha256(path)) for path in sources}
    wrong = _unwelcome(files) + _card_problems(card, kind)
    if (folder / HELD_IN["tower"]["adapters"]).exists():
        wrong.append(f"{folder} holds adapters of its tower in a folder of their own, and the zoo takes files alone")
    if not any(Path(file).suffix in WEIGHT_SUFFIXES for file in files):
        wrong.append(f"{folder} holds no safetensors")
    others = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and target not in path.parents)
    if others + sum(spec.size for spec in files.values()) > MAX_ZOO_BYTES:
        wrong.append(f"with it the zoo would be above {MAX_ZOO_BYTES / 1e6:.0f} MB")
    if wrong:
        raise UserError(f"{name}: " + "; ".join(wrong))

    model = Entry(name, kind, summary, license, files, sources=(), needs=tuple(needs))
    sweep(root)
    with tempfile.TemporaryDirectory(dir=root, prefix=temporary_prefix(name)) as aside:
        staging = Path(aside) / "files"
        staging.mkdir()
        for path in sources:
            shutil.copyfile(path, staging / path.name)
        shutil.copyfile(card, staging / "card.md")
        if target.exists():
            os.replace(target, Path(aside) / "old")
        os.replace(staging, target)
    _write_index({**models, name: model})
    return model


def _write_index(models: dict[str, Entry]) -> None:
    path = store.zoo_folder() / "index.json"
    index = {
        "format": store.INDEX_FORMAT,
        "models": {
            model.name: {
                "kind": model.kind,
                "summary": model.summary,
                "license": model.license,
                "files": {name: {"size": spec.size, "sha256": spec.sha256} for name, spec in model.files.items()},
                "sources": [dict(source) for source in model.sources],
                "needs": list(model.needs),
            }
            # models trained here first
            for model in sorted(models.values(), key=lambda model: model.kind not in TRAINED_KINDS)
        },
    }
    write_text(path, json.dumps(index, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sparse_vlm.zoo", description="Maintain the zoo of this checkout.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    adding = verbs.add_parser("add", help="add or refresh a model")
    adding.add_argument("name")
    adding.add_argument("folder", type=Path)
    adding.add_argument("--kind", required=True, choices=TRAINED_KINDS)
    adding.add_argument("--license", required=True, help="SPDX identifier, or a few words")
    adding.add_argument("--summary", required=True, help="one line")
    adding.add_argument("--card", type=Path, help="default: the card already in model_zoo/NAME/")
    adding.add_argument("--needs", nargs="*", default=[], help="names of other models of the zoo")
    verbs.add_parser("check", help="say what is wrong with the zoo")
    given = vars(parser.parse_args())
    if given.pop("verb") == "check":
        found = check()
        print("\n".join(found) or "the zoo is in order")
        return 1 if found else 0
    try:
        model = add(**given)
    except UserError as error:
        print(f"sparse-vlm: {error}", file=sys.stderr)
        return 2
    print(f"{model.name}: {len(model.files)} files, {model.size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
