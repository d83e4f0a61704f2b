"""One page for a colleague: what changes if they replace their tower, with their LLM, batch and length of answer.

Notable: HTML that stands alone: styles and images are in it, nothing is fetched and nothing is run. Every number is in the files that it
is made of, or an estimate from them that says so.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath
from typing import Any

from sparse_vlm.report import notes as remarks
from sparse_vlm.report.comparison import Subject, costs, lengths, scored, short, worths
from sparse_vlm.report.frontier import COSTS, MARKS, MAYBE, ON, as_svg, named, points, styles
from sparse_vlm.report.quality import Measure


def render(subject: Subject) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined

    machine = subject.document["machine"]
    text = files("sparse_vlm.report").joinpath("page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template.render(
        now=subject.now,
        then=subject.then,
        case=subject.case,
        llm=subject.llm,
        llm_name=subject.llm_name,
        where=machine["accelerator"]["name"] if machine["accelerator"] else f"{machine['processor']}, threads: {machine['threads']}",
        warnings=remarks.warnings(subject),
        verdicts=remarks.verdicts(subject),
        costs=costs(subject),
        worths=worths(subject),
        lengths=lengths(subject),
        where_not=remarks.where_not(subject),
        fronts=[{"title": measure.title, "panels": _panels(subject, measure)} for measure in subject.drawn],
        table=_table(subject),
        unmeasured=remarks.unmeasured(subject),
        method=remarks.method(subject),
        sources=subject.sources,
        hollow=MAYBE,
    )


def _panels(subject: Subject, measure: Measure) -> list[dict[str, str]]:
    """An image for each cost, with the names on its front."""
    panels = []
    for key, cost in COSTS.items():
        found = points(subject.entries, subject.quality, measure, cost)
        maybe = named(found, MAYBE)
        caption = f"{ON.capitalize()}: {named(found, ON)}." + (f" {MAYBE.capitalize()}: {maybe}." if maybe else "")
        svg = as_svg(subject.entries, subject.quality, measure, cost, f"{measure.title} {key}")
        panels.append({"svg": svg, "caption": caption, "title": f"{measure.title} against {cost.title}"})
    return panels


def _table(subject: Subject) -> dict[str, Any]:
    """All models with what they cost and are worth."""
    from matplotlib.colors import to_hex

    look, rows = styles(subject.entries), []
    for entry in subject.entries:
        cells = []
        for cost in COSTS.values():
            spread = "" if cost.spread is None else " [{}, {}]".format(*map(short, cost.spread(entry)))
            cells.append(short(cost.of(entry)) + spread)
        colour, marker = look[entry.series]
        row = {"glyph": MARKS[marker], "colour": to_hex(colour), "name": entry.name}
        own = {"quality of": entry.worth or entry.name, "cost of": entry.cost_name}
        row["other"] = ", ".join(
            f"{what} {part}" for what, name in own.items() if (part := PurePath(name).name) != PurePath(entry.name).name
        )
        rows.append(row | {"cells": [*cells, *(scored(subject.quality, measure, entry) for measure in subject.shown)]})
    return {"heads": [*(cost.title for cost in COSTS.values()), *(measure.title for measure in subject.shown)], "rows": rows}
