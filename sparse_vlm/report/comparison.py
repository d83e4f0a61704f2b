"""Two models in a scenario beside each other: every cost, every measure of quality, and requests a second by the length of the answer.

Notable: a cost is an entry of `COSTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from sparse_vlm.bench.serving import HELPS, TAKES
from sparse_vlm.bench.summary import Row
from sparse_vlm.report.quality import Measure, Quality
from sparse_vlm.report.records import Record, Scenario


@dataclass(frozen=True)
class Comparison:
    """Two models of a benchmark, compared in a scenario.

    Attributes:
        document: the benchmark.
        records: all models in the scenario.
        now, then: the model in use, and the one that would take its place.
        measures: what was asked for of quality.
        sources: names of the files.
    """

    document: Row
    scenario: Scenario
    quality: Quality
    records: Sequence[Record]
    now: Record
    then: Record
    measures: Sequence[Measure]
    sources: Sequence[str]

    @property
    def llm(self) -> Row:
        """The language model."""
        return next(llm for llm in self.document["llms"] if (llm["name"], llm["dtype"]) == (self.scenario.llm, self.scenario.dtype))

    @property
    def llm_name(self) -> str:
        """Its name without folders."""
        return PurePath(self.scenario.llm).name

    @property
    def shown(self) -> list[Measure]:
        """The measures that some model of the scenario has."""
        return [measure for measure in self.measures if self._known(measure)]

    @property
    def drawn(self) -> list[Measure]:
        """The measures that several models of the scenario have, which makes a front."""
        return [measure for measure in self.measures if self._known(measure) > 1]

    def _known(self, measure: Measure) -> int:
        return sum(self.quality.score(measure, record.quality_name) is not None for record in self.records)


@dataclass(frozen=True)
class Cost:
    """A cost of a model.

    Attributes:
        title: with the unit.
        of: of a model in a scenario.
        spread: quartiles, where it is a time that was measured.
        estimated: put together from measured pieces.
    """

    title: str
    of: Callable[[Record], float]
    spread: Callable[[Record], tuple[float, float]] | None = None
    estimated: bool = False


COSTS: dict[str, Cost] = {
    "tokens": Cost("tokens an image", lambda r: r.request["tokens"]),
    "parameters": Cost("tower, M parameters", lambda r: r.model["parameters"] / 1e6),
    "tower MACs": Cost("tower, GMACs an image", lambda r: r.model["macs"] / 1e9),
    "MACs": Cost("to the first token, GMACs a request", lambda r: r.request["macs"] / 1e9 / r.request["batch"]),
    "tower": Cost("tower and projector, ms", lambda r: milliseconds(r, "tower", "projector"), lambda r: r.spread("tower", "projector")),
    "prompt": Cost("reading the prompt, ms", lambda r: milliseconds(r, "prefill"), lambda r: r.spread("prefill")),
    "milliseconds": Cost("to the first token, ms", lambda r: milliseconds(r, "ttft"), Record.first_token_spread),
    "decode": Cost("a token of the answer, ms", lambda r: milliseconds(r, "decode"), lambda r: r.spread("decode")),
    "answer": Cost("to the end of the answer, s", lambda r: r.request["batch"] / rate(r, r.answer), estimated=True),
    "requests": Cost("requests a second", lambda r: rate(r, r.answer), estimated=True),
    "KV bytes": Cost("keys and values, MB an image", lambda r: r.request["kv_bytes_per_image"] / 1e6),
    "memory": Cost("memory in all, GB", lambda r: r.served[r.answer]["memory_bytes"] / 1e9, estimated=True),
}


def milliseconds(record: Record, *stages: str) -> float:
    """Of a batch in some stages."""
    return sum(record.request["ms"][stage] for stage in stages)


def rate(record: Record, answer: int) -> float:
    """Requests per second with answers of this length."""
    return record.served[answer]["requests_per_second"]


def longest_part(record: Record, answer: int) -> str:
    """The part of a request that takes most of the time, and its share."""
    part, share = max(record.served[answer]["shares"].items(), key=lambda item: item[1])
    return f"{TAKES[part]} {share:.0%} of the time"


def short(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def change(now: float, then: float) -> str:
    """The relative change, in percent."""
    share = 100 * (then / now - 1)
    if abs(share) < 0.05:
        return "the same"
    digits = 1 if abs(share) < 10 or share < -99 else 0
    return f"{share:+.{digits}f} %".replace("-", "−")


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two ranges meet."""
    return one[0] <= other[1] and other[0] <= one[1]


def costs(comparison: Comparison) -> list[dict[str, str]]:
    """Rows of what both models cost: label, now, then, change."""
    rows = []
    for cost in COSTS.values():
        pair = [cost.of(record) for record in (comparison.now, comparison.then)]
        cells, more = [short(value) for value in pair], change(*pair)
        if cost.spread is not None:
            ranges = [cost.spread(comparison.now), cost.spread(comparison.then)]
            cells = [f"{cell} [{short(low)}, {short(high)}]" for cell, (low, high) in zip(cells, ranges, strict=True)]
            more += ", within the spread" if overlap(*ranges) and more != "the same" else ""
        label = cost.title + (", estimated" if cost.estimated else "")
        rows.append({"label": label, "now": cells[0], "then": cells[1], "change": more})
    return rows


def differences(comparison: Comparison) -> list[dict[str, str]]:
    """Rows of the quality of both models: label, now, then, and the difference."""
    rows = []
    for measure in comparison.measures:
        cells = [scored(comparison.quality, measure, record) for record in (comparison.now, comparison.then)]
        more = comparison.quality.difference(measure, comparison.then.quality_name, comparison.now.quality_name)
        if cells != [NOT_MEASURED] * 2:
            change = "" if more is None else measure.with_interval(more, signed=True) + (", not paired" if more.low is None else "")
            rows.append({"label": measure.title, "now": cells[0], "then": cells[1], "change": change})
    return rows


NOT_MEASURED = "not measured"


def scored(quality: Quality, measure: Measure, record: Record) -> str:
    """A model's score with its interval."""
    score = quality.score(measure, record.quality_name)
    return NOT_MEASURED if score is None else measure.with_interval(score)


def lengths(comparison: Comparison) -> list[dict[str, str]]:
    """Rows of requests a second by the length of the answer: answer, now, then, change, verdict, and what takes most of the time then."""
    rows = []
    for answer in comparison.scenario.answers:
        now, then = rate(comparison.now, answer), rate(comparison.then, answer)
        gain = then / now - 1
        verdict = "helps" if gain >= HELPS else "hardly matters" if gain > -HELPS else "costs"
        row = {"answer": str(answer), "now": short(now), "then": short(then), "change": change(now, then), "verdict": verdict}
        rows.append(row | {"takes": longest_part(comparison.then, answer)})
    return rows
