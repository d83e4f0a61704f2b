"""`python tools/profile_tower.py --model tiny`: where the time of a tower goes, by operation, beside what the machine can do.

Notable: the tower's own forward pass is timed, by hooks on its modules and by wrapping the functions that it calls, so nothing here can
drift from what it does. An operation's time is its own: what others take inside of it is theirs. What remains is "the rest": residual
additions, the CLS token, and what Python does in between. Times that are spent in clocks and hooks fall on the whole, which is therefore
also measured without them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import product
from typing import Annotated, Any

import torch
import typer
from experiments import as_program
from speed_ratios import DTYPES
from torch import nn

from sparse_vlm.bench.machine import COPIED_BYTES, describe, peaks, versions
from sparse_vlm.bench.timing import MIN_REPEATS, WARM_UP
from sparse_vlm.bench.vision import load_visions
from sparse_vlm.errors import UserError
from sparse_vlm.kernels.cpu import native
from sparse_vlm.tower import SparseFormer, compiled, layers, prepared
from sparse_vlm.tower.cost import Work, count_operations
from sparse_vlm.tower.focus import Focus
from sparse_vlm.utils.files import write_json

REST = "the rest"
# Operations by the last names of the module that carries them out, the longest that fits.
BY_MODULE = {
    "feat_extractor": "early convolution",
    "focus": "focus",
    "glance": "glance",
    "glance.norm_pre": "norms",
    "roi_offset_module": "points",
    "generate": "parameter generation",
    "out_proj": "output projection",
    "adaptive_mixing.parameter_generator": "parameter generation",
    "adaptive_mixing": "mixing",
    "pe_transition": "position injection",
    "roi_adjust_module": "RoI adjusting",
    "attn": "attention",
    "mlp": "MLP",
    "norm1": "norms",
    "norm2": "norms",
    "norm": "norms",
    "pool": "head",
    "proj": "head",
}
# Operations by the function that carries them out, and where it is looked up.
PLAIN = {
    "sample_bilinear": "sampling",
    "points_in_rois": "points",
    "standardize_offsets": "points",
    "encode_rois": "position injection",
    "adjust_rois": "RoI adjusting",
}
BY_FUNCTION = [
    *((home, name, operation) for home, (name, operation) in product((layers, prepared), PLAIN.items()) if hasattr(home, name)),
    (Focus, "place", "focus"),
    (compiled.CompiledFocus, "place", "focus"),
    (native, "sample_and_mix", "mixing"),  # sampling as well
    (native, "adjust_rois", "RoI adjusting"),
    (native.Points, "__call__", "points"),
    (native.Positions, "__call__", "position injection"),
    (native.Attention, "__call__", "attention"),  # with its norm, as the MLP
    (native.Mlp, "__call__", "MLP"),
]


class Clock:
    """Seconds of each operation of one forward pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[list[Any]] = []  # [operation, when it began, seconds of others within]

    def begin(self, operation: str) -> None:
        """An operation begins, within the one that is open."""
        self._open.append([operation, time.perf_counter(), 0.0])

    def end(self) -> None:
        """The operation that began last ends."""
        operation, began, within = self._open.pop()
        taken = time.perf_counter() - began
        self.seconds[operation] = self.seconds.get(operation, 0.0) + taken - within
        if self._open:
            self._open[-1][2] += taken


@contextmanager
def clocked(tower: SparseFormer) -> Iterator[Clock]:
    """A clock that forward passes of a tower set in motion."""
    clock, hooks, functions = Clock(), [], []

    def wrapped(function: Callable[..., Any], operation: str) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.begin(operation)
            try:
                return function(*args, **kwargs)
            finally:
                clock.end()

        return call

    for name, module in tower.named_modules():
        operation = _operation(name, module, tower)
        if operation is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, operation=operation: clock.begin(operation), prepend=True))
            hooks.append(module.register_forward_hook(lambda *_: clock.end()))
    for home, name, operation in BY_FUNCTION:
        function = getattr(home, name)
        functions.append((home, name, function))
        setattr(home, name, wrapped(function, operation))
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()
        for home, name, function in functions:
            setattr(home, name, function)


def _operation(name: str, module: nn.Module, tower: SparseFormer) -> str | None:
    """What a module's own time counts as; None where it counts as that of the module that holds it."""
    if module is tower:
        return REST
    if name.startswith(("focus.", "pool.")) or name.endswith("attn.proj"):
        return None
    if isinstance(module, nn.Sequential) and name.count(".") == 1:
        return "transition"
    parts = name.split(".")
    return next((BY_MODULE[key] for key in (".".join(parts[-2:]), parts[-1]) if key in BY_MODULE), None)


