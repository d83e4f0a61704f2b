"""Teachers: vision transformers whose blocks a SparseFormer inherits and whose representation it learns to reproduce.

Shape legend: B batch, G x G patch grid, d width, E embedding, L blocks.
A `Teacher` shows every source library's ViT in one form: its tensors under timm's names (`norm1`, `attn.qkv`, `attn.proj`, `norm2`,
`mlp.fc1`, `mlp.fc2`) and its outputs as (embedding, patch tokens after the final norm). It stays frozen and in eval mode.

Notable: adding a source is one reader function and one entry in `READERS`; nothing else asks where a teacher came from.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.preprocess import Triple


class TeacherError(UserError):
    """A teacher that cannot be loaded or inherited from; the message says why and what would work."""


class TeacherOutput(NamedTuple):
    """What a teacher says of a picture."""

    embeds: Tensor  # (B, E), not normalised
    patches: Tensor  # (B, G * G, d), after the final norm


@dataclass(frozen=True)
class TeacherSpec:
    """What a student must know of its teacher."""

    name: str
    width: int
    num_blocks: int
    num_heads: int
    embed_dim: int
    patch_size: int
    image_size: int
    image_mean: Triple
    image_std: Triple
    quick_gelu: bool
    norm_pre: bool
    ln_eps: float

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size


class Teacher(nn.Module):
    """A frozen ViT with its tensors under our names.

    Attributes:
        spec: its dimensions and preprocessing.
        tensors: every tensor of the image side. Blocks are `blocks.{i}.{name}` with timm's names; the others are `patch_embed.weight`,
            `cls_token`, `pos_embed`, `norm_pre.*`, `norm.*` and `head.weight` (embedding x width).
    """

    def __init__(self, spec: TeacherSpec, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec
        self.model = model.eval().requires_grad_(False)
        self.tensors = tensors

    def train(self, mode: bool = True) -> Teacher:
        """A teacher never leaves eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TeacherOutput:
        """(B, 3, S, S) normalised by the teacher's own mean and std."""
        return TeacherOutput(*self.model(pixels))

    def copy_in(self, dtype: torch.dtype) -> Teacher:
        """The same teacher with weights of another dtype, to ask and not to inherit from."""
        return Teacher(self.spec, copy.deepcopy(self.model).to(dtype), self.tensors)

    def fingerprint(self) -> str:
        """Sixteen hex digits that change with any of the teacher's weights; caches and checkpoints are tied to it."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            digest.update(f"{name} {tuple(self.tensors[name].shape)}".encode())
            digest.update(self.tensors[name].detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_teacher(name: str, pretrained: str | None = None) -> Teacher:
    """Load a teacher through open_clip.

    Args:
        name: `local-dir:PATH`, `hf-hub:ORG/NAME`, or an open_clip model name such as `ViT-B-16-quickgelu`.
        pretrained: the tag of open_clip's pretrained weights; required with a plain model name.

    Raises:
        TeacherError: unknown name, no weights, or an architecture that no reader knows.
    """
    try:
        import open_clip
    except ImportError as error:
        raise TeacherError(f"loading a teacher needs open_clip: pip install 'sparse-vlm[train]' ({error})") from None
    located = name.startswith(("local-dir:", "hf-hub:"))
    if name.startswith("local-dir:") and not (Path(name.removeprefix("local-dir:")) / "open_clip_config.json").is_file():
        raise TeacherError(f"teacher {name}: no open_clip_config.json in that folder")
    if not located and pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"its tags are {', '.join(tags)}" if tags else "open_clip knows no such model"
        raise TeacherError(f"teacher {name}: say which weights with NAME@TAG; {known}")
    try:
        model, _, _preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained)
    except Exception as error:
        raise TeacherError(f"teacher {name}: open_clip could not load it ({error})") from error
    visual = model.visual
    reader = READERS.get(type(visual).__name__)
    if reader is None:
        raise TeacherError(f"teacher {name}: a {type(visual).__name__} is not supported; known are {', '.join(READERS)}")
    config = open_clip.get_model_preprocess_cfg(model)
    return reader(name if pretrained is None else f"{name}@{pretrained}", visual, config)


def _read_open_clip_vit(name: str, visual: nn.Module, preprocess: dict[str, Any]) -> Teacher:
    """open_clip's native `VisionTransformer`."""
    blocks = visual.transformer.resblocks
    first = blocks[0]
    if visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
        raise TeacherError(f"teacher {name}: only towers whose head reads the normalised CLS token can be inherited from")
    activation = type(first.mlp.gelu).__name__
    if activation not in ("GELU", "QuickGELU"):
        raise TeacherError(f"teacher {name}: activation {activation} is not supported")
    if not isinstance(first.ls_1, nn.Identity):
        raise TeacherError(f"teacher {name}: LayerScale in a native open_clip tower is not supported")

    tensors: dict[str, Tensor] = {}
    renames = {
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    for i, block in enumerate(blocks):
        for key, tensor in block.state_dict().items():
            for old, new in renames.items():
                if key.startswith(old):
                    tensors[f"blocks.{i}.{new}{key.removeprefix(old)}"] = tensor
                    break
            else:
                raise TeacherError(f"teacher {name}: block {i} holds {key}, which no SparseFormer block has")
    outer = {
        "conv1.weight": "patch_embed.weight",
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "ln_pre.weight": "norm_pre.weight",
        "ln_pre.bias": "norm_pre.bias",
        "ln_post.weight": "norm.weight",
        "ln_post.bias": "norm.bias",
    }
    for key, tensor in visual.state_dict().items():
        if key.startswith("transformer."):
            continue
        if key == "proj":
            tensors["head.weight"] = tensor.mT
        elif key in outer:
            tensors[outer[key]] = tensor
        else:
            raise TeacherError(f"teacher {name}: tensor {key} has no place in a SparseFormer")

    size = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    patch = visual.patch_size if isinstance(visual.patch_size, int) else visual.patch_size[0]
    width = tensors["cls_token"].shape[-1]
    spec = TeacherSpec(
        name=name,
        width=width,
        num_blocks=len(blocks),
        num_heads=first.attn.num_heads,
        embed_dim=tensors["head.weight"].shape[0] if "head.weight" in tensors else width,
        patch_size=patch,
        image_size=size,
        image_mean=tuple(preprocess["mean"]),
        image_std=tuple(preprocess["std"]),
        quick_gelu=activation == "QuickGELU",
        norm_pre="norm_pre.weight" in tensors,
        ln_eps=first.ln_1.eps,
    )

    visual.output_tokens = True
    return Teacher(spec, visual, tensors)


READERS: dict[str, Callable[[str, nn.Module, dict[str, Any]], Teacher]] = {
    "VisionTransformer": _read_open_clip_vit,
}
