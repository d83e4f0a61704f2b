"""What a visual token costs: towers, projectors and language models side by side on the machine at hand."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_vlm.bench.config import BenchConfig
    from sparse_vlm.bench.run import measure

__all__ = ["BenchConfig", "measure"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.run"), name)  # torch is imported at first use
