"""The table of formats of `sparse-vlm export`: kinds of models, dtypes, requirements, exporters.

Notable: standard library alone, so that arguments are checked before heavy imports; exporters are imported when used. A new format is
one more entry, and an `Exporter` (`sparse_vlm.export.exporter`) for each kind of model that it supports.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sparse_vlm.errors import UserError

if TYPE_CHECKING:
    from sparse_vlm.export.exporter import Exporter

KINDS = {"tower": "a tower", "vlm": "a vision-language model"}


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        writers: kind of model, a key of `KINDS`, to `module:class` of its `Exporter`.
        dtypes: of the weights; the first is the default.
        needs: packages beyond sparse-vlm's own requirements; the extra `export` installs them.
    """

    writers: Mapping[str, str]
    dtypes: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def exporter(self, kind: str) -> type[Exporter]:
        """The exporter of a kind of model."""
        module, _, name = self.writers[kind].partition(":")
        return getattr(import_module(module), name)


FORMATS: dict[str, Format] = {
    "transformers": Format(
        {"tower": "sparse_vlm.export.hosted:HostedTower", "vlm": "sparse_vlm.export.hosted:HostedVLM"},
        dtypes=("bfloat16", "float32"),
    ),
    "onnx": Format(
        {"tower": "sparse_vlm.export.graphs:OnnxTower"},
        dtypes=("float32",),
        needs=("onnxscript", "onnxruntime"),
    ),
    "torch-export": Format(
        {"tower": "sparse_vlm.export.graphs:TorchExportTower"},
        dtypes=("float32", "bfloat16"),
    ),
}


def choose(name: str, kind: str, model: str, tower: str, dtype: str | None) -> tuple[Format, str]:
    """Check and return the format and its dtype.

    Args:
        kind: of the model, a key of `KINDS`.
        tower: name of the model's tower; the model itself where it is one.
        dtype: None for the format's default.

    Raises:
        UserError: an unknown format, an unsupported kind of model or dtype, or packages that are not installed.
    """
    if name not in FORMATS:
        close = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--format {name}: no such format; there are {', '.join(FORMATS)}{hint}")
    chosen = FORMATS[name]
    if kind not in chosen.writers:
        supported = " or ".join(KINDS[each] for each in chosen.writers)
        fitting = [other for other, each in FORMATS.items() if kind in each.writers]
        raise UserError(
            f"{model}: is {KINDS[kind]}, and --format {name} supports {supported} only; export its tower (--model {tower}), "
            f"or all of it with --format {' or '.join(fitting)}"
        )
    dtype = dtype or chosen.dtypes[0]
    if dtype not in chosen.dtypes:
        raise UserError(f"--dtype {dtype}: --format {name} supports {' or '.join(chosen.dtypes)}")
    if absent := [package for package in chosen.needs if find_spec(package) is None]:
        raise UserError(f"--format {name} needs {' and '.join(absent)}: pip install 'sparse-vlm[export]'")
    return chosen, dtype
