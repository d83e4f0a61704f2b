"""Files of tensors: read strictly, and refused where they hold what no model can compute with.

Notable: what a file holds is in its header, so that a model can be compared with it before anything of the model's size is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparse_vlm.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/"
LARGEST = 1e18  # of a weight: squares of larger ones, as a norm sums them, leave float32
SUFFIXES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json", ".model"}  # of what git-lfs keeps, and models are made of


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, from its header.

    Raises:
        UserError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it cannot be read, or one of them is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pointer(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise UserError(f"{path}: cannot be read ({_first_line(error)})") from error
    check_finite(str(path), tensors.items())
    return tensors


def check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Make sure that a file holds exactly a model's tensors.

    Raises:
        UserError: naming the first that is missing, not one of the model, or of another shape.
    """
    for name in sorted(expected.keys() ^ found.keys()):
        raise UserError(f"{path}: tensor {name} is {'missing' if name in expected else 'not one of the model'}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{path}: tensor {name} is {found[name]}, the model needs {shape}")


def check_finite(where: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Make sure that weights are numbers to compute with: with one that is not, a model says anything, and says it without an error.

    Raises:
        UserError: naming the first tensor that holds a NaN, an infinity, or a number beyond `LARGEST`.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
            continue
        # one pass over memory, and nothing of its size beside it
        values = tensor if tensor.element_size() > 1 else tensor.float()
        low, high = values.detach().aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise UserError(
                f"{where}: tensor {name} holds numbers that are not finite (NaN or infinity); the file is damaged, fetch it again"
            )
        if max(-low.item(), high.item()) > LARGEST:
            raise UserError(f"{where}: tensor {name} holds numbers beyond {LARGEST:g}; the file is damaged, fetch it again")


def refuse_pointer(path: Path) -> None:
    """Make sure that a file is what its name says.

    Raises:
        UserError: it is what git leaves in its place where git-lfs did not fetch it.
    """
    if not path.is_file():  # what else it may be, whoever opens it says
        return
    try:
        with open(path, "rb") as file:
            begin = file.read(len(POINTER))
    except OSError:
        return
    if begin == POINTER:
        raise UserError(f"{path}: is a git-lfs pointer, its content was not fetched; run `git lfs pull` in its folder")


def refuse_pointers(folder: Path) -> None:
    """The same for every file of a model's folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES:
            refuse_pointer(path)


def _first_line(error: BaseException) -> str:
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
