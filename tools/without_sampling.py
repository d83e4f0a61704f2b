"""Remove sampling, mixing and RoI adjustment from a tower, to begin a student with `--set looks=0` from its other weights.

python tools/without_sampling.py --tower tiny --out build/tiny-without
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from experiments import as_program

from sparse_vlm import SparseFormer

REMOVED = {"SAMPLING_M", "ROI_ADJ"}


def without_sampling(
    tower: Annotated[str, typer.Option(help="A tower: folder or zoo name.")],
    out: Annotated[Path, typer.Option(help="Folder of the smaller tower.")],
) -> None:
    """Write the smaller tower."""
    whole = SparseFormer.from_pretrained(tower)
    units = tuple(replace(unit, ops=tuple(op for op in unit.ops if op not in REMOVED)) for unit in whole.config.units)
    part, weights = SparseFormer(replace(whole.config, units=units)), whole.state_dict()
    part.load_state_dict({name: weights[name] for name in part.state_dict()})
    part.save_pretrained(out)


if __name__ == "__main__":
    as_program(without_sampling, "tools/without_sampling.py")
