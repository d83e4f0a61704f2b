"""Evaluate several models, with the teacher beside them, on every task, in one report.

    from sparse_vlm.eval import EvalConfig, evaluate

    report = evaluate(EvalConfig(models=["tiny"], tasks=["knn", "probe"], data="data"))

Notable: image tasks go to towers and the teacher, VLM tasks to models that answer in words, each once for every control. A column is a
model (and a control); the report holds a `Result` for each task and column.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sparse_vlm.bench.timing import TimedCall, time_interleaved
from sparse_vlm.errors import UserError
from sparse_vlm.eval.embedders import (
    Embedder,
    Features,
    TextSide,
    budget_name,
    teacher_embedder,
    text_side,
    tower_embedder,
)
from sparse_vlm.eval.metrics import Metric, difference, ratio
from sparse_vlm.eval.task import CONTROLS, TOWER_CONTROLS, Data, ImageTask, Result, Task, VLMTask
from sparse_vlm.eval.tasks import find_tasks
from sparse_vlm.teachers import is_teacher
from sparse_vlm.tower.config import serves_budgets
from sparse_vlm.utils.devices import own_device

Progress = Callable[[str, int, int], None]
TIMED_ROUNDS = 20


@dataclass(frozen=True)
class Column:
    """A model, and for VLM tasks the control it was run under."""

    model: str
    control: str | None = None  # of a VLM; a tower under a control has a name of its own

    @property
    def title(self) -> str:
        """Its heading in a table."""
        return self.model if self.control in (None, "none") else f"{self.model}, {self.control}"


@dataclass
class Report:
    """The results of an evaluation.

    Attributes:
        models: what each column's model is (kind, the model as the user gave it, tokens, cost), by name.
        teacher, text: names, where there is one.
        controls: what the controls of the run mean, by name.
        dtype: that the models compute in.
        results: by task and column.
    """

    models: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    teacher: str | None = None
    text: str | None = None
    limit: int | None = None
    controls: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    seconds: float = 0.0
    results: dict[str, dict[Column, Result]] = field(default_factory=dict)

    @property
    def columns(self) -> list[Column]:
        """The columns in the order of the run."""
        return list(dict.fromkeys(column for of_task in self.results.values() for column in of_task))

    def of_teacher(self, task: str, column: Column, name: str) -> Metric | None:
        """A metric relative to the teacher's, where the teacher has it."""
        if self.teacher is None or column.model == self.teacher:
            return None
        theirs = self.results[task].get(Column(self.teacher))
        return None if theirs is None else ratio(self.results[task][column].metrics[name], theirs.metrics[name])

    def over_control(self, task: str, column: Column, name: str) -> Metric | None:
        """For a control of a VLM: the metric with the photo itself, minus that with the control."""
        with_photo = self.results[task].get(Column(column.model, "none"))
        if column.control in (None, "none") or with_photo is None:
            return None
        return difference(with_photo.metrics[name], self.results[task][column].metrics[name])

    def pairs(self) -> list[tuple[Column, Column]]:
        """Every two models under the same control, in the order of the run."""
        return [(one, other) for one, other in itertools.combinations(self.columns, 2) if one.control == other.control]

    def paired(self, task: str, name: str, column: Column, over: Column) -> Metric | None:
        """How much more one model is worth than another in a metric, from the same resamples of the same photos; None where either was not
        measured."""
        of_task = self.results[task]
        if column not in of_task or over not in of_task:
            return None
        return difference(of_task[column].metrics[name], of_task[over].metrics[name])

    def summary(self, column: Column) -> dict[str, Any] | None:
        """A model's metrics relative to the teacher's: the mean over tasks of each task's mean, and the lowest.

        None where no task compares this column with the teacher.
        """
        shares = {
            (task, name): kept.value
            for task, of_task in self.results.items()
            if column in of_task
            for name in of_task[column].metrics
            if (kept := self.of_teacher(task, column, name)) is not None and kept.value == kept.value
        }
        if not shares:
            return None
        by_task: dict[str, list[float]] = {}
        for (task, _), value in shares.items():
            by_task.setdefault(task, []).append(value)
        lowest = min(shares, key=shares.__getitem__)
        average = sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)
        return {"average": average, "lowest": shares[lowest], "lowest_task": lowest[0], "lowest_metric": lowest[1]}


