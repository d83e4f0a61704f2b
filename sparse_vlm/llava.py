"""`sparse_vlm.llava.install()`: the tower in the original LLaVA code base."""

from sparse_vlm.hosts.llava import install
from sparse_vlm.hosts.llava_tower import LlavaImageProcessor, SparseFormerVisionTower

__all__ = ["LlavaImageProcessor", "SparseFormerVisionTower", "install"]
