"""Training: `bootstrap` makes a tower from a teacher and photos."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_vlm.train.bootstrapping import BootstrapConfig, BootstrapResult, bootstrap
    from sparse_vlm.train.reporter import Reporter

_MODULES = {  # public name -> module, imported at first use
    "BootstrapConfig": "bootstrapping",
    "BootstrapResult": "bootstrapping",
    "bootstrap": "bootstrapping",
    "Reporter": "reporter",
}
__all__ = ["BootstrapConfig", "BootstrapResult", "Reporter", "bootstrap"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
