"""The ablation of bootstrapping: each row is one command, each seed one run; what is there already is not run again.

    python tools/ablation.py --teacher local-dir:build/teacher --data 'photos/*.tar' --only objective --seed 0 --seed 1
    python tools/ablation.py --teacher local-dir:build/teacher --data 'photos/*.tar' --table    # of what is finished

Notable: all rows learn from the same views, as many of them; a row differs from its reference in what its name says, a recipe of its own
also in rate and numbers of tokens. A run that was interrupted goes on where it stopped. What is finished is kept in one json, which is
enough to go on without the runs' folders. The table is Markdown: mean over seeds of the held-out centred cosine, its spread, and how far it
is from the reference of the same seeds.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from experiments import FinishedRuns, as_program, carry_out

from sparse_vlm.errors import UserError
from sparse_vlm.tower import SparseFormerConfig
from sparse_vlm.tower.cost import count_macs


@dataclass(frozen=True)
class AblationRow:
    """One row: a recipe and what is changed of it."""

    group: str
    name: str
    recipe: str = "elastic"
    changes: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """Its folder's name."""
        return "-".join([self.recipe, *self.changes]).replace("=", "")


ROWS = (
    AblationRow("reference", "elastic"),
    AblationRow("looks", "no looks", changes=("looks=0",)),
    AblationRow("looks", "two looks", changes=("looks=2",)),
    AblationRow("objective", "final representation alone", changes=("dense_weight=0",)),
    AblationRow("objective", "tokens count twice as much", changes=("dense_weight=1",)),
    AblationRow("objective", "half of the embedding's after whitening", changes=("whitened=0.5",)),
    AblationRow("beginning", "the paper's random focusing part", recipe="tiny-focus"),
    AblationRow("beginning", "the same, twin initial RoIs", recipe="tiny-focus-twins"),
    AblationRow("beginning", "averages of patch embeddings", recipe="tiny-pool"),
    AblationRow("blocks", "last third frozen", changes=("frozen=4",)),
    AblationRow("blocks", "last two thirds frozen", changes=("frozen=8",)),
    AblationRow("blocks", "first two blocks dropped", changes=("dropped=2",)),
    AblationRow("blocks", "first four blocks dropped", changes=("dropped=4",)),
    AblationRow("points", "4 sampling points", changes=("points=4",)),
    AblationRow("points", "36 sampling points", changes=("points=36",)),
    AblationRow("resolution", "288 pixels", changes=("resolution=288",)),
    AblationRow("resolution", "336 pixels", changes=("resolution=336",)),
    AblationRow("tokens", "9 tokens alone", changes=("tokens=9",)),
    AblationRow("tokens", "25 tokens alone", changes=("tokens=25",)),
    AblationRow("tokens", "49 tokens alone", changes=("tokens=49",)),
    AblationRow("tokens", "64 tokens alone", changes=("tokens=64",)),
    AblationRow("rate", "half the rate", changes=("lr=7e-4",)),
    AblationRow("rate", "twice the rate", changes=("lr=2.8e-3",)),
)

BASE = ("dense_weight=0.5", "whitened=0")  # of every row that does not change them, as they were of all recipes before this table


def command(row: AblationRow, seed: int, teacher: str, data: list[str], views: int, out: Path) -> list[str]:
    """The row's one command."""
    line = ["sparse-vlm", "bootstrap", "--recipe", row.recipe, "--teacher", teacher]
    for pattern in data:
        line += ["--data", pattern]
    for change in (*BASE, *row.changes):  # a later change counts
        line += ["--set", change]
    return [*line, "--set", "views_per_photo=1", "--views", str(views), "--seed", str(seed), "--out", str(out / f"{row.slug}-seed{seed}")]


@dataclass(frozen=True)
class Outcome:
    """A finished run: held-out centred cosines of embedding and tokens, and what the student costs."""

    cosine: float
    token_cosine: float
    gmacs: float


