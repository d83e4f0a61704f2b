"""The SparseFormer vision tower; needs torch alone."""

from sparse_vlm.tower.config import FocusConfig, GlanceConfig, SparseFormerConfig, UnitConfig
from sparse_vlm.tower.model import SparseFormer, SparseFormerOutput

__all__ = ["FocusConfig", "GlanceConfig", "SparseFormer", "SparseFormerConfig", "SparseFormerOutput", "UnitConfig"]
