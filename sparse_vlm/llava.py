"""`sparse_vlm.llava.install()`: the tower in the original LLaVA code base."""

from sparse_vlm.integrations.llava import install
from sparse_vlm.integrations.llava_tower import LlavaImageProcessor, SparseFormerVisionTower

__all__ = ["LlavaImageProcessor", "SparseFormerVisionTower", "install"]