class Outcomes:
    """What is finished, by row and seed: kept in `results.json`, and read from runs' folders.

    Args:
        out: folder of the runs.
        views: that each run learns from.

    Raises:
        UserError: `results.json` is of runs of another length.
    """

    def __init__(self, out: Path, views: int) -> None:
        self.out, self._finished = out, FinishedRuns(out / "results.json", {"views": views})

    def of(self, row: AblationRow, seed: int) -> Outcome | None:
        """A run's outcome, or None while it is not finished."""
        name = f"{row.slug}-seed{seed}"
        path = self.out / name / "training.json"
        if name not in self._finished.runs and path.exists():
            last = [entry for entry in json.loads(path.read_text())["history"] if "eval_cosine" in entry][-1]
            config = SparseFormerConfig.from_dict(json.loads((self.out / name / "config.json").read_text()))
            self._finished.add(name, vars(Outcome(last["eval_cosine"], last["eval_token_cosine"], count_macs(config).total / 1e9)))
        return Outcome(**self._finished.runs[name]) if name in self._finished.runs else None


def table(rows: tuple[AblationRow, ...], seeds: list[int], outcomes: Outcomes) -> str:
    """Markdown: GMACs of the student, and of the seeds that are finished mean, spread (largest minus smallest) and the mean difference to
    the reference of the same seeds."""
    columns = ["", "row", "changed", "GMACs", "seeds"]
    for side in ("embedding", "tokens"):
        columns += [side, "spread", "to reference"]
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|" + "---:|" * (len(columns) - 3)]
    for row in rows:
        known = {seed: outcome for seed in seeds if (outcome := outcomes.of(row, seed))}
        cells = [""] * 7
        if known:
            cells = [f"{next(iter(known.values())).gmacs:.2f}"]
            for side in ("cosine", "token_cosine"):
                each = [getattr(outcome, side) for outcome in known.values()]
                reference = {seed: outcomes.of(rows[0], seed) for seed in known}
                paired = [getattr(known[seed], side) - getattr(other, side) for seed, other in reference.items() if other]
                cells += [f"{statistics.fmean(each):.3f}", f"{max(each) - min(each):.3f}" if len(each) > 1 else ""]
                cells.append(f"{statistics.fmean(paired):+.3f}" if paired and row is not rows[0] else "")
        changed = ", ".join([f"`--recipe {row.recipe}`", *(f"`--set {change}`" for change in row.changes)])
        lines.append(f"| {row.group} | {row.name} | {changed} | {cells[0]} | {len(known)} | {' | '.join(cells[1:])} |")
    return "\n".join(lines) + "\n"


def main(
    teacher: Annotated[str, typer.Option(help="As of sparse-vlm bootstrap.")],
    data: Annotated[list[str], typer.Option(help="As of sparse-vlm bootstrap.")],
    only: Annotated[list[str] | None, typer.Option(help="Groups of rows; repeat it. All unless given.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; repeat it. [default: 0, 1, 2]")] = None,
    views: Annotated[int, typer.Option(help="Views of each run.", min=32)] = 3200,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of results.json.")] = Path("build/ablation"),
    threads: Annotated[int, typer.Option(help="CPU threads of a run.", min=1)] = 1,
    show: Annotated[bool, typer.Option("--table", help="Print the table of what is finished, and stop.")] = False,
) -> None:
    """Run what is missing of the ablation, row by row, and print its table."""
    groups = {row.group for row in ROWS}
    if unknown := set(only or ()) - groups:
        raise UserError(f"--only {sorted(unknown)[0]}: no such group; there are {', '.join(dict.fromkeys(row.group for row in ROWS))}")
    rows = tuple(row for row in ROWS if not only or row.group in {*only, "reference"})
    seeds = seed or [0, 1, 2]
    outcomes = Outcomes(out, views)
    for number in seeds if not show else ():
        for row in rows:
            if outcomes.of(row, number):
                continue
            line = command(row, number, teacher, data, views, out)
            print(shlex.join(line), file=sys.stderr, flush=True)
            carry_out([*line, "--threads", str(threads)])
    print(table(rows, seeds, outcomes), end="")


if __name__ == "__main__":
    as_program(main, "ablation")
