"""Weight inheritance: which of the teacher's tensors the student starts from, and how its new tensors are initialized.

Shape legend: d width, p patch size, G x G patch grid.
Every teacher tensor is inherited, or left out with a reason; every student tensor is inherited, or new. `plan` returns this mapping as
data, `inherit` carries it out, and the command line prints it.
Source: Bootstrapping SparseFormers (arXiv 2312.01987), section 3; the warm start is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_vlm.distill.recipes import Recipe
from sparse_vlm.errors import UserError
from sparse_vlm.teachers import Teacher, TeacherError
from sparse_vlm.tower import SparseFormer

BLOCK_TENSORS = tuple(
    f"{module}.{kind}" for module in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
)
Fate = Literal["tuned", "frozen", "left out", "new"]


@dataclass(frozen=True)
class TensorMapping:
    """A teacher tensor (`source`; empty for new tensors) and its student tensor (`target`; empty if left out)."""

    source: str
    target: str
    fate: Fate
    reason: str = ""


def plan(tower: SparseFormer, teacher: Teacher, recipe: Recipe) -> list[TensorMapping]:
    """The mapping, with every tensor of teacher and student.

    Raises:
        TeacherError: a tensor that is neither inherited nor known to be superfluous, or a recipe that does not fit the teacher.
    """
    spec, mapping = teacher.spec, recipe.mapping(teacher.spec)
    units = [index for index, layer in enumerate(tower.layers) if layer in tower.units()]
    if len(mapping) != len(units):
        raise TeacherError(f"teacher {spec.name}: the recipe maps {len(mapping)} units, and its student has {len(units)}")
    rows: list[TensorMapping] = []
    for layer, (block, tuned) in zip(units, mapping, strict=True):
        if block is None:
            continue
        fate: Fate = "tuned" if tuned else "frozen"
        rows += [TensorMapping(f"blocks.{block}.{name}", f"layers.{layer}.{name}", fate) for name in BLOCK_TENSORS]
    rows += [TensorMapping(f"norm.{kind}", f"norm.{kind}", "tuned") for kind in ("weight", "bias")]
    rows += [TensorMapping(name, f"proj.{name.removeprefix('head.')}", "tuned") for name in teacher.tensors if name.startswith("head.")]
    rows += [TensorMapping(name, name, "tuned") for name in teacher.tensors if name.startswith("pool.")]
    if tower.glance is not None:
        glance = tower.config.glance
        resized = "" if glance.patch_size == spec.patch_size else f"resized from {spec.patch_size} to {glance.patch_size} px"
        rows.append(TensorMapping("patch_embed.weight", "glance.patch_embed.weight", "tuned", resized))
        moved = "" if glance.grid == spec.grid else f"resized to {glance.grid} x {glance.grid}"
        rows.append(TensorMapping("pos_embed", "glance.pos_embed", "tuned", moved))
        if spec.has_cls:
            rows.append(TensorMapping("cls_token", "cls_embedding.weight", "tuned", "plus its position"))
        if glance.norm_pre:
            rows += [TensorMapping(f"norm_pre.{kind}", f"glance.norm_pre.{kind}", "tuned") for kind in ("weight", "bias")]
    reasons = {
        "patch_embed.weight": "the student samples its own feature map instead of patches",
        "pos_embed": "the student has RoIs instead of patch positions",
        "cls_token": "the student's CLS token enters later and is new",
        "norm_pre.weight": "normalizes patch tokens, which the student does not have",
        "norm_pre.bias": "normalizes patch tokens, which the student does not have",
    }
    taken = {row.source for row in rows}
    for name in teacher.tensors:
        if name in taken:
            continue
        if name.startswith("blocks."):
            reason = "block dropped by the recipe"
        elif name in reasons:
            reason = reasons[name]
        else:
            raise TeacherError(f"teacher tensor {name} is neither inherited nor known to be superfluous")
        rows.append(TensorMapping(name, "", "left out", reason))
    missing = taken - set(teacher.tensors)
    if missing:
        raise TeacherError(f"teacher {spec.name} has no tensor {', '.join(sorted(missing))}")
    filled = {row.target for row in rows if row.target}
    if strange := sorted(filled - set(tower.state_dict())):
        raise TeacherError(f"teacher {spec.name}: the recipe's student has no {strange[0]}; the recipe does not fit this teacher's head")
    rows += [TensorMapping("", name, "new", _init_note(name, teacher)) for name in tower.state_dict() if name not in filled]
    rows = [replace(row, reason="; ".join(filter(None, (teacher.inventory.notes.get(row.source), row.reason)))) for row in rows]
    return rows + [TensorMapping(source, "", "left out", reason) for source, reason in teacher.inventory.left_out.items()]


def summarize(mapping: Sequence[TensorMapping]) -> list[tuple[str, str, str, str]]:
    """Rows of a table of the mapping: teacher tensor, student tensor, fate, reason; tensors of the same fate in all blocks share a row."""
    counts = Counter((_pattern(row.source), _pattern(row.target), row.fate, row.reason) for row in mapping)
    rows = []
    for (source, target, fate, reason), count in counts.items():
        many = f" ({count} tensors)" if count > 1 else ""
        rows.append(((source or "-") + (many if source else ""), (target or "-") + ("" if source else many), fate, reason))
    return rows


def _pattern(name: str) -> str:
    """The name of a block, for the names of its tensors."""
    parts = name.split(".")
    return ".".join([*parts[:2], "*"]) if parts[0] in ("blocks", "layers") else name


def _init_note(name: str, teacher: Teacher) -> str:
    """A note on the initialization of a new tensor; usually empty."""
    return (
        "the teacher has no projection: initialized as the identity"
        if name == "proj.weight" and "head.weight" not in teacher.tensors
        else ""
    )


@torch.no_grad()
def inherit(tower: SparseFormer, teacher: Teacher, recipe: Recipe) -> list[TensorMapping]:
    """Copy the inherited tensors to a new student, initialize its new ones for a warm start, and freeze what the recipe freezes.

    Returns:
        The mapping.
    """
    rows = plan(tower, teacher, recipe)
    targets = dict(tower.named_parameters())
    for row in rows:
        if not row.target or not row.source:
            continue
        value = teacher.tensors[row.source].float()
        target = targets[row.target]
        if row.target == "cls_embedding.weight":
            value = (value + teacher.tensors["pos_embed"][0].float()).view(1, -1)
        elif row.target == "glance.pos_embed":
            value = resize_positions(value[int(teacher.spec.has_cls) :], tower.config.glance.grid)
        elif row.target == "glance.patch_embed.weight":
            value = resize_patch_embedding(value, tower.config.glance.patch_size)
        if value.shape != target.shape:
            raise TeacherError(f"teacher tensor {row.source} {tuple(value.shape)} does not fit {row.target} {tuple(target.shape)}")
        target.copy_(value)
        target.requires_grad_(row.fate != "frozen")
    if "head.weight" not in teacher.tensors:
        torch.nn.init.eye_(tower.proj.weight)
    if tower.glance is not None:
        _zero_init_sampling(tower)
    return rows


@torch.no_grad()
def load_init(tower: SparseFormer, rows: list[TensorMapping], other: SparseFormer, name: str) -> list[TensorMapping]:
    """Copy the weights of another tower to a student after `inherit`; tensors that the other lacks stay as they are.

    Args:
        rows: the mapping of `inherit`.
        other: its tensors must all exist in the student.
        name: of the other tower, for the mapping and messages.

    Returns:
        The new mapping.

    Raises:
        UserError: a tensor of the other tower does not exist in the student, or has another shape.
    """
    own, state = tower.state_dict(), other.state_dict()
    for tensor, value in state.items():
        if tensor not in own:
            raise UserError(
                f"--init {name}: its tensor {tensor} does not exist in this recipe's student; take the recipe that it was made with"
            )
        if own[tensor].shape != value.shape:
            shapes = f"{tuple(value.shape)}, and the student's {tuple(own[tensor].shape)}"
            raise UserError(f"--init {name}: its tensor {tensor} is {shapes}; take the recipe and numbers that it was made with")
        own[tensor].copy_(value)
    trained = {target for target, parameter in tower.named_parameters() if parameter.requires_grad}
    copied = [TensorMapping(tensor, tensor, "tuned" if tensor in trained else "frozen", f"from {name}") for tensor in state]
    return copied + [row for row in rows if row.fate == "new" and row.target not in state]


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Resize position embeddings of a square grid (G * G, d) to another grid, bicubic with antialiasing."""
    side = math.isqrt(positions.shape[0])
    if side == grid:
        return positions
    as_map = positions.T.reshape(1, -1, side, side)
    return F.interpolate(as_map, size=(grid, grid), mode="bicubic", antialias=True).flatten(2)[0].T


