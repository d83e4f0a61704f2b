"""Which of our modules is imported as soon as a host's own has been, so that `import sparse_vlm` is enough to register with a host.

Notable: neither `import sparse_vlm` nor this module imports a host. Each plug-in of the table is imported once: at once where the host's
module has been imported before us, and otherwise right after that module has run, before whoever imports it goes on. So a plug-in must
import nothing of the host that may itself still be on its way, which is why configuration, model and image processor of transformers are
modules of their own; and it registers itself as its last line, because it may be what imports the host first.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Module of a host -> our module, whose import registers what it holds.
AFTER_IMPORT: dict[str, str] = {
    "transformers.models.auto.configuration_auto": "sparse_vlm.hf.configuration",
    "transformers.models.auto.modeling_auto": "sparse_vlm.hf.model",
    "transformers.models.auto.image_processing_auto": "sparse_vlm.hf.image_processing",
    "timm": "sparse_vlm.integrations.timm",
}
# Older releases of a host are left alone: they cannot take the tower, and must go on working beside us.
OLDEST: dict[str, tuple[int, int]] = {"transformers": (5, 3), "timm": (1, 0)}


class AfterImport:
    """Imports plug-ins after the modules that they plug into; first on `sys.meta_path`.

    A finder by what it does: `importlib.abc`, whose class of finders it could inherit, takes longer to import than all else here.

    Args:
        table: as `AFTER_IMPORT`.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self.waiting = dict(table)

    def install(self) -> None:
        """Run what is due already, and wait for the rest."""
        for name in [name for name in self.waiting if name in sys.modules]:
            self._run(name)
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Where Python finds the module anyway, with a loader that imports our plug-in after it."""
        if fullname not in self.waiting:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_plug_in(module: ModuleType) -> None:
            execute(module)
            self._run(fullname)

        loader.exec_module = execute_and_plug_in  # of this one loader: each spec has its own
        return spec

    def _run(self, name: str) -> None:
        plug_in = self.waiting.pop(name)
        if _new_enough(name.partition(".")[0]):
            import_module(plug_in)


def _new_enough(host: str) -> bool:
    version = sys.modules[host].__version__.split(".")
    return tuple(int(part) for part in version[:2]) >= OLDEST.get(host, (0, 0))
