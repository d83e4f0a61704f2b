"""How fast bootstrapping is on the machine at hand, and where a step's time goes.

    python tools/bootstrap_speed.py --recipe elastic --teacher local-dir:build/teacher --data 'photos/*.tar' --threads 1

Notable: the parts of a step are timed one after the other, as the Trainer carries them out: reading a batch of views, asking the teacher
(once a view, where answers are cached), the student forward and backward, and the optimizer with clipping and averaging. Then teacher and
student once more in a row: on a GPU a part begins while the one before is still computed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from experiments import as_program
from scaling import view_cost

from sparse_vlm.bench.machine import describe, peaks, synchronize, versions
from sparse_vlm.distill.inherit import inherit
from sparse_vlm.distill.live import LiveTeacher
from sparse_vlm.distill.loss import Distillation, Statistics, update_average
from sparse_vlm.distill.recipes import changed, get_recipe
from sparse_vlm.distill.resident import ResidentPhotos
from sparse_vlm.distill.views import ViewSet
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import PhotoSet
from sparse_vlm.teachers import Teacher, load_teacher
from sparse_vlm.teachers.load import read_open_clip
from sparse_vlm.tower import SparseFormer
from sparse_vlm.train.batches import Augmentation, LiveViews, ResidentViews, collate
from sparse_vlm.train.distillation import adamw, compile_parts, groups_of
from sparse_vlm.utils.devices import native_dtype, own_device, set_cpu_threads, training_attention
from sparse_vlm.utils.files import write_json

PARTS = {
    "photos": "decode, crop, scale; --resident: crop and scale on the device",
    "teacher": "once a view, where its answers are cached",
    "forward": "student and objective",
    "backward": "student",
    "optimizer": "clipping, AdamW, averaging",
}
RATES = {
    "cached": "teacher's answers cached",
    "live": "teacher asked at every step",
    "in_a_row": "teacher and student in a row, photos there, nobody waiting in between",
}
IN_A_ROW = 3
WARM_UP = 2  # the first compiles


def teacher_of(name: str) -> Teacher:
    """As of `load_teacher`, and `random:MODEL`: open_clip's model of that name with random weights, which time does not depend on.

    Raises:
        UserError: open_clip knows no such model.
    """
    if not name.startswith("random:"):
        return load_teacher(name)
    import open_clip

    model = name.removeprefix("random:")
    if model not in open_clip.list_models():
        raise UserError(f"--teacher {name}: open_clip knows no model called {model}; ViT-B-16-quickgelu is one")
    return read_open_clip(name, open_clip.create_model(model))


class Step:
    """A step of bootstrapping in parts, each a call that takes what the one before returned.

    Args:
        batch: views of a step.
        resident, compiled: as `sparse-vlm bootstrap` has them.
    """

    def __init__(
        self,
        recipe: str,
        changes: list[str],
        teacher: str,
        data: list[str],
        batch: int | None,
        resident: bool = False,
        compiled: bool = False,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.recipe = changed(get_recipe(recipe), changes)
        if not self.recipe.views:
            raise UserError(f"--recipe {recipe}: trains nothing")
        source = teacher_of(teacher)
        self.batch, self.device = batch or self.recipe.batch_size, own_device()
        self.bf16 = native_dtype(self.device) == torch.bfloat16
        self.cost = view_cost(self.recipe, source.spec)
        tower = SparseFormer(self.recipe.config(source.spec))
        mapping = inherit(tower, source, self.recipe)
        views = ViewSet(PhotoSet(data), 2, source.spec.image_size, seed)
        rows = range(len(views.photos), len(views))  # of the second view: a random crop
        photos = ResidentPhotos(views, self.device) if resident else None
        size = tower.config.image_size
        self._batches = LiveViews(views, rows, size) if photos is None else ResidentViews(views, photos, rows)
        self._show = Augmentation(size, views.size, photos, self.recipe.mixed, seed)
        self._ask = LiveTeacher(source, None if tower.config.budgets else tower.initial_roi.weight.detach(), self.device)
        if compiled:
            compile_parts(tower, self._ask)
        width = source.spec.embed_dim
        known = Statistics(torch.zeros(width), torch.zeros(source.spec.width), torch.eye(width), torch.tensor(1.0))
        weights = self.recipe.dense_weight, self.recipe.whitened
        self._model = Distillation(tower, known, *weights).to(self.device)
        self._optimizer = adamw(groups_of(tower, mapping, self.recipe))
        self._average = {name: p.detach().clone() for name, p in tower.named_parameters()}
        self._next = 0
        self.calls: dict[str, Callable[[Any], Any]] = dict(
            zip(PARTS, (self.photos, self._teacher, self._forward, self._backward, self._optimize), strict=True)
        )

    def photos(self, nothing: None) -> dict[str, torch.Tensor]:
        rows = range(self._next, self._next + self.batch)
        self._next += self.batch
        batch = collate([self._batches[row % len(self._batches)] for row in rows])
        return self._show({name: value.to(self.device) for name, value in batch.items()}, self._next // self.batch)

    def _teacher(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embeds, tokens = self._ask(batch.get("teacher_pixels", batch["pixels"]))
        return {"pixels": batch["pixels"], "embeds": embeds, "tokens": tokens}

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self._model(**inputs)["loss"]

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _optimize(self, nothing: None) -> None:
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        update_average(self._average, self._model.tower, self.recipe.ema)

    def learn(self, batch: dict[str, torch.Tensor]) -> None:
        """A step on photos that are there, each part beginning as soon as it can."""
        with training_attention(self.device):
            self._optimize(self._backward(self._forward(self._teacher(batch))))

    def run(self) -> dict[str, float]:
        """One step; seconds of each part."""
        state, seconds = None, {}
        with training_attention(self.device):
            for name, call in self.calls.items():
                synchronize(self.device)
                began = time.perf_counter()
                state = call(state)
                synchronize(self.device)
                seconds[name] = time.perf_counter() - began
        return seconds


def measure(step: Step, rounds: int) -> dict[str, Any]:
    """Milliseconds a view of each part, views a second, and shares of the machine's peak; medians of `rounds` steps after a first one."""
    taken = [step.run() for _ in range(WARM_UP + rounds)][WARM_UP:]
    ms = {part: 1000 * statistics.median(seconds[part] for seconds in taken) / step.batch for part in PARTS}
    peak = peaks(native_dtype(step.device), step.device)
    student = ms["forward"] + ms["backward"] + ms["optimizer"]
    batch, taken = step.photos(None), []
    for _ in range(rounds):
        synchronize(step.device)
        began = time.perf_counter()
        for _ in range(IN_A_ROW):
            step.learn(batch)
        synchronize(step.device)
        taken.append((time.perf_counter() - began) / IN_A_ROW)
    together = 1000 * statistics.median(taken) / step.batch
    work = {
        "student": (step.cost.student, student),
        "teacher": (step.cost.teacher, ms["teacher"]),
        "both, in a row": (step.cost.student + step.cost.teacher, together),
    }
    return {
        "batch": step.batch,
        "rounds": rounds,
        "ms": ms | {"in_a_row": together},
        "views_per_second": {
            "cached": 1000 / (ms["photos"] + student),
            "live": 1000 / (ms["teacher"] + ms["photos"] + student),
            "in_a_row": 1000 / together,
        },
        "gmacs": {who: macs / 1e9 for who, (macs, _) in work.items()},
        "share_of_peak": {who: 1000 * macs / each / peak["macs_per_second"] for who, (macs, each) in work.items()},
        "peak": peak,
    }


