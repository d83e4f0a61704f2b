"""The SparseFormer vision tower; needs torch alone."""

from sparse_vlm.tower.config import GlanceConfig, SparseFormerConfig, UnitConfig
from sparse_vlm.tower.model import SparseFormer, SparseFormerOutput

__all__ = ["GlanceConfig", "SparseFormer", "SparseFormerConfig", "SparseFormerOutput", "UnitConfig"]
