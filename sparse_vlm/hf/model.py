"""The tower as a vision model and as a backbone for transformers' Auto classes.

    import sparse_vlm
    LlavaForConditionalGeneration.from_pretrained(PATH)

Shape legend: B batch, S side of the square input, N tokens, d width, E embedding, h x w the initial grid of latent
tokens. For whole images (`fit` of the tower's configuration) `image_sizes` (B, 2) gives the size of each; where a host omits it, it is
recovered from the canvas, which is zero beyond its image.

Notable: `import sparse_vlm` registers the classes with transformers' Auto classes (`sparse_vlm.integrations.after_import`).
`LlavaForConditionalGeneration` is transformers' own class: no fork, no remote code.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import AutoBackbone, AutoModel

from sparse_vlm.hf.configuration import SparseFormerHostConfig, processor_counts
from sparse_vlm.hf.image_processing import SparseFormerImageProcessor
from sparse_vlm.roi import sizes_on
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.groups import square_grid

__all__ = [
    "SparseFormerBackbone",
    "SparseFormerHostConfig",
    "SparseFormerHostModel",
    "SparseFormerImageProcessor",
    "llava_config",
    "processor_counts",
]


class SparseFormerPreTrainedModel(PreTrainedModel):
    """Base class of model and backbone; `tower` is the `SparseFormer`, which initialises its own weights."""

    config_class = SparseFormerHostConfig
    config: SparseFormerHostConfig
    base_model_prefix = "sparseformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The tower always uses SDPA. The flags let users choose an attention implementation for the LLM beside it.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = frozenset({"initial_roi"})  # bfloat16 resolves one pixel in 256

    def __init__(self, config: SparseFormerHostConfig, tower: SparseFormer | None = None) -> None:
        super().__init__(config)
        self.tower = SparseFormer(config.unwrap()) if tower is None else tower
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the tower initialises its own weights."""

    @classmethod
    def wrap(cls, tower: SparseFormer) -> Any:
        """Wrap a tower, without a copy."""
        return cls(SparseFormerHostConfig.wrap(tower.config), tower)

    def _sizes(self, pixel_values: Tensor, image_sizes: Any) -> Tensor | None:
        """Sizes of the images on their canvases, (B, 2); None where images fill them."""
        if image_sizes is None:
            return sizes_on(pixel_values, self.tower.config.fit)
        return torch.as_tensor(image_sizes, device=pixel_values.device)


class _ConstantTokens:
    """The `patch_size` of the tower for stock Llava.

    Llava splits packed tokens by the product of `image_sizes // patch_size`, the number of Pixtral's patches; here that product is the
    number of tokens, whatever the size.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __rfloordiv__(self, image_sizes: Tensor) -> Tensor:
        return image_sizes.new_tensor([self.tokens, 1]).expand(len(image_sizes), 2)


class SparseFormerHostModel(SparseFormerPreTrainedModel):
    """The tower as a transformers vision model.

    `hidden_states[-1]` are the visual tokens for a language model, (B, `config.num_tokens`, d); with `image_sizes` packed as
    (1, B * `config.num_tokens`, d), as stock Llava expects of towers with sizes (Pixtral's). `last_hidden_state` includes the CLS token
    of a tower that has one, and `pooler_output` is (B, E).
    """

    @property
    def patch_size(self) -> _ConstantTokens:
        """For stock Llava, which splits packed tokens by it."""
        return _ConstantTokens(self.config.num_tokens)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """(B, 3, S, S) normalised pixels, and the size of each image on its canvas (B, 2), to tokens."""
        out = self.tower(pixel_values, image_sizes=self._sizes(pixel_values, image_sizes))
        tokens = out.last_hidden_state[:, -self.config.num_tokens :]
        hidden_states = (tokens if image_sizes is None else tokens.flatten(0, 1).unsqueeze(0),)
        if return_dict is False:
            return out.last_hidden_state, out.image_embeds, hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state, pooler_output=out.image_embeds, hidden_states=hidden_states
        )


class SparseFormerBackbone(BackboneMixin, SparseFormerPreTrainedModel):
    """The tower as a transformers backbone: one stage a unit, with its latent tokens as a map (B, d, h, w) by initial grid.

    The last stage is normalised like the tower's output; earlier ones are the inputs of the next unit. CLS is in no map. All images have
    the same initial grid, whatever their aspect and content.

    Raises:
        ValueError: the number of tokens is not a square.
    """

    def __init__(self, config: SparseFormerHostConfig, tower: SparseFormer | None = None) -> None:
        side = config.grid_side()
        super().__init__(config, tower)
        self.side = side
        self.num_features = [unit.width for unit in self.tower.config.units]

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, image_sizes: Tensor | None = None, **kwargs: Any
    ) -> BackboneOutput | tuple[tuple[Tensor, ...]]:
        """(B, 3, S, S) normalised pixels, and the size of each image on its canvas (B, 2), to one map for each of `out_features`."""
        maps = []
        sizes = self._sizes(pixel_values, image_sizes)
        units = self.tower.run_units(pixel_values, image_sizes=sizes, cells=square_grid(self.tower, len(pixel_values)))
        for stage, (tokens, _) in zip(self.stage_names, units, strict=True):
            if stage in self.out_features:
                if stage == self.stage_names[-1]:
                    tokens = self.tower.norm(tokens)
                latent = tokens[:, -(self.side**2) :]
                maps.append(latent.transpose(1, 2).unflatten(2, (self.side, self.side)).contiguous())
        return (tuple(maps),) if return_dict is False else BackboneOutput(feature_maps=tuple(maps))


def llava_config(tower: SparseFormerHostConfig, text_config: Any, image_token_id: int, tokens: int | None = None) -> LlavaConfig:
    """The configuration of a stock LLaVA with this tower and any causal LM.

    Args:
        text_config: the LLM's own configuration.
        image_token_id: id of the image placeholder in the LLM's tokenizer.
        tokens: tokens per image in the LLM, where a projector reduces the tower's.
    """
    return LlavaConfig(
        vision_config=tower,
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=tokens or tower.num_tokens,
        vision_feature_layer=-1,  # LLaVA's default, the layer before the last, and "default", which drops the first token, are for ViTs
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )


def _patch_auto_backbone() -> None:
    """Let `AutoBackbone.from_pretrained` load folders of SparseFormers; everything else is left to transformers.

    It queries the hub for the name before it looks at the disk, and the hub's client rejects paths (as of transformers 5.24), so
    no folder of any model loads.
    """
    stock = AutoBackbone.from_pretrained

    def from_pretrained(cls: type[AutoBackbone], pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if _is_sparseformer(Path(pretrained_model_name_or_path)):
            return SparseFormerBackbone.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return stock(pretrained_model_name_or_path, *args, **kwargs)

    AutoBackbone.from_pretrained = classmethod(from_pretrained)


def _is_sparseformer(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return config.get("model_type") == SparseFormerHostConfig.model_type


AutoModel.register(SparseFormerHostConfig, SparseFormerHostModel, exist_ok=True)
AutoBackbone.register(SparseFormerHostConfig, SparseFormerBackbone, exist_ok=True)
_patch_auto_backbone()
