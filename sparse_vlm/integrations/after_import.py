"""Import hooks: `import sparse_vlm` is enough to register plug-ins with a host library, before or after the host is imported.

Notable: neither `import sparse_vlm` nor this module imports a host. Each plug-in of the table is imported once: immediately if the host's
module is imported already, otherwise right after that module has run. A plug-in must therefore not import parts of the host that may
still be importing, which is why configuration, model and image processor of transformers are separate modules. It registers itself in its
last line, because it may be the first import of the host.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# module of a host -> plug-in, which registers itself when it is imported
AFTER_IMPORT: dict[str, str] = {
    "transformers.models.auto.configuration_auto": "sparse_vlm.hf.configuration",
    "transformers.models.auto.modeling_auto": "sparse_vlm.hf.model",
    "transformers.models.auto.image_processing_auto": "sparse_vlm.hf.image_processing",
    "timm": "sparse_vlm.integrations.timm",
}
# older releases of a host are not supported, and not touched
MIN_VERSIONS: dict[str, tuple[int, int]] = {"transformers": (5, 3), "timm": (1, 0)}


class AfterImport:
    """Meta path finder that imports plug-ins after the modules that they extend; first on `sys.meta_path`.

    It does not inherit from `importlib.abc`, whose import takes longer than all else here.

    Args:
        table: as `AFTER_IMPORT`.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self.waiting = dict(table)

    def install(self) -> None:
        """Import the plug-ins of hosts that are imported already, and hook the others."""
        for name in [name for name in self.waiting if name in sys.modules]:
            self._run(name)
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that imports the plug-in afterwards."""
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
    return tuple(int(part) for part in version[:2]) >= MIN_VERSIONS.get(host, (0, 0))
