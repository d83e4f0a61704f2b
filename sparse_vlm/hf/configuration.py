"""The tower's configuration for transformers.

Notable: it contains the complete `SparseFormerConfig`, so either kind of checkpoint can be rebuilt. This module is imported while
transformers' Auto classes are, so it imports only its configuration classes (see `sparse_vlm.integrations.after_import`).
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.models.auto.configuration_auto import AutoConfig

from sparse_vlm.tower import SparseFormerConfig


class SparseFormerHostConfig(BackboneConfigMixin, PretrainedConfig):
    """A `SparseFormerConfig` as a configuration of transformers.

    Args:
        tower: `SparseFormerConfig.to_dict()`, from which the attributes that hosts read are derived.
        out_features, out_indices: stages that a backbone returns, "stage1", "stage2" and so on, one a unit; the last by default.
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
        if tower is not None:  # transformers also builds empty configurations for comparison
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
        """The transformers configuration of a tower."""
        return cls(tower=config.to_dict())

    def unwrap(self) -> SparseFormerConfig:
        """The `SparseFormerConfig`."""
        if self.tower is None:
            raise ValueError("this SparseFormerHostConfig has no tower; create it with SparseFormerHostConfig.wrap(config)")
        return SparseFormerConfig.from_dict(self.tower)

    def grid_side(self) -> int:
        """Latent tokens a side of the initial square grid.

        Raises:
            ValueError: their number is not a square.
        """
        tokens = self.unwrap().num_latent_tokens
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f"a backbone returns square maps of tokens, and this tower has {tokens}; use a tower of {side**2} or {(side + 1) ** 2}, or "
                "AutoModel, which returns a sequence"
            )
        return side


def processor_counts(config: SparseFormerConfig, tokens: int | None = None) -> dict[str, Any]:
    """Arguments of `LlavaProcessor` for exactly N placeholders an image.

    It inserts (S // patch_size)**2 + num_additional_image_tokens; with patch_size = S the first term is 1.

    Args:
        tokens: N, where the projector changes the number of tokens.
    """
    return {
        "patch_size": config.image_size,
        "num_additional_image_tokens": (tokens or config.visual_tokens) - 1,
        "vision_feature_select_strategy": "full",
    }


AutoConfig.register(SparseFormerHostConfig.model_type, SparseFormerHostConfig, exist_ok=True)
