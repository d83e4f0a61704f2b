"""The tower in the original LLaVA code base, by name: `--vision_tower sparse-vlm:tiny`.

    import sparse_vlm.llava
    sparse_vlm.llava.install()
    from llava.train.train import train

Notable: needs what the tower needs, because LLaVA's world is transformers 4.37.
Source: haotian-liu/LLaVA 1.2.2, llava/model/multimodal_encoder/builder.py and llava/model/llava_arch.py (Apache-2.0).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.integrations.llava_tower import PREFIX, SparseFormerVisionTower, asked_name

_BUILDER, _ARCH = "llava.model.multimodal_encoder.builder", "llava.model.llava_arch"


def install() -> None:
    """Make LLaVA's `build_vision_tower` know names that begin with `sparse-vlm:`; other names go to LLaVA's own. Any number of times.

    Raises:
        UserError: no LLaVA here, or one that builds its towers otherwise.
    """
    try:
        builder, arch = import_module(_BUILDER), import_module(_ARCH)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llava":
            raise
        raise UserError(f"LLaVA's code base is not here (no module {error.name}); run this where `import llava` works") from None
    host = getattr(builder, "build_vision_tower", None)
    meta = getattr(arch, "LlavaMetaModel", None)
    if host is None or not hasattr(meta, "initialize_vision_modules"):
        raise UserError(f"{builder.__file__}: not LLaVA 1.2 (no build_vision_tower, or no LlavaMetaModel.initialize_vision_modules)")
    if not hasattr(host, "sparse_vlm_replaces"):
        _replace_everywhere(host, _building(host))
    if not hasattr(meta.initialize_vision_modules, "sparse_vlm_replaces"):
        meta.initialize_vision_modules = _initializing(meta.initialize_vision_modules)


def _replace_everywhere(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """In every module that has bound the function by name."""
    for module in list(sys.modules.values()):
        names = [name for name, value in list(getattr(module, "__dict__", {}).items()) if value is old]
        for name in names:
            setattr(module, name, new)


def _building(host: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(host)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> Any:
        name = asked_name(vision_tower_cfg)
        if isinstance(name, str) and name.startswith(PREFIX):
            return SparseFormerVisionTower(name, args=vision_tower_cfg, **kwargs)
        return host(vision_tower_cfg, **kwargs)

    build_vision_tower.sparse_vlm_replaces = host  # type: ignore[attr-defined]
    return build_vision_tower


def _initializing(host: Callable[..., None]) -> Callable[..., None]:
    """LLaVA's own method keeps a tower that the model has whatever the arguments name, and does not save whether it is tuned."""

    @functools.wraps(host)
    def initialize_vision_modules(self: Any, model_args: Any, *args: Any, **kwargs: Any) -> None:
        before = self.get_vision_tower()
        if isinstance(before, SparseFormerVisionTower):
            before.take(model_args)
        elif before is not None and str(model_args.vision_tower).startswith(PREFIX):
            raise UserError(
                f"--vision_tower {model_args.vision_tower}: the model was made with another tower; begin from the language model"
            )
        host(self, model_args, *args, **kwargs)
        tower = self.get_vision_tower()
        if isinstance(tower, SparseFormerVisionTower) and tower.tuned:
            if isinstance(self.vision_tower, list):
                raise UserError("--fsdp: LLaVA keeps the tower out of the model then, so a tuned one would not be saved; freeze it")
            self.config.unfreeze_mm_vision_tower = True

    initialize_vision_modules.sparse_vlm_replaces = host  # type: ignore[attr-defined]
    return initialize_vision_modules
