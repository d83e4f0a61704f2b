"""`make bench`: the ratios of `tools.speed_ratios` against those that were kept, and exit code 1 where one fell back.

A ratio has fallen back when its median is above its bound: the highest median of the runs that were kept, or as far above the middle of
their medians as upper quartiles commonly are (`MARGIN`, if that is more), so that one disturbed run loosens nothing. What seems to have
fallen back is measured once more, and counts only if it falls back again, so that what else a machine did for a moment fails nothing.

Notable: ratios depend on the machine as well, so each kind of it (instruction set, threads) has its own. On a kind that has none nothing
can fall back: the ratios are printed beside their targets, and the exit code is 0.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from experiments import as_program
from speed_ratios import COMPARISONS, Comparison, Ratio, as_table, ratios

from sparse_vlm.bench.machine import describe, versions
from sparse_vlm.errors import UserError
from sparse_vlm.utils.devices import native_dtype
from sparse_vlm.utils.files import write_text
from sparse_vlm.utils.schema import SIZE, check, read_json

FORMAT = "sparse-vlm/ratios-baseline/1"
AGAIN = "name a file that --renew wrote"
MARGIN = 0.05  # that medians of two runs of the same code may differ by
# rounds of each model, and the seconds after which it takes no more than it must: all of it takes less than three minutes
ROUNDS, LIMIT_S = 7, 4.0
RUNS = 5  # that are kept of a kind of machine, the last ones

Run = dict[str, list[float]]  # of each ratio lower quartile, median, upper quartile


@dataclass(frozen=True)
class Fallen:
    """A ratio above its bound."""

    ratio: Ratio
    bound: float

    def line(self) -> str:
        """For people."""
        return f"{title(self.ratio)}: the ratio is {self.ratio.ratio:.3f}, its bound {self.bound:.3f}"


def title(ratio: Ratio) -> str:
    """What a ratio is kept under."""
    return f"{ratio.model} by {ratio.rival}, {ratio.dtype}, batch {ratio.batch}"


def kind_of_machine() -> str:
    """What ratios depend on: instruction set and threads."""
    more = [("bf16", torch.cpu._is_avx512_bf16_supported), ("amx", getattr(torch.cpu, "_is_amx_tile_supported", lambda: False))]
    words = [platform.machine(), torch.backends.cpu.get_cpu_capability(), *(name for name, there in more if there())]
    return f"{' '.join(words)}, {torch.get_num_threads()} threads"


def bound(runs: Sequence[Run], name: str) -> float | None:
    """The largest median that is no falling back; None where no run holds this ratio."""
    kept = [run[name] for run in runs if name in run]
    if not kept:
        return None
    medians = [median for _, median, _ in kept]
    spread = statistics.median((high - median) / median for _, median, high in kept)
    return max(*medians, (1 + max(MARGIN, spread)) * statistics.median(medians))


def fallen(found: Sequence[Ratio], runs: Sequence[Run]) -> list[Fallen]:
    """The ratios above their bounds."""
    bounds = [(ratio, bound(runs, title(ratio))) for ratio in found]
    return [Fallen(ratio, most) for ratio, most in bounds if most is not None and ratio.ratio > most]


def measured(comparisons: Sequence[Comparison] = COMPARISONS, dtypes: Sequence[str] = (), batches: Sequence[int] = (1, 8)) -> list[Ratio]:
    """`ratios` in the dtypes that this machine multiplies in, unless told which: others would take minutes and say nothing."""
    native = ["float32", *(["bfloat16"] if native_dtype() == torch.bfloat16 else [])]
    return ratios(comparisons, dtypes or native, batches, ROUNDS, LIMIT_S)


def guard(runs: Sequence[Run], measure: Callable[..., list[Ratio]]) -> tuple[list[Ratio], list[Fallen]]:
    """Measure, and measure again what fell back.

    Args:
        runs: kept of this kind of machine.
        measure: `measured`, or what takes its place.

    Returns:
        All ratios as they were first measured, and those that fell back twice, as they were measured then.
    """
    found = measure()
    again: list[Ratio] = []
    for first in fallen(found, runs):
        one = first.ratio
        again += measure([Comparison(one.model, one.rival, one.target)], [one.dtype], [one.batch])
    return found, fallen(again, runs)


def read(path: Path) -> dict[str, Any]:
    """A file of kept ratios; an empty one where there is none.

    Raises:
        UserError: it is none of ours.
    """
    if not path.exists():
        return {"format": FORMAT, "machines": {}}
    kept = read_json(path, AGAIN)
    check(kept, {"format": str, "machines": {str: {"runs": [{str: [SIZE]}]}}}, f"--baseline {path}", AGAIN)
    if kept["format"] != FORMAT:
        raise UserError(f"--baseline {path}: format {kept['format']!r}, this version reads {FORMAT!r}; {AGAIN}")
    for machine in kept["machines"].values():
        for name, numbers in (pair for run in machine["runs"] for pair in run.items()):
            if len(numbers) != 3:
                raise UserError(f"--baseline {path}: {name} has {len(numbers)} numbers instead of two quartiles and a median; {AGAIN}")
    return kept


def keep(path: Path, found: Sequence[Ratio], add: bool) -> int:
    """Write down what was measured as what later runs are held to; how many runs are kept of this kind of machine then.

    Args:
        add: keep the runs before it as well.
    """
    kept = read(path)
    before = kept["machines"].get(kind_of_machine(), {"runs": []})["runs"] if add else []
    run = {title(ratio): [round(number, 4) for number in (ratio.low, ratio.ratio, ratio.high)] for ratio in found}
    about = {"processor": describe(torch.device("cpu"))["processor"], "versions": versions()}
    kept["machines"][kind_of_machine()] = {**about, "runs": [*before, run][-RUNS:]}
    write_text(path, json.dumps(kept, indent=1) + "\n")
    return len(kept["machines"][kind_of_machine()]["runs"])


def main(
    baseline: Annotated[Path, typer.Option(help="The file of the ratios that were kept.")] = Path("docs/ratios.json"),
    renew: Annotated[bool, typer.Option("--renew", help="Keep what is measured now instead of what was kept for this machine.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Keep what is measured now beside it.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.", min=1)] = None,
) -> None:
    """Measure the ratios that matter, and fail where one fell back."""
    if renew and add:
        raise UserError("--renew and --add: replace what was kept, or add to it, not both")
    if threads:
        torch.set_num_threads(threads)
    runs = read(baseline)["machines"].get(kind_of_machine(), {"runs": []})["runs"]
    if renew or add:
        found = measured()
        count = keep(baseline, found, add)
        sys.stdout.write(as_table(found) + f"kept in {baseline} for {kind_of_machine()}: {count} of at most {RUNS} runs\n")
        return
    found, worse = guard(runs, measured)
    sys.stdout.write(as_table(found))
    if not runs:
        sys.stdout.write(
            f"{baseline} holds no ratios of this kind of machine ({kind_of_machine()}), so none can fall back; --renew keeps these\n"
        )
        return
    for ratio in found:
        if bound(runs, title(ratio)) is None:
            sys.stdout.write(f"{title(ratio)}: not kept yet; --renew or --add keeps it\n")
    for one in worse:
        print(f"fell back: {one.line()}", file=sys.stderr)
    if worse:
        raise typer.Exit(1)
    sys.stdout.write(f"none of {len(found)} ratios fell back\n")


if __name__ == "__main__":
    as_program(main, "guard")
