"""Read safetensors files strictly: damaged files, wrong shapes and values that are not finite are refused.

Notable: names and shapes are read from a file's header, so that they are compared with a model before memory of its size is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_vlm.errors import UserError, first_line
from sparse_vlm.utils.documents import LFS, NOT_FETCHED
from sparse_vlm.utils.files import atomic_path

LARGEST = 1e18  # absolute value of a weight; squares of larger ones overflow float32 in a norm
SUFFIXES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json", ".model"}  # files of models that git-lfs may hold


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file, from its header.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    refuse_lfs_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it cannot be read, or one of them is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_lfs_pointer(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    check_finite(str(path), tensors.items())
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: one, or the shards that its index names.

    Raises:
        UserError: the index is damaged or names a file outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("a shard is not a file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read ({first_line(error)})") from error
    return [folder / name for name in names]


def part_shapes(folder: Path, prefixes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of a part's tensors in a model's folder, without the prefix of their names.

    Args:
        prefixes: possible prefixes; the first that a tensor has is taken for all.
    """
    shapes = {name: shape for path in weight_files(folder) for name, shape in read_shapes(path).items()}
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in shapes)), "")
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def part_tensors(folder: Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of `part_shapes`; no others are read.

    Raises:
        UserError: a file cannot be read, or a tensor is not finite.
    """
    from safetensors import SafetensorError, safe_open

    names = part_shapes(folder, prefixes)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                stored = {prefix + name: name for prefix in prefixes for name in names}
                found = {stored[name]: file.get_tensor(name) for name in file.keys() if name in stored}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
            raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
        check_finite(str(path), found.items())
        tensors |= found
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write a safetensors file atomically; in their own dtypes unless one is given."""
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        tensors = {name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata={"format": "pt"})


def check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a file holds exactly the tensors of a model.

    Raises:
        UserError: names the first tensor that is missing, unexpected or of another shape.
    """
    for name in sorted(expected.keys() ^ found.keys()):
        raise UserError(f"{path}: tensor {name} is {'missing' if name in expected else 'not one of the model'}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{path}: tensor {name} is {found[name]}, the model needs {shape}")


def check_finite(where: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Check that all weights are finite; a model with others computes nonsense without an error.

    Raises:
        UserError: names the first tensor that holds a NaN, an infinity, or a value beyond `LARGEST`.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        # one pass over memory, without a copy
        values = tensor if tensor.element_size() > 1 else tensor.float()
        low, high = values.detach().aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UserError(
                f"{where}: tensor {name} holds numbers that are not finite (NaN or infinity); the file is damaged, fetch it again"
            )
        if max(-low.item(), high.item()) > LARGEST:
            raise UserError(f"{where}: tensor {name} holds numbers beyond {LARGEST:g}; the file is damaged, fetch it again")


def refuse_lfs_pointer(path: Path) -> None:
    """Check that a file is not a git-lfs pointer.

    Raises:
        UserError: it is.
    """
    if not path.is_file():  # opening it raises
        return
    try:
        with open(path, "rb") as file:
            begin = file.read(len(LFS))
    except OSError:
        return
    if begin == LFS:
        raise UserError(f"{path}: {NOT_FETCHED}")


def refuse_lfs_pointers(folder: Path) -> None:
    """Check every file of a model's folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES:
            refuse_lfs_pointer(path)