@dataclass(frozen=True)
class EvalConfig:
    """What is measured on which models.

    Attributes:
        models: folders or zoo names; towers for image tasks, VLMs for VLM tasks.
        tasks: keys of `sparse_vlm.eval.tasks.TASKS`, all for towers or all for VLMs.
        data: the folder that holds `eval/` and `train/`.
        teacher: measured beside the towers; `local-dir:PATH`, `hf-hub:ORG/NAME` or `MODEL@TAG`.
        text: the text side, a folder or zoo name; the teacher's own by default.
        controls: for VLM tasks keys of `CONTROLS`, all by default; for image tasks of `TOWER_CONTROLS`, where `none` is the default.
        limit: photos a set, 2 at least.
        budgets: token budgets that each model is measured at, for models that serve several; their own number by default, and for towers of
            one number beside them.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    data: str | Path
    teacher: str | None = None
    text: str | None = None
    controls: Sequence[str] = ()
    limit: int | None = None
    budgets: Sequence[int] = ()


def evaluate(
    config: EvalConfig,
    on_progress: Progress = lambda what, done, total: None,
    on_result: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run tasks on models.

    Args:
        on_progress: called with (what, done, total).
        on_result: called with the report so far whenever a task has been done for a column, so that what is finished outlives an error.

    Raises:
        UserError: an unknown task, model or control, tasks of both kinds, or something a task needs that was not given.
    """
    started = time.perf_counter()
    tasks = find_tasks(list(dict.fromkeys(config.tasks)))
    if config.limit is not None and config.limit < 2:
        raise UserError(f"--limit is {config.limit}; it must be at least 2")
    data = Data(Path(config.data), config.limit)
    for task in tasks.values():
        task.look_up(data)
    image_tasks = {name: task for name, task in tasks.items() if isinstance(task, ImageTask)}
    vlm_tasks = {name: task for name, task in tasks.items() if isinstance(task, VLMTask)}
    if image_tasks and vlm_tasks:
        raise UserError(f"{', '.join(image_tasks)} measure towers, {', '.join(vlm_tasks)} models that answer in words; run them apart")
    known = TOWER_CONTROLS if image_tasks else CONTROLS
    controls = config.controls or (["none"] if image_tasks else list(CONTROLS))
    for control in controls:
        if control not in known:
            raise UserError(f"{control}: no such control for {', '.join(tasks)}; there are {', '.join(known)}")
    config = replace(config, models=list(dict.fromkeys(config.models)), controls=controls)
    if not config.models and (vlm_tasks or config.teacher is None):
        raise UserError("no model to measure; name one with --model")
    meanings = {control: known[control] for control in controls if control != "none"}
    report = Report({}, dict(tasks), limit=config.limit, controls=meanings)
    results = (
        _image_results(config, report, image_tasks, data, on_progress)
        if image_tasks
        else _vlm_results(config, report, vlm_tasks, data, on_progress)
    )
    for name, column, result in results:
        report.results.setdefault(name, {})[column] = result
        report.seconds = time.perf_counter() - started
        on_result(report)
    return report


