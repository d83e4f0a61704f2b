"""The HTML page of a report: what changes if a tower is replaced, for a given LLM, batch size and answer length.

Notable: HTML that stands alone: styles and images are in it, nothing is fetched and nothing is run. Every number is in the files that it
is made of, or an estimate from them that says so.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath
from typing import Any

from sparse_vlm.report.comparison import Comparison, costs, differences, lengths, scored, short
from sparse_vlm.report.frontier import AXES, MARKS, MAYBE, ON, as_svg, named, points, styles
from sparse_vlm.report.notes import notes
from sparse_vlm.report.quality import Measure


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    machine = comparison.document["machine"]
    text = files("sparse_vlm.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template.render(
        now=comparison.now,
        then=comparison.then,
        scenario=comparison.scenario,
        llm=comparison.llm,
        llm_name=comparison.llm_name,
        where=machine["accelerator"]["name"] if machine["accelerator"] else f"{machine['processor']}, threads: {machine['threads']}",
        warnings=notes(comparison, "warnings"),
        verdicts=notes(comparison, "verdicts"),
        costs=costs(comparison),
        differences=differences(comparison),
        lengths=lengths(comparison),
        where_not=notes(comparison, "where_not"),
        fronts=[{"title": measure.title, "panels": _panels(comparison, measure)} for measure in comparison.drawn],
        table=_table(comparison),
        unmeasured=notes(comparison, "unmeasured"),
        method=notes(comparison, "method"),
        sources=comparison.sources,
        hollow=MAYBE,
    )


def _panels(comparison: Comparison, measure: Measure) -> list[dict[str, str]]:
    """An image for each cost, with the names on its front."""
    panels = []
    for key, cost in AXES.items():
        found = points(comparison.records, comparison.quality, measure, cost)
        maybe = named(found, MAYBE)
        caption = f"{ON.capitalize()}: {named(found, ON)}." + (f" {MAYBE.capitalize()}: {maybe}." if maybe else "")
        svg = as_svg(comparison.records, comparison.quality, measure, cost, f"{measure.title} {key}")
        panels.append({"svg": svg, "caption": caption, "title": f"{measure.title} against {cost.title}"})
    return panels


def _table(comparison: Comparison) -> dict[str, Any]:
    """All models with what they cost and reach."""
    from matplotlib.colors import to_hex

    style_of, rows = styles(comparison.records), []
    for record in comparison.records:
        cells = []
        for cost in AXES.values():
            spread = "" if cost.spread is None else " [{}, {}]".format(*map(short, cost.spread(record)))
            cells.append(short(cost.of(record)) + spread)
        colour, marker = style_of[record.series]
        row = {"glyph": MARKS[marker], "colour": to_hex(colour), "name": record.name}
        own = {"quality of": record.quality_name or record.name, "cost of": record.cost_name}
        row["other"] = ", ".join(
            f"{what} {part}" for what, name in own.items() if (part := PurePath(name).name) != PurePath(record.name).name
        )
        rows.append(row | {"cells": [*cells, *(scored(comparison.quality, measure, record) for measure in comparison.shown)]})
    return {"heads": [*(cost.title for cost in AXES.values()), *(measure.title for measure in comparison.shown)], "rows": rows}
