"""What a teacher is, whichever library it comes from.

Shape legend: B batch, G x G patch grid, d width, E embedding, L blocks.
A `Teacher` shows every source library's ViT in one form: its tensors under timm's names (`norm1`, `attn.qkv`, `attn.proj`, `norm2`,
`mlp.fc1`, `mlp.fc2`) and its outputs as (embedding, patch tokens after the final norm). It stays frozen and in eval mode.

Notable: what a SparseFormer has no module for, but another of its tensors can carry exactly, is folded into that one when the teacher is
read: LayerScale into the linear layer before it, a patch embedding's bias into the positions. `Inventory` makes sure that no tensor of
the source is forgotten on the way.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.images.preprocess import Triple
from sparse_vlm.tower.config import Activation
from sparse_vlm.utils.schema import SIZE, check

KINDS = ("weight", "bias")


class TeacherError(UserError):
    """A teacher that cannot be loaded or inherited from; the message says why and what would work."""


class TeacherOutput(NamedTuple):
    """What a teacher says of an image."""

    embeds: Tensor  # (B, E), not normalised
    patches: Tensor  # (B, G * G, d), after the final norm


@dataclass(frozen=True)
class TeacherSpec:
    """What a student must know of its teacher.

    Attributes:
        head: what the embedding is read from: the CLS token, or all tokens through attention (`map`, SigLIP's).
        norm_pre: whether tokens are normalised before the first block.
        head_bias: whether the head's linear layer has a bias.
        licence: of the weights, as their source states it; empty where it does not.
    """

    name: str
    width: int
    num_blocks: int
    num_heads: int
    embed_dim: int
    patch_size: int
    image_size: int
    image_mean: Triple
    image_std: Triple
    activation: Activation
    ln_eps: float
    head: Literal["cls", "map"] = "cls"
    norm_pre: bool = False
    head_bias: bool = False
    licence: str = ""

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token stands before the patches."""
        return self.head == "cls"


class Inventory:
    """A source model's tensors, taken one by one under our names.

    Attributes:
        tensors: what a student can inherit, by our names.
        notes: by our names, how a tensor was made where it is not one of the source's as it is.
        sources: by our names, the source's names that went into it.
        left_out: the source's names of what has no place in any student, each with a reason.
    """

    def __init__(self, name: str, state: Mapping[str, Tensor]) -> None:
        self.name = name
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, str] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.left_out: dict[str, str] = {}
        self._state = dict(state)
        self._taken: set[str] = set()

    def __contains__(self, source: str) -> bool:
        return source in self._state

    def get(self, source: str) -> Tensor:
        """One of the source's tensors, which counts as taken only where it is given to `put`."""
        if source not in self._state:
            raise TeacherError(f"teacher {self.name}: there is no tensor {source}")
        return self._state[source]

    def put(self, target: str, *sources: str, how: Callable[..., Tensor] | None = None, note: str = "") -> None:
        """Name one of the source's tensors as ours, or make ours out of several.

        Args:
            how: given the source's tensors, returns ours; unless given, one stays as it is and several are joined by rows.
            note: how it was made, for people.
        """
        values = [self.get(source) for source in sources]
        if how is not None:
            self.tensors[target] = how(*values)
        else:
            self.tensors[target] = values[0] if len(values) == 1 else torch.cat(values)
        self.sources[target] = sources
        self._taken.update(sources)
        if note:
            self.notes[target] = note

    def fold(self, target: str, source: str, how: Callable[[Tensor, Tensor], Tensor], note: str) -> None:
        """Change a tensor of ours by one more of the source's."""
        self.tensors[target] = how(self.tensors[target], self.get(source))
        self.sources[target] = (*self.sources[target], source)
        self._taken.add(source)
        self.notes[target] = "; ".join(filter(None, (self.notes.get(target), note)))

    def fold_layer_scale(self, block: int, after_attention: str, after_mlp: str) -> None:
        """Fold LayerScale, where a block has it, into the linear layers that it scales: gamma * (W x + b) = (gamma W) x + gamma b."""
        for source, linear in ((after_attention, "attn.proj"), (after_mlp, "mlp.fc2")):
            if source in self:
                note = f"times {source.rsplit('.', 2)[-2]}"
                self.fold(f"blocks.{block}.{linear}.weight", source, lambda weight, gamma: weight * gamma.unsqueeze(-1), note)
                self.fold(f"blocks.{block}.{linear}.bias", source, torch.mul, note)

    def fold_patch_bias(self, source: str, prefix_tokens: int) -> None:
        """Fold a patch embedding's bias, where it has one, into the positions of patches, to which it is added."""
        if source not in self:
            return

        def add(positions: Tensor, bias: Tensor) -> Tensor:
            return torch.cat([positions[:prefix_tokens], positions[prefix_tokens:] + bias])

        self.fold("pos_embed", source, add, "plus the patch embedding's bias")

    def leave_out(self, source: str, reason: str) -> None:
        """Say why a tensor of the source has no place; no error where the source has no such tensor."""
        if source in self._state:
            self.left_out[source] = reason
            self._taken.add(source)

    def finish(self) -> Inventory:
        """Itself.

        Raises:
            TeacherError: a tensor of the source was neither taken nor left out.
        """
        forgotten = sorted(set(self._state) - self._taken)
        if forgotten:
            more = f" and {len(forgotten) - 3} more" if len(forgotten) > 3 else ""
            raise TeacherError(f"teacher {self.name}: tensor {', '.join(forgotten[:3])}{more} has no place in a SparseFormer")
        return self


