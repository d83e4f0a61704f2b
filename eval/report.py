"""Output of an evaluation: JSON, tables for the terminal, Markdown, predictions."""

from __future__ import annotations

import json
import math
import platform
import re
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from sparse_vlm import __version__
from sparse_vlm.errors import printable
from sparse_vlm.eval.curves import draw, has_budgets
from sparse_vlm.eval.metrics import Metric
from sparse_vlm.eval.run import Column, Report
from sparse_vlm.utils.files import write_text

FORMAT = "sparse-vlm/eval/1"


def as_json(report: Report) -> dict[str, Any]:
    """Plain data: models, protocols, and every metric with its interval and its ratio to the teacher's."""
    rows = []
    for task, of_task in report.results.items():
        for column, result in of_task.items():
            metrics = {}
            for name, metric in result.metrics.items():
                metrics[name] = _as_json(metric)
                if (kept := report.of_teacher(task, column, name)) is not None:
                    metrics[name]["of_teacher"] = _values(kept)
                if (more := report.over_control(task, column, name)) is not None:
                    metrics[name]["photo_minus_control"] = _values(more)
            row = {"task": task, "model": column.model, "control": column.control, "metrics": metrics, "notes": result.notes}
            rows.append(row | {"details": {name: _as_json(metric) for name, metric in result.details.items()}})
    summaries = {column.model: report.summary(column) for column in report.columns if column.control is None}
    paired = []
    for task, of_task in report.results.items():
        for over, column in report.pairs():
            for name in next(iter(of_task.values())).metrics:
                if (more := report.paired(task, name, column, over)) is not None:
                    about = {"task": task, "metric": name, "model": column.model, "over": over.model, "control": column.control}
                    paired.append(about | _values(more))
    return {
        "format": FORMAT,
        "models": report.models,
        "teacher": report.teacher,
        "text": report.text,
        "limit": report.limit,
        "dtype": report.dtype,
        "tasks": {name: {"files": list(task.files), "protocol": task.protocol} for name, task in report.tasks.items()},
        "results": rows,
        "paired": paired,
        "of_teacher": {model: summary for model, summary in summaries.items() if summary is not None},
        "seconds": round(report.seconds, 1),
        "versions": {"sparse_vlm": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _values(metric: Metric) -> dict[str, float | None]:
    """Value and interval; JSON has no NaN."""
    return {name: value if math.isfinite(value := getattr(metric, name)) else None for name in ("value", "low", "high")}


def _as_json(metric: Metric) -> dict[str, Any]:
    return metric.as_json() | _values(metric)


def _cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows; a metric's row holds its value and, where the teacher has it, the percentage of the teacher's."""
    columns = report.columns
    rows: list[list[str]] = []
    for label, key, scale in (("tokens", "tokens", 1), ("GMACs", "macs", 1e9), ("M parameters", "parameters", 1e6)):
        if all(key in model for model in report.models.values()):
            shown = [report.models[column.model][key] / scale for column in columns]
            rows.append(["", label, *(f"{value:.0f}" if scale == 1 else f"{value:.2f}" for value in shown)])
    if all("ms" in model for model in report.models.values()):
        times = [report.models[column.model]["ms"] for column in columns]
        rows.append(["", "ms an image", *(f"{t['median']:.1f} [{t['low']:.1f}, {t['high']:.1f}]" for t in times)])
    for task, of_task in report.results.items():
        names = next(iter(of_task.values())).metrics
        for i, name in enumerate(names):
            rows.append([task if i == 0 else "", name, *(_cell(report, task, column, name) for column in columns)])
    summaries = [report.summary(column) for column in columns]
    if any(summaries):
        rows.append(["of the teacher", "average over tasks", *(f"{100 * s['average']:.1f} %" if s else "" for s in summaries)])
        lowest = [f"{100 * s['lowest']:.1f} % ({s['lowest_task']} {s['lowest_metric']})" if s else "" for s in summaries]
        rows.append(["", "lowest", *lowest])
    return ["task", "metric", *(column.title for column in columns)], rows


def _paired_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of what each model is worth more than the first one; no rows where there is but one model.

    The differences of all other pairs stand in the JSON alone: with ten models there are 45.
    """
    columns = report.columns
    pairs = [(over, column) for over, column in report.pairs() if over.model == columns[0].model]
    rows: list[list[str]] = []
    for task, of_task in report.results.items() if pairs else ():
        for i, (name, metric) in enumerate(next(iter(of_task.values())).metrics.items()):
            found = [report.paired(task, name, column, over) for over, column in pairs]
            rows.append([task if i == 0 else "", name, *("" if more is None else _signed(more, metric.unit) for more in found)])
    return ["task", "metric", *(f"{column.title} − {over.model}" for over, column in pairs)], rows


def _signed(more: Metric, unit: str) -> str:
    """A difference with its interval, in the unit of its metric."""
    scale, digits = (1, 3) if unit == "" else (100, 1)
    value, low, high = (f"{scale * number:+.{digits}f}" for number in (more.value, more.low, more.high))
    return f"{value} [{low}, {high}]"


def _cell(report: Report, task: str, column: Column, name: str) -> str:
    result = report.results[task].get(column)
    if result is None:
        return ""
    metric = result.metrics[name]
    scale = 1 if metric.unit == "" else 100
    digits = 3 if metric.unit == "" else 1
    cell = f"{metric.shown()} [{scale * metric.low:.{digits}f}, {scale * metric.high:.{digits}f}]"
    if (more := report.over_control(task, column, name)) is not None:
        return f"{cell}, photo {_signed(more, metric.unit)}"
    kept = report.of_teacher(task, column, name)
    return cell if kept is None or kept.value != kept.value else f"{cell} = {100 * kept.value:.1f} %"


def caption(report: Report) -> str:
    """What the numbers in the table mean, in a line."""
    parts = ["[95 % interval, bootstrap over photos]"]
    if times := [model["ms"] for model in report.models.values() if "ms" in model]:
        parts.append(f"ms: one image at a time, models interleaved, median [quarters], {report.dtype}, CPU threads: {times[0]['threads']}")
    if report.teacher is not None:
        parts.append("= share of the teacher's value")
    parts += [f"{control}: {meaning}" for control, meaning in report.controls.items()]
    if any(column.control not in (None, "none") for column in report.columns):
        parts.append("photo +: how much more the photo itself is worth, paired interval")
    if report.limit is not None:
        parts.append(f"at most {report.limit} photos a set")
    return "; ".join(parts)


PAIRED = "[95 % interval], paired: the same photos are resampled for both models; an interval without 0 tells them apart"


def as_tables(report: Report) -> list[Table]:
    """For the terminal: what was measured, and the paired differences where there are several models."""
    tables = [_table(*_cells(report), caption(report))]
    heads, rows = _paired_cells(report)
    return [*tables, _table(heads, rows, PAIRED)] if rows else tables


def _table(heads: list[str], rows: list[list[str]], below: str) -> Table:
    table = Table(caption=Text(below, style="table.caption"), caption_justify="left")
    for i, head in enumerate(heads):
        table.add_column(Text(printable(head)), justify="left" if i < 2 else "right")
    for number, row in enumerate(rows):
        if row[0] and number:
            table.add_section()
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def as_markdown(report: Report) -> str:
    """For documents: the table, then protocols and notes as a list."""
    lines = [*_markdown_table(*_cells(report)), "", caption(report), ""]
    heads, rows = _paired_cells(report)
    if rows:
        lines += [*_markdown_table(heads, rows), "", PAIRED, ""]
    lines += [f"* {name}: {task.protocol}." for name, task in report.tasks.items()]
    for task, of_task in report.results.items():
        lines += [f"* {task}, {column.title}: {note}." for column, result in of_task.items() for note in result.notes]
    return "\n".join(lines) + "\n"


def _markdown_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    return [printable(line) for line in [*lines, *("| " + " | ".join(row) + " |" for row in rows)]]


def save(report: Report, folder: Path) -> None:
    """Write `report.json`, `table.md`, a JSONL file of predictions for each task and column, the answers in the format of
    benchmarks that are scored elsewhere, and `tokens.png` if a model was measured at several token budgets."""
    write_text(folder / "report.json", json.dumps(as_json(report), indent=1) + "\n")
    write_text(folder / "table.md", as_markdown(report))
    if has_budgets(report):
        draw(report, folder / "tokens.png")
    for task, of_task in report.results.items():
        for column, result in of_task.items():
            name = re.sub(r"[^\w.-]+", "-", ".".join([task, column.model, *([column.control] if column.control else [])])).strip("-")
            if result.submission is not None:
                write_text(folder / f"{name}.json", json.dumps(result.submission, ensure_ascii=False, indent=1) + "\n")
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.predictions)
            write_text(folder / f"{name}.jsonl", lines)