def profile(
    names: Sequence[str], dtype: str, batch: int = 1, rounds: int = 15, optimized: bool = False, copied_bytes: int = COPIED_BYTES
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Time towers on the CPU, operation by operation, in turn, with the threads of this process.

    Args:
        names: towers, as `load_visions` takes them.
        dtype: a key of `DTYPES`.
        rounds: forward passes of each tower, with a clock and without, after a warm-up.
        optimized: fold the towers for inference before.
        copied_bytes: what the memory's peak is measured on.

    Returns:
        The machine's peaks, and for each tower `ms` and `whole_ms` (with a clock and without) and `operations`, each with median `ms`,
        `macs` and `bytes` of the batch and their shares of the peaks (None where the tower's arithmetic leaves it out).

    Raises:
        UserError: an unknown name, one that is no tower of ours, or fewer rounds than make a median.
    """
    if rounds < MIN_REPEATS:
        raise UserError(f"--rounds is {rounds}; a median needs {MIN_REPEATS} at least")
    visions = {vision.name: vision for vision in load_visions(names)}
    for name, vision in visions.items():
        if not isinstance(vision.module, SparseFormer):
            raise UserError(f"--model {name}: a teacher's operations are not ours to take apart; name a tower or a baseline")
        vision.module.to(DTYPES[dtype])
        if optimized:
            vision.optimize()
    peak = peaks(DTYPES[dtype], torch.device("cpu"), copied_bytes)
    whole: dict[str, list[float]] = {name: [] for name in visions}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in visions}
    for turn in range(WARM_UP + rounds):
        for name, vision in visions.items():
            tower = vision.module
            pixels = torch.randn(batch, 3, vision.size, vision.size, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
            with torch.inference_mode():
                began = time.perf_counter()
                tower(pixels)
                seconds = time.perf_counter() - began
                with clocked(tower) as clock:
                    tower(pixels)
            if turn >= WARM_UP:
                whole[name].append(seconds)
                parts[name].append(clock.seconds)
    found = []
    for name, vision in visions.items():
        work = count_operations(vision.module.config)
        operations = [_described(operation, parts[name], work.get(operation), batch, peak) for operation in _longest(parts[name])]
        found.append({
            "model": name, "dtype": dtype, "batch": batch, "optimized": optimized, "whole_ms": 1000 * statistics.median(whole[name]),
            "ms": 1000 * statistics.median(sum(each.values()) for each in parts[name]), "operations": operations,
        })  # fmt: skip
    return peak, found


def _longest(rounds: Sequence[dict[str, float]]) -> list[str]:
    """Operations, those that take longest first and what remains last."""
    return sorted(rounds[0], key=lambda name: (name == REST, -statistics.median(each[name] for each in rounds)))


def _described(name: str, rounds: Sequence[dict[str, float]], work: Work | None, batch: int, peak: dict[str, Any]) -> dict[str, Any]:
    seconds = statistics.median(each[name] for each in rounds)
    row: dict[str, Any] = {"operation": name, "ms": 1000 * seconds, "macs": None, "bytes": None, "of_macs": None, "of_bytes": None}
    if work is not None:
        macs, moved = batch * work.macs, work.bytes(batch, DTYPES[peak["dtype"]].itemsize)
        row |= {"macs": macs, "bytes": moved}
        row |= {"of_macs": macs / seconds / peak["macs_per_second"], "of_bytes": moved / seconds / peak["bytes_per_second"]}
    return row


def as_table(peak: dict[str, Any], model: dict[str, Any]) -> str:
    """Markdown of one tower."""
    form = ", optimized" if model["optimized"] else ""
    title = (
        f"{model['model']}{form}, {model['dtype']}, batch of {model['batch']}: {model['whole_ms']:.1f} ms, {model['ms']:.1f} with clocks"
    )
    at_best = f"{peak['macs_per_second'] / 1e9:,.0f} GMAC/s and {peak['bytes_per_second'] / 1e9:,.1f} GB/s"
    lines = [f"{title} (the machine's best: {at_best})", "", "| operation | ms | share | GMACs | MB | of peak MAC/s | of peak bytes/s |"]
    lines.append("|---|" + "---:|" * 6)
    for row in model["operations"]:
        cells = [row["operation"], f"{row['ms']:.2f}", f"{row['ms'] / model['ms']:.0%}"]
        if row["macs"] is None:
            cells += [""] * 4
        else:
            cells += [f"{row['macs'] / 1e9:.3f}", f"{row['bytes'] / 1e6:.1f}", f"{row['of_macs']:.0%}", f"{row['of_bytes']:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(
    model: Annotated[
        list[str], typer.Option(help="A tower: a folder, a name of the zoo, or a baseline such as sparseformer-b; repeat it.")
    ],
    dtype: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeat it. Both unless given.")] = None,
    batch: Annotated[int, typer.Option(help="Images at once.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Forward passes of each tower, of which the median counts.")] = 15,
    optimized: Annotated[bool, typer.Option("--optimized", help="Fold the towers for inference before.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - is stdout, instead of tables.")] = None,
) -> None:
    """Where the time of towers goes on this machine's processor."""
    if unknown := set(dtype or ()) - set(DTYPES):
        raise UserError(f"--dtype {sorted(unknown)[0]}: known are {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    measured = [profile(model, name, batch, rounds, optimized) for name in dict.fromkeys(dtype or DTYPES)]
    data = {"format": "sparse-vlm/profile/1", "machine": describe(torch.device("cpu")), "versions": versions()}
    data |= {"peaks": [peak for peak, _ in measured], "models": [row for _, found in measured for row in found]}
    if json_file is not None:
        write_json(json_file, data)
    if json_file != "-":
        sys.stdout.write("\n".join(as_table(peak, row) for peak, found in measured for row in found))


if __name__ == "__main__":
    as_program(main, "profile")
