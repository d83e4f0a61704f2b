"""Training: `bootstrap` makes a tower from a teacher and photos, `sft` a VLM from a tower, an LLM and conversations."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_vlm.train.bootstrapping import BootstrapConfig, BootstrapResult, bootstrap
    from sparse_vlm.train.finetuning import SFTConfig, SFTResult, sft
    from sparse_vlm.train.reporter import Reporter

_MODULES = {  # public name -> module, imported at first use
    "BootstrapConfig": "bootstrapping",
    "BootstrapResult": "bootstrapping",
    "bootstrap": "bootstrapping",
    "Reporter": "reporter",
    "SFTConfig": "finetuning",
    "SFTResult": "finetuning",
    "sft": "finetuning",
}
__all__ = ["BootstrapConfig", "BootstrapResult", "Reporter", "SFTConfig", "SFTResult", "bootstrap", "sft"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
