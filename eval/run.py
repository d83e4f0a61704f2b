"""One run: several models, the teacher beside them, every task, in one report.

Notable: image tasks go to towers and the teacher, VLM tasks to models that answer in words, each once for every control. A column is a
model (and a control); the report holds a `Result` for each task and column.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_vlm.errors import UserError
from sparse_vlm.eval.embedders import (
    Embedder,
    Features,
    TextSide,
    budget_name,
    serves_budgets,
    teacher_embedder,
    text_side,
    tower_embedder,
)
from sparse_vlm.eval.metrics import Metric, difference, ratio
from sparse_vlm.eval.task import CONTROLS, TOWER_CONTROLS, Data, ImageTask, Result, Task, VLMTask
from sparse_vlm.eval.tasks import find_tasks
from sparse_vlm.eval.timing import milliseconds
from sparse_vlm.teachers import is_teacher
from sparse_vlm.utils.devices import own_device

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Column:
    """A model, and for VLM tasks the control it was run under."""

    model: str
    control: str | None = None  # of a VLM; a tower under a control has a name of its own

    @property
    def title(self) -> str:
        """As a table heads it."""
        return self.model if self.control in (None, "none") else f"{self.model}, {self.control}"


@dataclass
class Report:
    """Everything a run found.

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
        """For a VLM's control, how much more the photo itself is worth in a metric."""
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
        """The share of the teacher that a model keeps: the mean over tasks of each task's mean, and the lowest metric.

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


Keep = Callable[[str, Column, Result], None]  # takes a task's result for a column


def evaluate(
    models: Sequence[str],
    tasks: Sequence[str],
    data: Path,
    teacher: str | None = None,
    text: str | None = None,
    controls: Sequence[str] | None = None,
    limit: int | None = None,
    on_progress: Progress = lambda what, done, total: None,
    budgets: Sequence[int] = (),
    on_result: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Run tasks on models.

    Args:
        models: folders or zoo names; towers for image tasks, VLMs for VLM tasks.
        data: the folder that holds `eval/` and `train/`.
        teacher: measured beside the towers; `local-dir:PATH`, `hf-hub:ORG/NAME` or `MODEL@TAG`.
        text: the text side; the teacher's own by default.
        controls: for VLM tasks keys of `CONTROLS`, all by default; for image tasks of `TOWER_CONTROLS`, where `none` is the default.
        limit: photos a set.
        on_progress: called with (what, done, total).
        budgets: tokens an image at which each model is measured, for models that serve several; their own number by default, and for
            towers of one number beside them.
        on_result: called with all that is known whenever a task has been done for a column, so that what is finished outlives an error.

    Raises:
        UserError: an unknown task, model or control, tasks of both kinds, or something a task needs that was not given.
    """
    started = time.perf_counter()
    chosen = find_tasks(list(dict.fromkeys(tasks)))
    if limit is not None and limit < 2:
        raise UserError(f"--limit is {limit}; it must be at least 2")
    files = Data(data, limit)
    for task in chosen.values():
        task.look_up(files)
    image_tasks = {name: task for name, task in chosen.items() if isinstance(task, ImageTask)}
    vlm_tasks = {name: task for name, task in chosen.items() if isinstance(task, VLMTask)}
    if image_tasks and vlm_tasks:
        raise UserError(f"{', '.join(image_tasks)} measure towers, {', '.join(vlm_tasks)} models that answer in words; run them apart")
    known = TOWER_CONTROLS if image_tasks else CONTROLS
    controls = controls or (["none"] if image_tasks else list(CONTROLS))
    for control in controls:
        if control not in known:
            raise UserError(f"{control}: no such control for {', '.join(chosen)}; there are {', '.join(known)}")
    names = list(dict.fromkeys(models))
    meanings = {control: known[control] for control in controls if control != "none"}
    report = Report({}, dict(chosen), limit=limit, controls=meanings)

    def keep(task: str, column: Column, result: Result) -> None:
        report.results.setdefault(task, {})[column] = result
        report.seconds = time.perf_counter() - started
        on_result(report)

    if image_tasks:
        _run_image_tasks(report, keep, names, image_tasks, files, teacher, text, controls, budgets, on_progress)
    else:
        if not names:
            raise UserError("no model to measure; name one with --model")
        _run_vlm_tasks(report, keep, names, vlm_tasks, files, controls, budgets, on_progress)
    return report