def teacher_spec(
    own: Inventory,
    activation: str,
    activations: Mapping[str, Activation],
    preprocess: Mapping[str, Any],
    **numbers: Any,
) -> TeacherSpec:
    """The spec of a teacher whose tensors are in the inventory; what they tell, it reads off them.

    Args:
        activation: of the blocks, as the source calls it.
        activations: the source's names of what we know.
        preprocess: `mean` and `std`.
        numbers: what remains of a `TeacherSpec`.

    Raises:
        TeacherError: an activation that we do not know, or a mean or std that is not of three channels.
    """
    if activation not in activations:
        raise TeacherError(f"teacher {own.name}: activation {activation} is not supported; known are {', '.join(activations)}")
    for name, each in (("mean", float), ("std", SIZE)):
        found = preprocess[name]
        where = f"teacher {own.name}: preprocessing: {name}"
        check(list(found) if isinstance(found, tuple) else found, [each], where, "it must be three numbers")
        if len(found) != 3:
            raise TeacherError(f"{where} has {len(found)} numbers, and must have three")
    width = own.tensors["norm.weight"].shape[0]
    return TeacherSpec(
        name=own.name,
        width=width,
        embed_dim=own.tensors["head.weight"].shape[0] if "head.weight" in own.tensors else width,
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
        activation=activations[activation],
        head="cls" if "cls_token" in own.tensors else "map",
        norm_pre="norm_pre.weight" in own.tensors,
        head_bias="head.bias" in own.tensors,
        **numbers,
    )


class Teacher(nn.Module):
    """A frozen ViT with its tensors under our names.

    Args:
        ask: given the model and normalised pixels, returns (embedding, patch tokens after the final norm).

    Attributes:
        spec: its dimensions and preprocessing.
        tensors: what can be inherited. Blocks are `blocks.{i}.{name}` with timm's names; the others are `patch_embed.weight`, `cls_token`,
            `pos_embed` (positions x width, that of the CLS token first), `norm_pre.*`, `norm.*`, `pool.*` and `head.*` (embedding x width).
    """

    def __init__(self, spec: TeacherSpec, model: nn.Module, inventory: Inventory, ask: Callable[[nn.Module, Tensor], tuple]) -> None:
        super().__init__()
        self.spec = spec
        self.model = model.eval().requires_grad_(False)
        self.inventory, self.ask = inventory.finish(), ask

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What can be inherited, by our names."""
        return self.inventory.tensors

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never leaves eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherOutput:
        """(B, 3, S, S) normalised by the teacher's own mean and std."""
        return TeacherOutput(*self.ask(self.model, pixels))

    def cast(self, dtype: torch.dtype) -> Teacher:
        """The same teacher with weights of another dtype, to ask and not to inherit from."""
        return Teacher(self.spec, copy.deepcopy(self.model).to(dtype), self.inventory, self.ask)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any of the teacher's weights; caches and checkpoints are tied to it."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(f"{name} {tuple(self.tensors[name].shape)}".encode())
            digest.update(self.tensors[name].detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
