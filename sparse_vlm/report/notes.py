"""The notes of a report: what changes, where fewer tokens do not help, warnings, what was not measured, method; `notes.txt` words them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import PurePath
from typing import Any

from sparse_vlm.bench.serving import HELPS
from sparse_vlm.errors import printable
from sparse_vlm.report.comparison import Comparison, change, longest_part, milliseconds, overlap, rate, short
from sparse_vlm.report.records import no_help, shorten

BUSY = 0.5  # threads at work beyond the cores, above which the machine did too much else


def notes(comparison: Comparison, part: str) -> list[str]:
    """The notes of a part of the report.

    Args:
        part: a macro of `notes.txt`: verdicts, where_not, warnings, unmeasured or method.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_on_one_line)
    environment.filters["basename"] = lambda name: PurePath(name).name
    template = environment.from_string(files("sparse_vlm.report").joinpath("notes.txt").read_text(encoding="utf-8"))
    macros = template.make_module(_values(comparison))
    return [line for line in str(getattr(macros, part)()).splitlines() if line]


def _on_one_line(value: Any) -> Any:
    """A name cannot begin a line of its own."""
    return printable(value) if isinstance(value, str) and not value.isprintable() else value


def _values(comparison: Comparison) -> dict[str, Any]:
    """All that the template speaks of."""
    document, quality, scenario, records = comparison.document, comparison.quality, comparison.scenario, comparison.records
    names = {record.quality_name for record in records if record.quality_name is not None}
    short_names = dict(zip(quality.models, shorten(list(quality.models)), strict=True))
    dtypes = sorted({quality.models[name]["dtype"] for name in names})
    both = comparison.now.quality_name, comparison.then.quality_name
    other_versions = []
    for file, versions in quality.versions.items():
        pairs = [(name, versions[name], have) for name, have in document["versions"].items() if name in versions]
        # the same torch names itself with or without what it was built for
        if differing := [f"{n} {one}, not {other}" for n, one, other in pairs if one.partition("+")[0] != other.partition("+")[0]]:
            other_versions.append((PurePath(file).name, differing))
    return vars(comparison) | {
        **{function.__name__: function for function in (change, longest_part, milliseconds, overlap, rate, short)},
        "HELPS": HELPS,
        "BUSY": BUSY,
        "machine": document["machine"],
        "llm": comparison.llm,
        "llm_name": comparison.llm_name,
        "compared": [m for m in comparison.measures if None not in [quality.score(m, name) for name in both]],
        "counts": {record.request["tokens"] for record in records},
        # a page names LLM and dtype once
        "no_help": [line.removeprefix(f"{scenario.llm}, {scenario.dtype}: ") for line in no_help(document, scenario, records)],
        "without_quality": [record.name for record in records if record.quality_name is None],
        "without_cost": [short_name for name, short_name in short_names.items() if name not in names],
        "short_names": short_names,
        "kinds": {quality.models[name]["kind"] for name in names},
        "dtypes": dtypes,
        "other_dtypes": set(dtypes) - {scenario.dtype},
        "other_versions": other_versions,
        "peaks": next(peak for peak in document["peaks"] if peak["dtype"] == scenario.dtype),
        "photos": {measure.task: measure.photos for measure in comparison.shown},
    }
