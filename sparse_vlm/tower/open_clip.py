"""The tower as an image tower of open_clip: `model.visual = tower.for_open_clip(model)`.

Shape legend: B batch, n latent tokens, d width, E embedding, h x w pixels.

Notable: a tower for whole images needs canvases that are zero beyond their images, as `OpenClipVisual.preprocess` returns them; open_clip's
own transform, by `preprocess_cfg`, squashes whole images to squares. Needs torch alone to encode. The attributes are those of open_clip's
`VisionTransformer` (open_clip/transformer.py, version 3) that open_clip looks up by name: `image_size`, `output_dim`, `output_tokens`,
`preprocess_cfg`, `lock`, `set_grad_checkpointing`, `no_weight_decay`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_vlm.errors import UserError
from sparse_vlm.roi import sizes_on
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.groups import layer_groups, undecayed

if TYPE_CHECKING:
    from PIL import Image


class OpenClipVisual(nn.Module):
    """Wraps a tower, without a copy, as `model.visual`.

    Attributes:
        output_tokens: also return the tokens.
        preprocess_cfg: the tower's preprocessing for open_clip's `PreprocessCfg`; for whole images the nearest that open_clip supports.
    """

    def __init__(self, tower: SparseFormer) -> None:
        super().__init__()
        self.tower = tower
        config = tower.config
        self.image_size = (config.image_size, config.image_size)
        self.output_dim = config.embed_dim
        self.output_tokens = False
        self.image_mean, self.image_std = config.image_mean, config.image_std
        self.preprocess_cfg: dict[str, Any] = {
            "size": self.image_size,
            "mode": "RGB",
            "mean": config.image_mean,
            "std": config.image_std,
            "interpolation": "bicubic",
            "resize_mode": "shortest" if config.fit == "crop" else "squash",
            "fill_color": 0,
        }

    def preprocess(self, image: Image.Image) -> Tensor:
        """An image to (3, S, S) normalised pixels, exactly as in the tower's training; replaces open_clip's own transform."""
        from sparse_vlm.images.preprocess import Preprocessor

        return Preprocessor.of(self.tower.config)(image, square=True).pixels[0]

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, h, w) normalised pixels to embeddings (B, E); with `output_tokens` also latent tokens (B, n, d)."""
        out = self.tower(image, image_sizes=sizes_on(image, self.tower.config.fit))
        if self.output_tokens:
            return out.image_embeds, out.last_hidden_state[:, -out.rois.shape[1] :]
        return out.image_embeds

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all but the last groups (LiT, arXiv 2111.07991): the head is the last, the last unit the one before it.

        Args:
            freeze_bn_stats: ignored; there is no BatchNorm.
        """
        groups = layer_groups(self.tower)
        free = len(groups) - unlocked_groups
        for index, group in enumerate(groups):
            for parameter in group:
                parameter.requires_grad_(index >= free)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.tower.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {f"tower.{name}" for name in undecayed(self.tower)}


def adapt(tower: SparseFormer, model: nn.Module | None = None) -> OpenClipVisual:
    """Wrap a tower for a model of open_clip.

    Args:
        model: to check that the tower fits it, and to move the tower to its device and dtype.

    Raises:
        UserError: the model has another embedding width or another mean and std.
    """
    if model is not None:
        _check(tower, model)
        if (
            there := max(getattr(model, "visual", nn.Module()).parameters(), key=Tensor.numel, default=None)
        ) is not None:  # norms may be float32
            tower.to(there.device, there.dtype)
    return OpenClipVisual(tower)


def _check(tower: SparseFormer, model: nn.Module) -> None:
    config, width = tower.config, _text_width(model)
    if width is not None and width != config.embed_dim:
        raise UserError(
            f"the tower's embeddings have {config.embed_dim} numbers, those of the model's text side {width}: "
            "take a tower that was bootstrapped from this model's own image tower"
        )
    preprocess_cfg = getattr(getattr(model, "visual", None), "preprocess_cfg", None) or {}
    for what, own in (("mean", config.image_mean), ("std", config.image_std)):
        other = preprocess_cfg.get(what)
        if other is not None and not all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(own, other, strict=True)):
            raise UserError(
                f"the tower was trained on pixels of {what} {own}, the model's have {what} {tuple(other)}: take a tower that was "
                "bootstrapped from this model's own image tower; or call for_open_clip() without the model, and preprocess by the "
                "preprocess_cfg of the result"
            )


def _text_width(model: nn.Module) -> int | None:
    """Width of the text side's embeddings; None where it is unknown."""
    text = getattr(model, "text", None)
    if text is not None:  # CustomTextCLIP and CoCa, with open_clip's own or a Hugging Face text tower
        return getattr(text, "output_dim", None)
    projection = getattr(model, "text_projection", None)  # CLIP, whose text tower is spread over the model
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return projection.shape[1] if isinstance(projection, torch.Tensor) else None