def table(document: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| part | what | ms a view |", "|---|---|---:|"]
    lines += [f"| {part} | {what} | {document['ms'][part]:.3g} |" for part, what in PARTS.items()]
    for name, what in RATES.items():
        lines.append(f"| views/s | {what} | {document['views_per_second'][name]:.3g} |")
    for who, share in document["share_of_peak"].items():
        lines.append(f"| {who}: share of peak | {document['gmacs'][who]:.2f} GMACs a view | {share:.0%} |")
    return "\n".join(lines) + "\n"


def main(
    teacher: Annotated[str, typer.Option(help="As of sparse-vlm bootstrap, or random:MODEL of open_clip, as random:ViT-B-16-quickgelu.")],
    data: Annotated[list[str], typer.Option(help="As of sparse-vlm bootstrap.")],
    recipe: Annotated[str, typer.Option(help="As of sparse-vlm bootstrap.")] = "elastic",
    change: Annotated[list[str] | None, typer.Option("--set", help="As of sparse-vlm bootstrap.")] = None,
    batch: Annotated[int | None, typer.Option(help="Views of a step; the recipe's by default.", min=1)] = None,
    resident: Annotated[bool, typer.Option("--resident", help="As of sparse-vlm bootstrap.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="As of sparse-vlm bootstrap.")] = False,
    rounds: Annotated[int, typer.Option(help="Steps that count.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    keep_memory: Annotated[bool, typer.Option(help="Keep freed memory, as bootstrapping does.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time the parts of a step."""
    set_cpu_threads(threads, keep_memory)
    step = Step(recipe, change or [], teacher, data, batch, resident, compiled)
    document: dict[str, Any] = {"recipe": recipe, "changes": change or [], "keeps_memory": keep_memory}
    document |= {"resident": resident, "compiled": compiled}
    document |= {"machine": describe(step.device), "versions": versions()}
    document |= measure(step, rounds)
    if as_json:
        write_json("-", document)
    else:
        print(table(document), end="")


if __name__ == "__main__":
    as_program(main, "speed")
