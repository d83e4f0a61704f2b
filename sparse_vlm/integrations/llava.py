"""The tower in the original LLaVA code base, by name: `--vision_tower sparse-vlm:tiny`.

    import sparse_vlm.llava
    sparse_vlm.llava.install()
    from llava.train.train import train

Notable: needs only the requirements of the tower, because LLaVA needs transformers 4.37.
Source: haotian-liu/LLaVA 1.2.2, llava/model/multimodal_encoder/builder.py and llava/model/llava_arch.py (Apache-2.0).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.integrations.llava_tower import PREFIX, SparseFormerVisionTower, requested_name

_BUILDER, _ARCH = "llava.model.multimodal_encoder.builder", "llava.model.llava_arch"


def install() -> None:
    """Add names that begin with `sparse-vlm:` to LLaVA's `build_vision_tower`. May be called repeatedly.

    Raises:
        UserError: LLaVA is not installed, or is another version.
    """
    try:
        builder, arch = import_module(_BUILDER), import_module(_ARCH)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llava":
            raise
        raise UserError(f"LLaVA is not installed (no module {error.name}); run this where `import llava` works") from None
    host = getattr(builder, "build_vision_tower", None)
    meta = getattr(arch, "LlavaMetaModel", None)
    if host is None or not hasattr(meta, "initialize_vision_modules"):
        raise UserError(f"{builder.__file__}: not LLaVA 1.2 (no build_vision_tower, or no LlavaMetaModel.initialize_vision_modules)")
    if not hasattr(host, "sparse_vlm_replaces"):
        _replace_everywhere(host, _building(host))
    if not hasattr(meta.initialize_vision_modules, "sparse_vlm_replaces"):
        meta.initialize_vision_modules = _initializing(meta.initialize_vision_modules)


def _replace_everywhere(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Replace a function in every module that refers to it."""
    for module in list(sys.modules.values()):
        names = [name for name, value in list(getattr(module, "__dict__", {}).items()) if value is old]
        for name in names:
            setattr(module, name, new)


def _building(host: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(host)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> Any:
        name = requested_name(vision_tower_cfg)
        if isinstance(name, str) and name.startswith(PREFIX):
            return SparseFormerVisionTower(name, args=vision_tower_cfg, **kwargs)
        return host(vision_tower_cfg, **kwargs)

    build_vision_tower.sparse_vlm_replaces = host  # type: ignore[attr-defined]
    return build_vision_tower


def _initializing(host: Callable[..., None]) -> Callable[..., None]:
    """LLaVA's own method keeps a model's tower whatever the arguments name, and does not save that it is tuned."""

    @functools.wraps(host)
    def initialize_vision_modules(self: Any, model_args: Any, *args: Any, **kwargs: Any) -> None:
        current = self.get_vision_tower()
        if isinstance(current, SparseFormerVisionTower):
            current.resume(model_args)
        elif current is not None and str(model_args.vision_tower).startswith(PREFIX):
            raise UserError(f"--vision_tower {model_args.vision_tower}: the model has another tower; start from the language model")
        host(self, model_args, *args, **kwargs)
        tower = self.get_vision_tower()
        if isinstance(tower, SparseFormerVisionTower) and tower.tuned:
            if isinstance(self.vision_tower, list):
                raise UserError("--fsdp: LLaVA then keeps the tower outside of the model and would not save a tuned one; freeze it")
            self.config.unfreeze_mm_vision_tower = True

    initialize_vision_modules.sparse_vlm_replaces = host  # type: ignore[attr-defined]
    return initialize_vision_modules
