"""`python tools/speed_ratios.py`: how long our towers take beside ViTs, as ratios of times that were taken in turn in one process.

Notable: weights of ViTs and of the published SparseFormers are random, because a time does not depend on them, and `tiny` comes with the
package; so the command needs nothing else. Both sides are what `sparse_vlm.bench.vision` makes, our own classes, up to the tokens that a
language model is given, and both are of one form: plain, or after `optimize_for_inference`, which a ViT gains from as well.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer
from experiments import as_program

from sparse_vlm.bench.machine import describe, versions
from sparse_vlm.bench.timing import MIN_REPEATS, TimedCall, time_interleaved
from sparse_vlm.bench.vision import Vision, load_visions
from sparse_vlm.errors import UserError
from sparse_vlm.utils.files import write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = ("plain", "optimized")


@dataclass(frozen=True)
class Comparison:
    """Whose time is divided by whose, and what it should not exceed.

    Attributes:
        model, rival: as `load_visions` takes them.
        target: the largest ratio of milliseconds that we are content with.
    """

    model: str
    rival: str
    target: float


COMPARISONS = (
    Comparison("sparseformer-b", "clip-b32", 1.0),
    Comparison("sparseformer-b", "clip-b16", 0.25),
    Comparison("tiny", "vit-s14", 0.2),
    Comparison("adaptive-s", "uniform-s", 1.08),
)
# what a plain ViT of 49 tokens takes beside one of more: of tiny, which keeps all its teacher's blocks and looks as well, the least
PLAIN = (Comparison("clip-b32", "clip-b16", 0.25), Comparison("vit-s32", "vit-s14", 0.2))


@dataclass(frozen=True)
class Ratio:
    """A comparison as it was measured.

    Attributes:
        model_ms, rival_ms: medians for a batch.
        ratio, low, high: median and quartiles of the ratio of both times in one round.
        rounds: that both took part in.
        form: of both, one of `FORMS`.
    """

    model: str
    rival: str
    target: float
    dtype: str
    batch: int
    threads: int
    model_ms: float
    rival_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    form: str = "optimized"

    @property
    def holds(self) -> bool:
        """Whether the median is within the target."""
        return self.ratio <= self.target


def ratios(
    comparisons: Sequence[Comparison] = COMPARISONS,
    dtypes: Sequence[str] = tuple(DTYPES),
    batches: Sequence[int] = (1, 8),
    rounds: int = 10,
    limit_s: float = 10.0,
    forms: Sequence[str] = ("optimized",),
) -> list[Ratio]:
    """Time both sides of comparisons on the CPU, all models in turn, with the threads of this process.

    Args:
        dtypes: keys of `DTYPES`.
        batches: numbers of images; they are noise, because a time does not depend on them either.
        rounds: turns of each model after the warm-up.
        limit_s: a model that took so many seconds takes no more turns than it must.
        forms: of `FORMS`.

    Returns:
        One for each dtype, batch, form and comparison, in this order.

    Raises:
        UserError: a name that `load_visions` does not know, or fewer rounds than make a median.
    """
    if rounds < MIN_REPEATS:
        raise UserError(f"--rounds is {rounds}; a median needs {MIN_REPEATS} at least")
    names = list(dict.fromkeys(name for comparison in comparisons for name in (comparison.model, comparison.rival)))
    found = []
    for dtype in dtypes:
        visions = {(form, vision.model): _in_form(vision, form, DTYPES[dtype]) for form in forms for vision in load_visions(names)}
        for batch in batches:
            pieces = {key: _piece(vision, batch, DTYPES[dtype]) for key, vision in visions.items()}
            time_interleaved(list(pieces.values()), torch.device("cpu"), rounds, limit_s)
            found += [_ratio(comparison, pieces, form, dtype, batch) for form in forms for comparison in comparisons]
    return found


def _in_form(vision: Vision, form: str, dtype: torch.dtype) -> Vision:
    vision.module.to(dtype)
    if form == "optimized":
        vision.optimize()
    return vision


def _piece(vision: Vision, batch: int, dtype: torch.dtype) -> TimedCall:
    pixels = torch.randn(batch, 3, vision.size, vision.size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return TimedCall("tower", [(lambda _: vision.encode(pixels), 1.0)], vision.model, batch=batch)


def _ratio(comparison: Comparison, pieces: dict[tuple[str, str], TimedCall], form: str, dtype: str, batch: int) -> Ratio:
    ours, theirs = pieces[form, comparison.model].seconds, pieces[form, comparison.rival].seconds
    each = [mine / other for mine, other in zip(ours, theirs, strict=False)]  # a slow model may have been spared the last rounds
    low, median, high = statistics.quantiles(each, n=4)
    ours_ms, theirs_ms = (1000 * statistics.median(seconds) for seconds in (ours, theirs))
    return Ratio(
        **asdict(comparison), form=form, dtype=dtype, batch=batch, threads=torch.get_num_threads(),
        model_ms=ours_ms, rival_ms=theirs_ms, ratio=median, low=low, high=high, rounds=len(each),
    )  # fmt: skip


def as_table(found: Iterable[Ratio]) -> str:
    """Markdown."""
    heads = ["model", "beside", "form", "dtype", "batch", "ms", "its ms", "ratio [quartiles]", "target", "holds"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|---|" + "---:|" * 5 + "---|"]
    for r in found:
        spread = f"{r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]"
        cells = [r.model, r.rival, r.form, r.dtype, str(r.batch), f"{r.model_ms:.1f}", f"{r.rival_ms:.1f}", spread, f"{r.target:g}"]
        lines.append("| " + " | ".join([*cells, "yes" if r.holds else "no"]) + " |")
    return "\n".join(lines) + "\n"


def document(found: Iterable[Ratio]) -> dict[str, Any]:
    """Plain data, with the machine and the versions that it was measured with."""
    return {
        "format": "sparse-vlm/ratios/1",
        "machine": describe(torch.device("cpu")),
        "versions": versions(),
        "ratios": [asdict(ratio) | {"holds": ratio.holds} for ratio in found],
    }


def main(
    beside: Annotated[list[str] | None, typer.Option(help="Rivals to compare with; repeat it. All unless given.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeat it. Both unless given.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at once; repeat it. 1 and 8 unless given.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.", min=1)] = None,
    form: Annotated[list[str] | None, typer.Option(help="plain or optimized, of both sides; repeat it. Both unless given.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each model after the warm-up, of which the median counts.")] = 10,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Times of our towers by those of ViTs on this machine, taken in turn."""
    rivals = [comparison.rival for comparison in COMPARISONS]
    for option, given, known in (("beside", beside, rivals), ("dtype", dtype, DTYPES), ("form", form, FORMS)):
        if unknown := set(given or ()) - set(known):
            raise UserError(f"--{option} {sorted(unknown)[0]}: known are {', '.join(known)}")
    if threads:
        torch.set_num_threads(threads)
    compared = [comparison for comparison in (*COMPARISONS, *PLAIN) if comparison.rival in (beside or rivals)]
    found = ratios(compared, dtype or tuple(DTYPES), batch or (1, 8), rounds, forms=form or FORMS)
    if json_:
        write_json("-", document(found))
    else:
        sys.stdout.write(as_table(found))


if __name__ == "__main__":
    as_program(main, "ratios")
