"""Quality of models from reports of `sparse-vlm eval`: scores, and paired differences.

Notable: numbers of two reports stand beside each other only where task, photos and unit are the same, and a difference has an interval only
where both models answered in one run, because only there is it known on the same resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_vlm.bench.summary import Row
from sparse_vlm.errors import UserError
from sparse_vlm.utils.schema import COUNT, SOME, check, read_json

FORMAT = "sparse-vlm/eval/1"
UNDIRECTED = ("yes-ratio", "words an answer")  # metrics of which neither more nor less is better
SHOWN = {"%": (100.0, 1), "x100": (100.0, 1), "": (1.0, 3)}  # unit: factor and digits of a number that is shown


_SCORE = {"value": (float, None), "low": (float, None), "high": (float, None)}
_RESULT = {"task": str, "model": str, "control": (str, None)}
DOCUMENT = {
    "models": {str: {"kind": str, "model": str, "tokens": SOME}},
    "tasks": {str: {"protocol": str}},
    "results": [_RESULT | {"metrics": {str: {"unit": str, "photos": COUNT} | _SCORE}}],
    "paired?": [_RESULT | {"metric": str, "over": str} | _SCORE],
    "dtype": str,
    "versions": {str: str},
}


def read_document(path: Path, form: str, maker: str, described: Mapping[str, Any]) -> Row:
    """A JSON document of the given format.

    Args:
        form: what its `format` must be.
        maker: the command that writes such a file.
        described: what it must hold, as `sparse_vlm.utils.schema` says it.

    Raises:
        UserError: no such file, no JSON, another format, or a part that is missing or of another type.
    """
    document = read_json(path, f"name a file that {maker} wrote")
    found = document.get("format") if isinstance(document, dict) else None
    if found != form:
        what = f"is {str(found)[:80]}" if found else "does not say its format"
        raise UserError(f"{path}: {what}, not {form}; name a file that {maker} wrote")
    if missing := [key for key in described if not key.endswith("?") and key not in document]:
        raise UserError(f"{path}: holds no {', '.join(missing)}; make it again by {maker}")
    check(document, described, str(path), f"make it again by {maker}")
    return document


@dataclass(frozen=True)
class Score:
    """A value, or a difference, with its 95 % interval (None where there is none)."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Measure:
    """A metric of a task.

    Attributes:
        unit: as `sparse_vlm.eval.metrics.Metric` has it.
        photos: that it was measured on.
    """

    task: str
    metric: str
    unit: str
    photos: int

    @property
    def title(self) -> str:
        """Its heading in a table."""
        return f"{self.task} {self.metric}"

    def shown(self, value: float, signed: bool = False) -> str:
        """A number of it as it is printed."""
        factor, digits = SHOWN[self.unit]
        number = round(factor * value, digits) or 0.0  # without a zero's sign
        return f"{number:{'+' if signed and number else ''}.{digits}f}".replace("-", "−")

    def with_interval(self, score: Score, signed: bool = False) -> str:
        """A number of it with the interval that it has."""
        if score.low is None or score.high is None:
            return self.shown(score.value, signed)
        return f"{self.shown(score.value, signed)} [{self.shown(score.low, signed)}, {self.shown(score.high, signed)}]"


