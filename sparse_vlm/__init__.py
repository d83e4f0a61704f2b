"""SparseFormer: a vision tower of 49 tokens for multimodal language models.

Notable: the names below are imported at first use, so that `import sparse_vlm` is cheap and the tower needs torch alone. The tower is
registered with hosts such as transformers when they are imported, before or after this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_vlm.integrations.after_import import AFTER_IMPORT, AfterImport

if TYPE_CHECKING:
    from sparse_vlm.errors import UserError
    from sparse_vlm.images.decode import load_image
    from sparse_vlm.teachers import load_teacher
    from sparse_vlm.tower import SparseFormer, SparseFormerConfig
    from sparse_vlm.vlm import VLM

__version__ = "0.1.0"
__all__ = ["VLM", "SparseFormer", "SparseFormerConfig", "UserError", "load_image", "load_teacher"]

_HOMES = {
    "SparseFormer": "sparse_vlm.tower",
    "SparseFormerConfig": "sparse_vlm.tower",
    "UserError": "sparse_vlm.errors",
    "VLM": "sparse_vlm.vlm",
    "load_image": "sparse_vlm.images.decode",
    "load_teacher": "sparse_vlm.teachers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparse_vlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


AfterImport(AFTER_IMPORT).install()
