"""The tower as transformers knows towers: configuration, model and image processor for its Auto classes.

    import sparse_vlm.hosts.transformers
    LlavaForConditionalGeneration.from_pretrained(PATH)

Shape legend: B batch, S side of the square input, N tokens, d width, E embedding.

Notable: importing this module registers the three classes, and that is all: `LlavaForConditionalGeneration` is the stock one, there is no
fork and no remote code. The tower's own configuration is kept whole inside the host's, so a checkpoint of either kind can be rebuilt.
Pictures go through `sparse_vlm.preprocess`, the one way in.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import BaseModelOutputWithPooling

from sparse_vlm.preprocess import Triple, preprocess
from sparse_vlm.tower import SparseFormer, SparseFormerConfig


class SparseFormerHostConfig(PretrainedConfig):
    """`SparseFormerConfig` in transformers' clothes.

    Args:
        tower: `SparseFormerConfig.to_dict()`. The other attributes, which hosts read, follow from it.
    """

    model_type = "sparseformer"

    def __init__(self, tower: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.tower = tower
        if tower is not None:  # transformers also builds empty configurations, to compare against
            config = SparseFormerConfig.from_dict(tower)
            self.hidden_size = config.width
            self.image_size = config.image_size
            self.patch_size = config.image_size  # the whole picture is one "patch"; see `processor_counts`
            self.num_tokens = config.visual_tokens
            self.num_channels = 3
            self.num_hidden_layers = len(config.units)
        super().__init__(**kwargs)

    @classmethod
    def wrap(cls, config: SparseFormerConfig) -> SparseFormerHostConfig:
        """The host's configuration of a tower."""
        return cls(tower=config.to_dict())

    def unwrap(self) -> SparseFormerConfig:
        """The tower's own configuration."""
        if self.tower is None:
            raise ValueError("this SparseFormerHostConfig describes no tower; make it with SparseFormerHostConfig.wrap(config)")
        return SparseFormerConfig.from_dict(self.tower)


class SparseFormerHostModel(PreTrainedModel):
    """The tower as a transformers vision model.

    `hidden_states[-1]` is what a language model is given, (B, `config.num_tokens`, d); `last_hidden_state` has the CLS token as well where
    the tower has one, and `pooler_output` is (B, E).
    """

    config_class = SparseFormerHostConfig
    config: SparseFormerHostConfig
    base_model_prefix = "sparseformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = frozenset({"initial_roi"})  # bfloat16 resolves one pixel in 256

    def __init__(self, config: SparseFormerHostConfig, tower: SparseFormer | None = None) -> None:
        super().__init__(config)
        self.tower = SparseFormer(config.unwrap()) if tower is None else tower
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The tower has initialised itself."""

    @classmethod
    def wrap(cls, tower: SparseFormer) -> SparseFormerHostModel:
        """A tower, not copied."""
        return cls(SparseFormerHostConfig.wrap(tower.config), tower)

    def forward(
        self, pixel_values: Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """(B, 3, S, S) normalised pixels to tokens."""
        out = self.tower(pixel_values)
        hidden_states = (out.last_hidden_state[:, -self.config.num_tokens :],)
        if return_dict is False:
            return out.last_hidden_state, out.image_embeds, hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=out.last_hidden_state, pooler_output=out.image_embeds, hidden_states=hidden_states
        )


class SparseFormerImageProcessor(BaseImageProcessor):
    """Pictures to `pixel_values` (B, 3, S, S) as `sparse_vlm.preprocess` makes them.

    Args:
        size: side of the square input in pixels, or transformers' dict form of it.
        image_mean, image_std: of each channel, for values in 0..1.
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(
        self,
        size: int | dict[str, int] = 224,
        image_mean: Triple = (0.5, 0.5, 0.5),
        image_std: Triple = (0.5, 0.5, 0.5),
        **kwargs: Any,
    ) -> None:
        kwargs.pop("crop_size", None)  # follows from size
        super().__init__(**kwargs)
        side = size if isinstance(size, int) else size["height"]
        self.size = {"height": side, "width": side}
        self.crop_size = dict(self.size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def of(cls, config: SparseFormerConfig) -> SparseFormerImageProcessor:
        """The image processor of a tower."""
        return cls(size=config.image_size, image_mean=config.image_mean, image_std=config.image_std)

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """PIL pictures, arrays or tensors (uint8, channels first or last), one or many, nested or not."""
        flat = [_as_picture(image) for image in make_flat_list_of_images(images)]
        pixels = preprocess(flat, self.size["height"], tuple(self.image_mean), tuple(self.image_std))
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def _as_picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must hold uint8 values in 0..255, this one holds {array.dtype}")
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    return Image.fromarray(array)


def processor_counts(config: SparseFormerConfig) -> dict[str, Any]:
    """What `LlavaProcessor` must be told so that it writes exactly N placeholders for every picture.

    It counts (S // patch_size)**2 + num_additional_image_tokens; with patch_size = S the first term is 1 for every N.
    """
    return {
        "patch_size": config.image_size,
        "num_additional_image_tokens": config.visual_tokens - 1,
        "vision_feature_select_strategy": "full",
    }


def register(exist_ok: bool = True) -> None:
    """Tell transformers' Auto classes about the tower; importing this module has done it."""
    AutoConfig.register(SparseFormerHostConfig.model_type, SparseFormerHostConfig, exist_ok=exist_ok)
    AutoModel.register(SparseFormerHostConfig, SparseFormerHostModel, exist_ok=exist_ok)
    both = {"slow_image_processor_class": SparseFormerImageProcessor, "fast_image_processor_class": SparseFormerImageProcessor}
    AutoImageProcessor.register(SparseFormerHostConfig, exist_ok=exist_ok, **both)


register()