def resize_patch_embedding(weight: Tensor, patch_size: int) -> Tensor:
    """Resize a patch embedding (d, 3, p, p), so that it embeds a patch as the old one embeds the patch scaled to its size.

    Scaling is linear, x -> A x A^T, so the new kernel is A^T W A (compare FlexiViT, arXiv 2212.08013, section 3.4).
    """
    old = weight.shape[-1]
    if old == patch_size:
        return weight
    basis = torch.eye(patch_size).view(patch_size, 1, patch_size, 1).repeat(1, 1, 1, patch_size)
    scale = F.interpolate(basis, size=(old, patch_size), mode="bicubic", antialias=True)[:, 0, :, 0].T  # (old, new)
    return scale.T @ weight @ scale


def _zero_init_sampling(tower: SparseFormer) -> None:
    """Sampling adds nothing at first: its output projection is zero, and its mixing is the identity over channels and points."""
    for unit in tower.units():
        if "SAMPLING_M" not in unit.ops:
            continue
        mixing = unit.adaptive_mixing
        generator = mixing.parameter_generator[-1]
        generator.weight.mul_(0.1)
        identity = [torch.eye(mixing.channels).flatten(), torch.eye(mixing.out_points, mixing.in_points).flatten()]
        generator.bias.copy_(torch.cat(identity))
        mixing.out_proj.weight.zero_()
        mixing.out_proj.bias.zero_()