@dataclass
class Quality:
    """The scores of several reports.

    Attributes:
        models: what each model is (kind, model, tokens, and the dtype it computed in), by name.
        measures: every metric, in the order of the files.
        protocols: how a task is measured, by task.
        versions: of what measured it, by file.
    """

    models: dict[str, Row] = field(default_factory=dict)
    measures: dict[tuple[str, str], Measure] = field(default_factory=dict)
    protocols: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    _scores: dict[tuple[str, str, str], Score] = field(default_factory=dict)
    _paired: dict[tuple[str, str, str, str], Score] = field(default_factory=dict)
    _files: dict[tuple[str, str], str] = field(default_factory=dict)

    def score(self, measure: Measure, model: str | None) -> Score | None:
        """A model's score; None where it was not measured."""
        return None if model is None else self._scores.get((measure.task, measure.metric, model))

    def difference(self, measure: Measure, model: str | None, over: str | None) -> Score | None:
        """How much more a model reached than another, with a paired interval where both are of one run; None where either is missing."""
        one, other = self.score(measure, model), self.score(measure, over)
        if one is None or other is None:
            return None
        paired = self._paired.get((measure.task, measure.metric, model or "", over or ""))
        return paired or Score(one.value - other.value, None, None)

    def tells_apart(self, measure: Measure, better: str | None, worse: str | None) -> bool:
        """Whether one model is better by more than chance: 0 lies outside the paired interval, or the two intervals do not meet."""
        more = self.difference(measure, better, worse)
        if more is not None and more.low is not None:
            return more.low > 0
        one, other = self.score(measure, better), self.score(measure, worse)
        return one is not None and other is not None and None not in (one.low, other.high) and one.low > other.high

    def chosen(self, names: Sequence[str]) -> list[Measure]:
        """The measures of some names, `TASK` (its first metric that has a better and a worse) or `TASK/METRIC`; of all tasks unless given.

        Raises:
            UserError: no such task or metric, or one without a better and a worse.
        """
        first: dict[str, Measure] = {}
        for measure in self.measures.values():
            if measure.metric not in UNDIRECTED:
                first.setdefault(measure.task, measure)
        if not names:
            return list(first.values())
        found = []
        for name in names:
            task, _, metric = name.partition("/")
            measure = self.measures.get((task, metric)) if metric else first.get(task)
            if measure is None:
                there = ", ".join(f"{m.task}/{m.metric}" for m in self.measures.values() if m.metric not in UNDIRECTED)
                raise UserError(f"--task {name}: not measured, or without a better and a worse; there are {there or 'none'}")
            if measure.metric in UNDIRECTED:
                raise UserError(f"--task {name}: neither more nor less of {measure.metric} is better, so it has no front")
            found.append(measure)
        return found

    def add(self, path: Path) -> None:
        """Add a report.

        Raises:
            UserError: no report, or one that does not go with those before it.
        """
        document = read_document(path, FORMAT, "sparse-vlm eval", DOCUMENT)
        self.versions[str(path)] = document["versions"]
        for name, task in document["tasks"].items():
            if self.protocols.setdefault(name, task["protocol"]) != task["protocol"]:
                raise UserError(f"{path}: {name} was measured in another way than in the file before it; measure its models in one run")
        for i, row in enumerate(document["results"]):
            if row["model"] not in document["models"] or row["task"] not in document["tasks"]:
                raise UserError(f"{path}: results[{i}] is of {row['model']} in {row['task']}, which it does not describe; make it again")
            if strange := [found["unit"] for found in row["metrics"].values() if found["unit"] not in SHOWN]:
                raise UserError(f"{path}: results[{i}] is in {strange[0]!r}, a unit that is not known here; make it again")
        plain = [row for row in document["results"] if row["control"] in (None, "none")]
        if not plain:
            raise UserError(f"{path}: no model was measured with the photo itself; run sparse-vlm eval with --control none")
        for row in plain:
            self._add_result(path, row, document["models"][row["model"]] | {"dtype": document["dtype"]})
        for row in document.get("paired", ()):
            if row["control"] in (None, "none"):
                task, metric, one, other = row["task"], row["metric"], row["model"], row["over"]
                if None in (value := (row["value"], row["low"], row["high"])):
                    continue
                self._paired[task, metric, one, other] = Score(*value)
                self._paired[task, metric, other, one] = Score(-row["value"], -row["high"], -row["low"])

    def _add_result(self, path: Path, row: Row, model: dict[str, Any]) -> None:
        task, name = row["task"], row["model"]
        if (before := self._files.setdefault((task, name), str(path))) != str(path):
            raise UserError(f"{path}: {task} of {name} is in {before} as well; name one of the two files")
        if self.models.setdefault(name, model)["tokens"] != model["tokens"]:
            raise UserError(f"{path}: {name} has {model['tokens']} tokens here and {self.models[name]['tokens']} in the file before it")
        for metric, found in row["metrics"].items():
            measure = Measure(task, metric, found["unit"], found["photos"])
            known = self.measures.setdefault((task, metric), measure)
            if known.unit != measure.unit:
                raise UserError(f"{path}: {measure.title} is in {measure.unit or 'plain numbers'}, in the file before it in {known.unit}")
            if known.photos != measure.photos:
                raise UserError(
                    f"{path}: {measure.title} is of {measure.photos} photos here and of {known.photos} in the file before it; "
                    "compare models on the same photos"
                )
            if found["value"] is not None:  # a share of nothing is none
                self._scores[task, metric, name] = Score(found["value"], found["low"], found["high"])


def read_quality(paths: Sequence[Path]) -> Quality:
    """Read reports of `sparse-vlm eval`.

    Raises:
        UserError: no report, or two that do not go together.
    """
    quality = Quality()
    for path in paths:
        quality.add(path)
    return quality
