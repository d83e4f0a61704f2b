"""Evaluation of towers and of vision-language models: tasks and metrics, each with its 95 % interval."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_vlm.eval.report import as_json
    from sparse_vlm.eval.run import EvalConfig, Report, evaluate

_MODULES = {"EvalConfig": "run", "Report": "run", "as_json": "report", "evaluate": "run"}  # public name -> module, imported at first use
__all__ = ["EvalConfig", "Report", "as_json", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
