"""Accuracy against cost: which models lie on the Pareto front, and its plot. Costs that it is drawn against: `AXES`.

Notable: a model is on the front where none is at least as good in both and better in one. Accuracy is a sample, so a model behind the front
is told from it only where one that costs no more is better by more than chance (`Quality.tells_apart`); until then it may be on it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_vlm.report.comparison import COSTS, Cost
from sparse_vlm.report.quality import SHOWN, Measure, Quality, Score
from sparse_vlm.report.records import Record
from sparse_vlm.tower.visualize import as_label, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ON, MAYBE, BEHIND = "on the front", "not told from the front", "behind the front"
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "<": "◀", ">": "▶", "P": "✚", "X": "✖", "*": "★"}  # matplotlib's, and for text
WIDE = 8.0  # highest cost over lowest from which an axis is logarithmic
INK = "#010203"  # stands for the page's own colour of text in an SVG


AXES = {key: COSTS[key] for key in ("tokens", "MACs", "milliseconds", "KV bytes")}  # that quality is drawn against


@dataclass(frozen=True)
class Point:
    """A model in a plane of accuracy and cost.

    Attributes:
        spread: quartiles of the cost.
        standing: `ON`, `MAYBE` or `BEHIND`.
    """

    record: Record
    cost: float
    spread: tuple[float, float] | None
    score: Score
    standing: str


def points(records: Sequence[Record], quality: Quality, measure: Measure, cost: Cost) -> list[Point]:
    """The models of which the measure is known, with where they stand; in the order of their cost."""
    known = [(record, cost.of(record), score) for record in records if (score := quality.score(measure, record.quality_name)) is not None]
    found = []
    for record, price, score in known:
        others = [r for r in known if r[0] is not record and r[1] <= price and r[2].value >= score.value]
        better = [other for other, their_price, their_score in others if their_price < price or their_score.value > score.value]
        clearly = any(quality.tells_apart(measure, other.quality_name, record.quality_name) for other in better)
        standing = ON if not better else BEHIND if clearly else MAYBE
        found.append(Point(record, price, cost.spread(record) if cost.spread else None, score, standing))
    return sorted(found, key=lambda point: (point.cost, -point.score.value))


def named(found: Sequence[Point], standing: str) -> str:
    """The names of the models that stand somewhere; those of one series together, by their tokens."""
    series: dict[str, list[Record]] = {}
    for point in found:
        if point.standing == standing:
            series.setdefault(point.record.series, []).append(point.record)
    counts = {name: ", ".join(str(record.request["tokens"]) for record in own) for name, own in series.items()}
    many = {name: len({record.request["tokens"] for record in own}) == len(own) > 1 for name, own in series.items()}
    return "; ".join(f"{name} of {counts[name]} tokens" if many[name] else ", ".join(e.name for e in own) for name, own in series.items())


def styles(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series."""
    series = list(dict.fromkeys(record.series for record in records))
    return {name: (f"C{i % 10}", list(MARKS)[i // 10 % len(MARKS)]) for i, name in enumerate(series)}


def draw(records: Sequence[Record], quality: Quality, measure: Measure, title: str, path: Path) -> None:
    """Write a PNG of one measure against every cost."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 7), layout="constrained")
    for axis, cost in zip(figure.subplots(2, 2).flat, AXES.values(), strict=True):
        _draw_panel(axis, records, quality, measure, cost, "black")
    shown = {p.record.series for p in points(records, quality, measure, COSTS["tokens"])}
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=as_label(n)) for n, (c, m) in styles(records).items() if n in shown]
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="Pareto front"))
    handles.append(Line2D([], [], color="0.5", marker="o", markerfacecolor="none", linestyle="", label=f"hollow: {MAYBE}"))
    handles.append(Line2D([], [], color="0.5", marker="o", alpha=0.35, linestyle="", label=f"faint: {BEHIND}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    figure.suptitle(as_label(title), fontsize=10)
    save_figure(figure, path, dpi=120)


def as_svg(records: Sequence[Record], quality: Quality, measure: Measure, cost: Cost, name: str) -> str:
    """One measure against one cost as an SVG to stand within a page: it takes the page's colour of text.

    Args:
        name: unlike that of any other image in the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure = Figure(figsize=(3.6, 2.7), layout="constrained")
        _draw_panel(figure.subplots(), records, quality, measure, cost, INK)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<metadata>", "").replace("</metadata>", "")
    svg = re.sub(r"<rdf:RDF.*?</rdf:RDF>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)  # the same in every image, and used by none
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r'\1 role="img"', svg, count=1).strip()


def _draw_panel(axis: Axes, records: Sequence[Record], quality: Quality, measure: Measure, cost: Cost, ink: str) -> None:
    """Models with their intervals, models of one series joined; the front as a staircase that begins below its cheapest model."""
    factor, _ = SHOWN[measure.unit]
    found, style_of = points(records, quality, measure, cost), styles(records)
    for series, (colour, marker) in style_of.items():
        own = [p for p in found if p.record.series == series]
        axis.plot([p.cost for p in own], [factor * p.score.value for p in own], color=colour, linewidth=0.8, alpha=0.5, zorder=1)
        for p in own:
            axis.errorbar(
                p.cost,
                factor * p.score.value,
                yerr=_error(p.score.value, p.score.low, p.score.high, factor),
                xerr=None if p.spread is None else _error(p.cost, *p.spread, 1.0),
                color=colour,
                marker=marker,
                markersize=6,
                markerfacecolor="none" if p.standing == MAYBE else colour,
                alpha=0.35 if p.standing == BEHIND else 1.0,
                elinewidth=1,
                capsize=2,
            )
    prices = [p.cost for p in found]
    if min(prices) > 0 and max(prices) / min(prices) > WIDE:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    else:
        axis.set_xlim(0, 1.12 * max(max(p.cost, *(p.spread or (0.0,))) for p in found))
    front = [(p.cost, factor * p.score.value) for p in found if p.standing == ON]
    bottom, right = axis.get_ylim()[0], axis.get_xlim()[1]
    stairs = [(front[0][0], bottom), *front, (right, front[-1][1])]
    axis.step(*zip(*stairs, strict=True), "--", where="post", color="0.5", linewidth=1, zorder=1, scalex=False, scaley=False)
    axis.set_xlabel(cost.title, color=ink)
    axis.set_ylabel(as_label(f"{measure.title}, %" if measure.unit == "%" else measure.title), color=ink)
    axis.tick_params(colors=ink, which="both")
    for spine in axis.spines.values():
        spine.set_color(ink)
    axis.grid(alpha=0.25)


def _error(value: float, low: float | None, high: float | None, factor: float) -> list[list[float]]:
    """How far an interval reaches below and above a value, as matplotlib takes it."""
    return [[factor * max(0.0, value - (value if low is None else low))], [factor * max(0.0, (value if high is None else high) - value)]]
