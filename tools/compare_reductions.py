"""A tower against what others do to a ViT's tokens, at equal token count, LLM, data and seeds: each row is two stages and an evaluation.

    sparse-vlm bootstrap --recipe vit --teacher local-dir:build/teacher --out build/vit
    python tools/compare_reductions.py --vit build/vit --init build/read --data 'photos/*.tar' --eval-data ../shared/data --at-once 2

Notable: every row starts from the same LLM (`--init`, what the stage `read` made), sees the same samples in the same order, and answers
the same questions; it differs in tower and projector alone. A run that was interrupted goes on where it stopped, and what is finished
is not run again.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Annotated, Any

import typer
from experiments import FinishedRuns, as_program, carry_out

from sparse_vlm.errors import UserError
from sparse_vlm.tower import SparseFormer
from sparse_vlm.tower.cost import count_macs

TASKS = "captions,pope,aokvqa"
METRICS = {("captions", "CIDEr"): 100.0, ("pope", "accuracy"): 100.0, ("aokvqa", "accuracy"): 100.0}


@dataclass(frozen=True)
class Baseline:
    """One row: how an image becomes tokens. `tower` None stands for the whole ViT."""

    name: str
    what: str
    tower: str | None = None
    projector: str = "mlp"


BASELINES = (
    Baseline("tiny", "our tower", tower="tiny"),
    Baseline("pool", "the whole ViT, tokens averaged", projector="pool"),
    Baseline("stride", "the whole ViT, every so many tokens", projector="stride"),
    Baseline("shuffle", "the whole ViT, 2 x 2 tokens side by side", projector="shuffle"),
    Baseline("resampler", "the whole ViT, learned queries", projector="resampler"),
)


@dataclass(frozen=True)
class Plan:
    """What all rows share."""

    vit: str
    init: str
    data: tuple[str, ...]
    eval_data: str
    out: Path
    tokens: int
    align_steps: int
    samples: int
    threads: int

    def folder(self, baseline: Baseline, seed: int) -> Path:
        """Of a row's runs."""
        return self.out / f"{baseline.name}-seed{seed}"

    def commands(self, baseline: Baseline, seed: int) -> list[list[str]]:
        """The commands of a row, in order; the last one evaluates."""
        folder = self.folder(baseline, seed)
        data = [part for pattern in self.data for part in ("--data", pattern)]
        same = ["--seed", str(seed), "--threads", str(self.threads)]
        kind = [] if baseline.projector == "mlp" else ["--projector", baseline.projector]
        # the stage before has no projector worth keeping
        tower = ["--tower", baseline.tower or self.vit, "--tokens", str(self.tokens), *kind]
        align = ["train", "--stage", "align", "--init", self.init, *tower, *data, "--max-steps", str(self.align_steps)]
        learn = ["train", "--stage", "instruct", "--init", str(folder / "align"), *data, "--samples", str(self.samples)]
        judge = ["eval", "--model", str(folder / "chat"), "--tasks", TASKS, "--control", "none", "--data", self.eval_data]
        return [
            ["sparse-vlm", *align, *same, "--out", str(folder / "align")],
            ["sparse-vlm", *learn, *same, "--out", str(folder / "chat")],
            ["sparse-vlm", *judge, "--threads", str(self.threads), "--out", str(folder / "eval")],
        ]

    def tower_gmacs(self, baseline: Baseline) -> float:
        """What the tower of a row costs for an image, in billions of multiply-accumulates; its projector is not in it."""
        tower = SparseFormer.from_pretrained(baseline.tower or self.vit, num_tokens=self.tokens if baseline.tower else None)
        return count_macs(tower.config).total / 1e9

    def settings(self) -> dict[str, Any]:
        """What makes two runs comparable."""
        return {"tokens": self.tokens, "align_steps": self.align_steps, "samples": self.samples, "data": list(self.data)}


