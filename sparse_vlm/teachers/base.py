"""`Teacher`: a ViT of any library in one form.

Shape legend: B batch, G x G patch grid, d width, E embedding, L blocks.
A `Teacher` has its tensors under timm's names (`norm1`, `attn.qkv`, `attn.proj`, `norm2`, `mlp.fc1`, `mlp.fc2`), and its outputs are
(embedding, patch tokens after the final norm). It is frozen and in eval mode.

Notable: a tensor without a module in a SparseFormer is folded into another where that is exact: LayerScale into the linear layer before it,
a patch embedding's bias into the position embeddings. `Inventory` checks that no tensor of the source is forgotten.
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
    """A teacher that cannot be loaded or inherited from."""


class TeacherOutput(NamedTuple):
    """Outputs of a teacher."""

    embeds: Tensor  # (B, E), not normalised
    patches: Tensor  # (B, G * G, d), after the final norm


@dataclass(frozen=True)
class TeacherSpec:
    """Dimensions and preprocessing of a teacher.

    Attributes:
        head: source of the embedding: the CLS token, or attention pooling over all tokens (`map`, as in SigLIP).
        norm_pre: whether a norm precedes the first block.
        head_bias: whether the head's linear layer has a bias.
        licence: of the weights, as stated by their source; may be empty.
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
        """Number of patches a side."""
        return self.image_size // self.patch_size

    @property
    def has_cls(self) -> bool:
        """Whether a CLS token precedes the patches."""
        return self.head == "cls"


class Inventory:
    """Maps the tensors of a source model to our names, and checks that each is used or left out.

    Attributes:
        tensors: what a student can inherit, by our names.
        notes: how a tensor was made, by our names, unless it is unchanged.
        sources: the source's names that a tensor was made of, by our names.
        left_out: tensors of the source without a place in any student, with the reason.
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
        """A tensor of the source; only `put` and `fold` mark it as used."""
        if source not in self._state:
            raise TeacherError(f"teacher {self.name}: it has no tensor {source}")
        return self._state[source]

    def put(self, target: str, *sources: str, how: Callable[..., Tensor] | None = None, note: str = "") -> None:
        """Set one of our tensors from one or several of the source.

        Args:
            how: computes ours from the source's; by default a single tensor is unchanged and several are concatenated.
            note: how it was made, for the printed mapping.
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
        """Combine one of our tensors with a further one of the source."""
        self.tensors[target] = how(self.tensors[target], self.get(source))
        self.sources[target] = (*self.sources[target], source)
        self._taken.add(source)
        self.notes[target] = "; ".join(filter(None, (self.notes.get(target), note)))

    def fold_layer_scale(self, block: int, after_attention: str, after_mlp: str) -> None:
        """Fold a block's LayerScale, if it has one, into the linear layers: gamma * (W x + b) = (gamma W) x + gamma b."""
        for source, linear in ((after_attention, "attn.proj"), (after_mlp, "mlp.fc2")):
            if source in self:
                note = f"times {source.rsplit('.', 2)[-2]}"
                self.fold(f"blocks.{block}.{linear}.weight", source, lambda weight, gamma: weight * gamma.unsqueeze(-1), note)
                self.fold(f"blocks.{block}.{linear}.bias", source, torch.mul, note)

    def fold_patch_bias(self, source: str, prefix_tokens: int) -> None:
        """Fold a patch embedding's bias, if it has one, into the position embeddings of patches."""
        if source not in self:
            return

        def add(positions: Tensor, bias: Tensor) -> Tensor:
            return torch.cat([positions[:prefix_tokens], positions[prefix_tokens:] + bias])

        self.fold("pos_embed", source, add, "plus the patch embedding's bias")

    def leave_out(self, source: str, reason: str) -> None:
        """Leave a tensor of the source out, if it exists, for a reason."""
        if source in self._state:
            self.left_out[source] = reason
            self._taken.add(source)

    def finish(self) -> Inventory:
        """Check that all tensors are used or left out; returns itself.

        Raises:
            TeacherError: a tensor of the source was neither taken nor left out.
        """
        forgotten = sorted(set(self._state) - self._taken)
        if forgotten:
            more = f" and {len(forgotten) - 3} more" if len(forgotten) > 3 else ""
            raise TeacherError(f"teacher {self.name}: tensor {', '.join(forgotten[:3])}{more} cannot be mapped to a SparseFormer")
        return self


def teacher_spec(
    own: Inventory,
    activation: str,
    activations: Mapping[str, Activation],
    preprocess: Mapping[str, Any],
    **numbers: Any,
) -> TeacherSpec:
    """The spec of a teacher, whose dimensions are taken from its inventory as far as possible.

    Args:
        activation: of the blocks, by the source's name.
        activations: supported activations, by the source's names.
        preprocess: `mean` and `std`.
        numbers: the remaining fields of `TeacherSpec`.

    Raises:
        TeacherError: an unsupported activation, or a mean or std without three channels.
    """
    if activation not in activations:
        raise TeacherError(f"teacher {own.name}: activation {activation} is not supported; known are {', '.join(activations)}")
    for name, each in (("mean", float), ("std", SIZE)):
        found = preprocess[name]
        where = f"teacher {own.name}: preprocessing: {name}"
        check(list(found) if isinstance(found, tuple) else found, [each], where, "it must be three numbers")
        if len(found) != 3:
            raise TeacherError(f"{where} has {len(found)} numbers, expected three")
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
    """A frozen ViT.

    Args:
        encode: maps the model and normalised pixels to (embedding, patch tokens after the final norm).

    Attributes:
        spec: its dimensions and preprocessing.
        tensors: that can be inherited. Blocks are `blocks.{i}.{name}` with timm's names; the others are `patch_embed.weight`, `cls_token`,
            `pos_embed` (positions x width, that of the CLS token first), `norm_pre.*`, `norm.*`, `pool.*` and `head.*` (embedding x width).
    """

    def __init__(self, spec: TeacherSpec, model: nn.Module, inventory: Inventory, encode: Callable[[nn.Module, Tensor], tuple]) -> None:
        super().__init__()
        self.spec = spec
        self.model = model.eval().requires_grad_(False)
        self.inventory, self.encode = inventory.finish(), encode

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that can be inherited, by our names."""
        return self.inventory.tensors

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherOutput:
        """(B, 3, S, S) normalised by the teacher's own mean and std."""
        return TeacherOutput(*self.encode(self.model, pixels))

    def cast(self, dtype: torch.dtype) -> Teacher:
        """A copy with the model in another dtype, for inference only (`tensors` keep theirs)."""
        return Teacher(self.spec, copy.deepcopy(self.model).to(dtype), self.inventory, self.encode)

    def fingerprint(self) -> str:
        """Digest of the weights (16 hex digits), which identifies the teacher in caches and run settings."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(f"{name} {tuple(self.tensors[name].shape)}".encode())
            digest.update(self.tensors[name].detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