def _run_image_tasks(
    report: Report,
    keep: Keep,
    names: list[str],
    tasks: dict[str, ImageTask],
    data: Data,
    teacher: str | None,
    text: str | None,
    controls: Sequence[str],
    budgets: Sequence[int],
    on_progress: Progress,
) -> None:
    for name, task in tasks.items():
        if task.needs_teacher and teacher is None:
            raise UserError(f"{name} compares with the teacher; name it with --teacher")
        if task.needs_text and text is None and teacher is None:
            raise UserError(f"{name} compares photos with words; give --text, or --teacher to use its own")
    if not names and teacher is None:
        raise UserError("no model to measure; name one with --model")
    towers = [name for name in names if not is_teacher(name)]
    # a tower of one number of tokens stands beside those of several, but is not silently measured at another than was asked for
    chosen = {name: list(budgets) or [None] for name in towers}
    if budgets and (serving := [name for name in towers if serves_budgets(name)]):
        chosen |= {name: [None] for name in towers if name not in serving}
    reference = None if teacher is None else teacher_embedder(teacher)
    embedders: list[Embedder] = []
    for name in names:
        if is_teacher(name):
            embedders += [] if name == teacher else [teacher_embedder(name)]
        else:
            embedders += [tower_embedder(name, control, count, reference) for count in chosen[name] for control in controls]
    if reference is not None:
        embedders.append(reference)
    words = text_side(text, teacher) if any(task.needs_text for task in tasks.values()) else None
    _check_widths(embedders, reference, words, tasks)
    features = Features(words, on_progress)
    report.teacher, report.text, report.dtype = teacher, None if words is None else words.name, embedders[0].dtype
    on_progress("timing", 0, 1)
    times = milliseconds(embedders, data.photos(next(iter(tasks.values())).files[0])[0].load())
    for e in embedders:
        cost = {"tokens": e.tokens, "macs": e.macs, "parameters": e.parameters, "ms": times[e.name]}
        report.models[e.name] = {"kind": e.kind, "model": e.model, **cost}
    for name, task in tasks.items():
        for embedder in embedders:
            if task.needs_teacher and embedder is reference and not task.includes_teacher:
                continue
            on_progress(f"{name}: {embedder.name}", 0, 1)
            keep(name, Column(embedder.name), task.run(embedder, reference, features, data))
            on_progress(f"{name}: {embedder.name}", 1, 1)


def _check_widths(embedders: list[Embedder], teacher: Embedder | None, text: TextSide | None, tasks: dict[str, ImageTask]) -> None:
    for embedder in embedders:
        if text is not None and embedder.width != text.width:
            raise UserError(f"{embedder.name} embeds into {embedder.width} dimensions, the text side {text.name} into {text.width}")
        compared = any(task.needs_teacher and (embedder.kind == "tower" or not task.includes_teacher) for task in tasks.values())
        if teacher is not None and compared and embedder.width != teacher.width:
            raise UserError(f"{embedder.name} embeds into {embedder.width} dimensions, the teacher {teacher.name} into {teacher.width}")


def _run_vlm_tasks(
    report: Report,
    keep: Keep,
    names: list[str],
    tasks: dict[str, VLMTask],
    data: Data,
    controls: Sequence[str],
    budgets: Sequence[int],
    on_progress: Progress,
) -> None:
    from sparse_vlm.vlm import VLM
    from sparse_vlm.vlm.reader import parts_of

    for name in names:
        parts_of(name)  # a wrong name is said before the first model has answered
    for name, count in itertools.product(names, budgets or [None]):
        model = VLM.from_pretrained(name, device=own_device(), num_tokens=count)
        model_name = budget_name(name, count)
        report.models[model_name] = {"kind": "vlm", "model": name, "tokens": model.tokens_per_image}
        report.dtype = str(model.dtype).removeprefix("torch.")
        for task_name, task in tasks.items():
            for control in controls:
                column = Column(model_name, control)
                what = f"{task_name}: {column.title}"
                keep(task_name, column, task.run(model, control, data, lambda done, total, what=what: on_progress(what, done, total)))