def _image_results(
    config: EvalConfig, report: Report, tasks: dict[str, ImageTask], data: Data, on_progress: Progress
) -> Iterator[tuple[str, Column, Result]]:
    teacher = config.teacher
    for name, task in tasks.items():
        if task.needs_teacher and teacher is None:
            raise UserError(f"{name} compares with the teacher; name it with --teacher")
        if task.needs_text and config.text is None and teacher is None:
            raise UserError(f"{name} compares photos with words; give --text, or --teacher to use its own")
    towers = [name for name in config.models if not is_teacher(name)]
    # a tower of one number of tokens stands beside those of several, but is not silently measured at another than was asked for
    chosen = {name: list(config.budgets) or [None] for name in towers}
    if config.budgets and (serving := [name for name in towers if serves_budgets(name)]):
        chosen |= {name: [None] for name in towers if name not in serving}
    reference = None if teacher is None else teacher_embedder(teacher)
    embedders: list[Embedder] = []
    for name in config.models:
        if is_teacher(name):
            embedders += [] if name == teacher else [teacher_embedder(name)]
        else:
            embedders += [tower_embedder(name, control, count, reference) for count in chosen[name] for control in config.controls]
    if reference is not None:
        embedders.append(reference)
    words = text_side(config.text, teacher) if any(task.needs_text for task in tasks.values()) else None
    _check_widths(embedders, reference, words, tasks)
    features = Features(words, on_progress)
    report.teacher, report.text, report.dtype = teacher, None if words is None else words.name, embedders[0].dtype
    on_progress("timing", 0, 1)
    times = _milliseconds(embedders, data.photos(next(iter(tasks.values())).files[0])[0].load())
    for e in embedders:
        cost = {"tokens": e.tokens, "macs": e.macs, "parameters": e.parameters, "ms": times[e.name]}
        report.models[e.name] = {"kind": e.kind, "model": e.model, **cost}
    for name, task in tasks.items():
        for embedder in embedders:
            if task.needs_teacher and embedder is reference and not task.includes_teacher:
                continue
            on_progress(f"{name}: {embedder.name}", 0, 1)
            yield name, Column(embedder.name), task.run(embedder, reference, features, data)
            on_progress(f"{name}: {embedder.name}", 1, 1)


def _milliseconds(embedders: list[Embedder], image: Image.Image) -> dict[str, dict[str, Any]]:
    """Of each model, by name: median and quartiles of one image at a time, decoding and resizing left out."""
    inputs = {embedder.name: embedder.pixels([image]) for embedder in embedders}
    calls = [TimedCall("tower", [(lambda _, e=e: e.encode(inputs[e.name]), 1.0)], e.name) for e in embedders]
    time_interleaved(calls, own_device(), TIMED_ROUNDS, limit_s=math.inf)
    return {call.model: call.quartiles() | {"threads": torch.get_num_threads()} for call in calls}


def _check_widths(embedders: list[Embedder], teacher: Embedder | None, text: TextSide | None, tasks: dict[str, ImageTask]) -> None:
    for embedder in embedders:
        if text is not None and embedder.width != text.width:
            raise UserError(f"{embedder.name} embeds into {embedder.width} dimensions, the text side {text.name} into {text.width}")
        compared = any(task.needs_teacher and (embedder.kind == "tower" or not task.includes_teacher) for task in tasks.values())
        if teacher is not None and compared and embedder.width != teacher.width:
            raise UserError(f"{embedder.name} embeds into {embedder.width} dimensions, the teacher {teacher.name} into {teacher.width}")


def _vlm_results(
    config: EvalConfig, report: Report, tasks: dict[str, VLMTask], data: Data, on_progress: Progress
) -> Iterator[tuple[str, Column, Result]]:
    from sparse_vlm.vlm import VLM
    from sparse_vlm.vlm.config import parts_of

    for name in config.models:
        parts_of(name)  # a wrong name is an error before the first model has answered
    for name, count in itertools.product(config.models, config.budgets or [None]):
        model = VLM.from_pretrained(name, device=own_device(), num_tokens=count)
        model_name = budget_name(name, count)
        report.models[model_name] = {"kind": "vlm", "model": name, "tokens": model.tokens_per_image}
        report.dtype = str(model.dtype).removeprefix("torch.")
        for (task_name, task), control in itertools.product(tasks.items(), config.controls):
            column = Column(model_name, control)
            yield task_name, column, task.run(model, control, data, partial(on_progress, f"{task_name}: {column.title}"))
