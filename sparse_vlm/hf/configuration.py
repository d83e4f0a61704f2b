"""The tower's configuration as transformers knows configurations.

Notable: the tower's own configuration is kept whole inside the host's, so a checkpoint of either kind can be rebuilt. This module is
imported while transformers' Auto classes are, and imports only its configuration classes (see `sparse_vlm.integrations.after_import`).
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.auto.configuration_auto import AutoConfig

from sparse_vlm.tower import SparseFormerConfig


class SparseFormerHostConfig(BackboneConfigMixin, PretrainedConfig):
    """`SparseFormerConfig` in transformers' clothes.

    Args:
        tower: `SparseFormerConfig.to_dict()`. The other attributes, which hosts read, follow from it.
        out_features, out_indices: stages that a backbone returns; "stage1", "stage2" and so on, one a unit; the last by default.
    """

    model_type = "sparseformer"

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tower = tower
        self.stage_names = ["stage1"]
        if tower is not None:  # transformers also builds empty configurations, to compare against
            config = SparseFormerConfig.from_dict(tower)
            self.hidden_size = config.width
            self.image_size = config.image_size
            self.patch_size = config.image_size  # the whole image is one "patch"; see `processor_counts`
            self.num_tokens = config.visual_tokens
            self.num_channels = 3
            self.num_hidden_layers = len(config.units)
            self.stage_names = [f"stage{number}" for number in range(1, len(config.units) + 1)]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
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

    def grid_side(self) -> int:
        """Side of the square that the latent tokens begin as.

        Raises:
            ValueError: they are no square of tokens.
        """
        tokens = self.unwrap().num_latent_tokens
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"a backbone returns maps of h x w tokens, and the {tokens} of this tower are no square; take a tower of {side**2} or "
                f"{(side + 1) ** 2}, or AutoModel, which returns them as a sequence"
            )
        return side


def processor_counts(config: SparseFormerConfig, tokens: int | None = None) -> dict[str, Any]:
    """What `LlavaProcessor` must be told so that it writes exactly N placeholders for every image.

    It counts (S // patch_size)**2 + num_additional_image_tokens; with patch_size = S the first term is 1 for every N.

    Args:
        tokens: N, where a projector makes another number of the tower's tokens.
    """
    return {
        "patch_size": config.image_size,
        "num_additional_image_tokens": (tokens or config.visual_tokens) - 1,
        "vision_feature_select_strategy": "full",
    }


AutoConfig.register(SparseFormerHostConfig.model_type, SparseFormerHostConfig, exist_ok=True)
