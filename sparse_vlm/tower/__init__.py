"""The SparseFormer vision tower; needs torch alone."""

from sparse_vlm.tower.config import FocusConfig, RoIPatchConfig, SparseFormerConfig, UnitConfig
from sparse_vlm.tower.model import SparseFormer, SparseFormerOutput

__all__ = ["FocusConfig", "RoIPatchConfig", "SparseFormer", "SparseFormerConfig", "SparseFormerOutput", "UnitConfig"]