class Scores:
    """What is finished, by row and seed; kept in `results.json`.

    Raises:
        UserError: the file is of another plan.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.finished = plan, FinishedRuns(plan.out / "results.json", plan.settings())

    def has(self, baseline: Baseline, seed: int) -> bool:
        """Whether a row is finished."""
        return self.plan.folder(baseline, seed).name in self.finished.runs

    def take(self, baseline: Baseline, seed: int) -> None:
        """Read what an evaluation wrote."""
        folder = self.plan.folder(baseline, seed)
        report = json.loads((folder / "eval" / "report.json").read_text())
        rows = {row["task"]: row["metrics"] for row in report["results"] if row["control"] == "none"}
        self.finished.add(folder.name, {f"{task} {metric}": rows[task][metric]["value"] for task, metric in METRICS})

    def table(self, baselines: tuple[Baseline, ...], seeds: list[int]) -> str:
        """Markdown: mean over the finished seeds, and spread (largest minus smallest)."""
        names = [f"{task} {name}" for task, name in METRICS]
        lines = [f"| | what | tower, GMACs | seeds | {' | '.join(names)} |", "|---|---|---:|---:|" + "---:|" * len(names)]
        for baseline in baselines:
            known = [self.finished.runs[self.plan.folder(baseline, seed).name] for seed in seeds if self.has(baseline, seed)]
            cells = []
            for name, scale in zip(names, METRICS.values(), strict=True):
                each = [scale * run[name] for run in known]
                cells.append(f"{statistics.fmean(each):.1f} ({max(each) - min(each):.1f})" if each else "")
            cost = self.plan.tower_gmacs(baseline)
            lines.append(f"| {baseline.name} | {baseline.what} | {cost:.2f} | {len(known)} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def run(scores: Scores, baseline: Baseline, seed: int, log: bool) -> None:
    """Carry out the commands of a row, and keep its scores.

    Args:
        log: whether what they print goes to a file in the row's folder.

    Raises:
        typer.Exit: one failed, or was interrupted.
    """
    for line in scores.plan.commands(baseline, seed):
        print(shlex.join(line), file=sys.stderr, flush=True)
        carry_out(line, scores.plan.folder(baseline, seed) / "log.txt" if log else None)
    scores.take(baseline, seed)


def main(
    vit: Annotated[str, typer.Option(help="The whole ViT as a tower: what the recipe vit made.")],
    init: Annotated[str, typer.Option(help="A VLM whose LLM every row starts from: what the stage read made.")],
    data: Annotated[list[str], typer.Option(help="As of sparse-vlm train.")],
    eval_data: Annotated[str, typer.Option(help="As --data of sparse-vlm eval.")],
    only: Annotated[list[str] | None, typer.Option(help="Rows; repeat it. All unless given.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; repeat it. [default: 0, 1, 2]")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens an image, of every row.", min=1)] = 49,
    align_steps: Annotated[int, typer.Option(help="Steps of the stage align.", min=1)] = 30,
    samples: Annotated[int, typer.Option(help="Photos of the stage instruct.", min=1)] = 960,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of results.json.")] = Path("build/comparison"),
    threads: Annotated[int, typer.Option(help="CPU threads of a run.", min=1)] = 1,
    at_once: Annotated[
        int, typer.Option(help="Rows that run beside each other, where one leaves the machine idle; each has its log.txt then.", min=1)
    ] = 1,
    show: Annotated[bool, typer.Option("--table", help="Print the table of what is finished, and stop.")] = False,
) -> None:
    """Run what is missing of the comparison, and print its table."""
    if unknown := set(only or ()) - {baseline.name for baseline in BASELINES}:
        raise UserError(f"--only {sorted(unknown)[0]}: no such row; there are {', '.join(baseline.name for baseline in BASELINES)}")
    baselines = tuple(baseline for baseline in BASELINES if not only or baseline.name in only)
    seeds = seed or [0, 1, 2]
    plan = Plan(vit, init, tuple(data), eval_data, out, tokens, align_steps, samples, threads)
    scores = Scores(plan)
    missing = [] if show else [(baseline, number) for number in seeds for baseline in baselines if not scores.has(baseline, number)]
    ended = Event()  # by a row that failed or an interrupt: a worker takes the next row before anybody is told

    def begin(baseline: Baseline, number: int) -> None:
        if ended.is_set():
            return
        try:
            run(scores, baseline, number, log=at_once > 1)
        except BaseException:
            ended.set()
            raise

    pool = ThreadPoolExecutor(at_once)
    try:
        for done in as_completed([pool.submit(begin, *row) for row in missing]):
            done.result()
    finally:
        ended.set()
        pool.shutdown()  # what runs already comes to its end and is kept, or was interrupted too
    print(scores.table(baselines, seeds), end="")


if __name__ == "__main__":
    as_program(main, "comparison")
