"""Plot of quality against token budget: one panel a task, and one of milliseconds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from sparse_vlm.eval.run import Column, Report
from sparse_vlm.tower.visualize import as_label, save_figure

WIDE = 4  # panels in a row


class Panel(NamedTuple):
    """What one panel shows: a value for each column that has one."""

    unit: str
    values: dict[Column, float]


def has_budgets(report: Report) -> bool:
    """Whether a model was measured with several numbers of tokens."""
    return any(len({report.models[column.model]["tokens"] for column in columns}) > 1 for columns in lines(report).values())


def lines(report: Report) -> dict[str, list[Column]]:
    """Columns of one model (and control), by its title."""
    found: dict[str, list[Column]] = {}
    for column in report.columns:
        model = report.models[column.model]["model"]
        found.setdefault(Column(model, column.control).title, []).append(column)
    return found


def panels(report: Report) -> dict[str, Panel]:
    """Title, unit and values of each panel. A task's value is the mean of its metrics, as shares of the teacher's, or its
    first metric where the teacher has none to compare with."""
    found: dict[str, Panel] = {}
    summaries = {column: summary["average"] for column in report.columns if (summary := report.summary(column)) is not None}
    if summaries:
        found["all tasks"] = Panel("% of the teacher", {column: 100 * value for column, value in summaries.items()})
    for task, of_task in report.results.items():
        shares: dict[Column, float] = {}
        values: dict[Column, float] = {}
        for column, result in of_task.items():
            kept = [share.value for name in result.metrics if (share := report.of_teacher(task, column, name)) is not None]
            if kept:
                shares[column] = 100 * statistics.fmean(kept)
            values[column] = next(iter(result.metrics.values())).value
        first = next(iter(next(iter(of_task.values())).metrics))
        found[task] = Panel("% of the teacher", shares) if shares else Panel(first, values)
    timed = {column: model["ms"]["median"] for column in report.columns if "ms" in (model := report.models[column.model])}
    if timed:
        threads = {model["ms"]["threads"] for model in report.models.values()}
        found["time"] = Panel(f"ms an image, CPU threads: {threads.pop()}", timed)
    return found


def draw(report: Report, path: Path) -> None:
    """Write the image. A model of several budgets is a line, one of a single number of tokens a mark, the teacher a dashed line."""
    from matplotlib.figure import Figure

    shown, models = panels(report), lines(report)
    columns = min(WIDE, len(shown))
    rows = -(-len(shown) // WIDE)
    figure = Figure(figsize=(3.4 * columns, 2.9 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, (unit, values)) in zip(axes.flat, shown.items(), strict=False):
        for number, (name, members) in enumerate(models.items()):
            points = sorted((report.models[c.model]["tokens"], values[c]) for c in members if c in values)
            if not points:
                continue
            if name == report.teacher:
                axis.axhline(points[0][1], color="0.5", linestyle="--", linewidth=1, label=as_label(f"{name} ({points[0][0]} tokens)"))
            else:
                many = len(points) > 1
                axis.plot(
                    *zip(*points, strict=True),
                    f"C{number}",
                    marker="o" if many else "D",
                    linestyle="-" if many else "",
                    label=as_label(name),
                )
        if unit == "% of the teacher":
            axis.axhline(100, color="0.5", linestyle="--", linewidth=1)
        axis.set(title=title, ylabel=unit, xlabel="tokens")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    found = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(4, len(found)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=130)
