"""Accuracy against cost: which models lie on the Pareto front, and its plot. What a cost is, is one more entry in `COSTS`.

Notable: a model is on the front where none is at least as good in both and better in one. Accuracy is a sample, so a model behind the front
is told from it only where one that costs no more is better by more than chance (`Quality.tells_apart`); until then it may be on it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_vlm.report.quality import SHOWN, Measure, Quality, Score
from sparse_vlm.report.records import Entry
from sparse_vlm.tower.visualize import as_label
from sparse_vlm.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ON, MAYBE, BEHIND = "on the front", "not told from the front", "behind the front"
MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "<": "◀", ">": "▶", "P": "✚", "X": "✖", "*": "★"}  # matplotlib's, and for text
WIDE = 8.0  # highest cost over lowest from which an axis is logarithmic
INK = "#010203"  # stands for the page's own colour of text in an SVG


@dataclass(frozen=True)
class Cost:
    """Something that a model costs.

    Attributes:
        title: of its axis, with the unit.
        spread: quartiles, where it is a time.
    """

    title: str
    of: Callable[[Entry], float]
    spread: Callable[[Entry], tuple[float, float]] | None = None


COSTS: dict[str, Cost] = {
    "tokens": Cost("tokens an image", lambda e: e.request["tokens"]),
    "MACs": Cost("GMACs to the first token, a request", lambda e: e.request["macs"] / 1e9 / e.request["batch"]),
    "milliseconds": Cost("ms to the first token, of a batch", lambda e: e.request["ms"]["ttft"], Entry.first_token_spread),
    "KV bytes": Cost("keys and values, MB a picture", lambda e: e.request["kv_bytes_per_image"] / 1e6),
}


@dataclass(frozen=True)
class Point:
    """A model in a plane of accuracy and cost.

    Attributes:
        spread: quartiles of the cost.
        standing: `ON`, `MAYBE` or `BEHIND`.
    """

    entry: Entry
    cost: float
    spread: tuple[float, float] | None
    score: Score
    standing: str


def points(entries: Sequence[Entry], quality: Quality, measure: Measure, cost: Cost) -> list[Point]:
    """The models of which the measure is known, with where they stand; in the order of their cost."""
    known = [(entry, cost.of(entry), score) for entry in entries if (score := quality.score(measure, entry.worth)) is not None]
    found = []
    for entry, price, score in known:
        rivals = [r for r in known if r[0] is not entry and r[1] <= price and r[2].value >= score.value]
        better = [rival for rival, their_price, their_score in rivals if their_price < price or their_score.value > score.value]
        clearly = any(quality.tells_apart(measure, rival.worth, entry.worth) for rival in better)
        standing = ON if not better else BEHIND if clearly else MAYBE
        found.append(Point(entry, price, cost.spread(entry) if cost.spread else None, score, standing))
    return sorted(found, key=lambda point: (point.cost, -point.score.value))


def named(found: Sequence[Point], standing: str) -> str:
    """The names of the models that stand somewhere; those of one series together, by their tokens."""
    series: dict[str, list[Entry]] = {}
    for point in found:
        if point.standing == standing:
            series.setdefault(point.entry.series, []).append(point.entry)
    counts = {name: ", ".join(str(entry.request["tokens"]) for entry in own) for name, own in series.items()}
    many = {name: len({entry.request["tokens"] for entry in own}) == len(own) > 1 for name, own in series.items()}
    return "; ".join(f"{name} of {counts[name]} tokens" if many[name] else ", ".join(e.name for e in own) for name, own in series.items())


def styles(entries: Sequence[Entry]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series."""
    series = list(dict.fromkeys(entry.series for entry in entries))
    return {name: (f"C{i % 10}", list(MARKS)[i // 10 % len(MARKS)]) for i, name in enumerate(series)}


def draw(entries: Sequence[Entry], quality: Quality, measure: Measure, title: str, path: Path) -> None:
    """Write a PNG of one measure against every cost."""
    from matplotlib.lines import Line2D

    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axis, cost in zip(axes.flat, COSTS.values(), strict=True):
        _draw_panel(axis, entries, quality, measure, cost, "black")
    shown = {p.entry.series for p in points(entries, quality, measure, COSTS["tokens"])}
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=as_label(n)) for n, (c, m) in styles(entries).items() if n in shown]
    handles.append(Line2D([], [], color="0.5", linestyle="--", label="Pareto front"))
    handles.append(Line2D([], [], color="0.5", marker="o", markerfacecolor="none", linestyle="", label=f"hollow: {MAYBE}"))
    handles.append(Line2D([], [], color="0.5", marker="o", alpha=0.35, linestyle="", label=f"faint: {BEHIND}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    figure.suptitle(as_label(title), fontsize=10)
    with atomic_path(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)


def as_svg(entries: Sequence[Entry], quality: Quality, measure: Measure, cost: Cost, name: str) -> str:
    """One measure against one cost as an SVG to stand within a page: it takes the page's colour of text.

    Args:
        name: unlike that of any other image in the page.
    """
    plt = _pyplot()
    stream = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure, axis = plt.subplots(figsize=(3.6, 2.7), layout="constrained")
        _draw_panel(axis, entries, quality, measure, cost, INK)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        plt.close(figure)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<metadata>", "").replace("</metadata>", "")
    svg = re.sub(r"<rdf:RDF.*?</rdf:RDF>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", svg)  # the same in every image, and used by none
    svg = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", svg, count=1)
    return re.sub(r'(<svg[^>]*?) width="[\d.]+pt"', r'\1 role="img"', svg, count=1).strip()


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_panel(axis: Axes, entries: Sequence[Entry], quality: Quality, measure: Measure, cost: Cost, ink: str) -> None:
    """Models with their intervals, models of one series joined; the front as a staircase that begins below its cheapest model."""
    factor, _ = SHOWN[measure.unit]
    found, look = points(entries, quality, measure, cost), styles(entries)
    for series, (colour, marker) in look.items():
        own = [p for p in found if p.entry.series == series]
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
