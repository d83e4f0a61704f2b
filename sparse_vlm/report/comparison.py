"""Two models in a case beside each other: every cost, every measure of quality, and requests a second by the length of the answer.

Notable: what is compared is one more entry in `LINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from sparse_vlm.bench.serving import HELPS
from sparse_vlm.bench.summary import Row
from sparse_vlm.report.quality import Measure, Quality
from sparse_vlm.report.records import Case, Entry

TOOK = {
    "picture": "decoding and resizing the picture",
    "tower": "tower and projector",
    "prompt": "reading the prompt",
    "answer": "writing the answer",
}


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        document: the benchmark.
        entries: all models in the case.
        now, then: the model in use, and the one that would take its place.
        measures: what was asked for of quality.
        sources: names of the files.
    """

    document: Row
    case: Case
    quality: Quality
    entries: Sequence[Entry]
    now: Entry
    then: Entry
    measures: Sequence[Measure]
    sources: Sequence[str]

    @property
    def llm(self) -> Row:
        """The language model."""
        return next(llm for llm in self.document["llms"] if (llm["name"], llm["dtype"]) == (self.case.llm, self.case.dtype))

    @property
    def llm_name(self) -> str:
        """What a reader sees of it: without the folders that it lies in."""
        return PurePath(self.case.llm).name

    @property
    def shown(self) -> list[Measure]:
        """The measures that some model of the case has."""
        return [measure for measure in self.measures if self._known(measure)]

    @property
    def drawn(self) -> list[Measure]:
        """The measures that several models of the case have, which makes a front."""
        return [measure for measure in self.measures if self._known(measure) > 1]

    def _known(self, measure: Measure) -> int:
        return sum(self.quality.score(measure, entry.worth) is not None for entry in self.entries)


@dataclass(frozen=True)
class Line:
    """A cost that two models are compared by.

    Attributes:
        of: of a model in a case.
        spread: quartiles, where it is a time that was measured.
        estimated: put together from measured pieces.
    """

    label: str
    of: Callable[[Entry, Case], float]
    spread: Callable[[Entry], tuple[float, float]] | None = None
    estimated: bool = False


LINES = (
    Line("tokens an image", lambda e, c: e.request["tokens"]),
    Line("tower, M parameters", lambda e, c: e.model["parameters"] / 1e6),
    Line("tower, GMACs an image", lambda e, c: e.model["macs"] / 1e9),
    Line("to the first token, GMACs a request", lambda e, c: e.request["macs"] / 1e9 / c.batch),
    Line("tower and projector, ms", lambda e, c: milliseconds(e, "tower", "projector"), lambda e: e.spread("tower", "projector")),
    Line("reading the prompt, ms", lambda e, c: milliseconds(e, "prefill"), lambda e: e.spread("prefill")),
    Line("to the first token, ms", lambda e, c: milliseconds(e, "ttft"), Entry.first_token_spread),
    Line("a token of the answer, ms", lambda e, c: milliseconds(e, "decode"), lambda e: e.spread("decode")),
    Line("to the end of the answer, s", lambda e, c: c.batch / rate(e, c.answer), estimated=True),
    Line("requests a second", lambda e, c: rate(e, c.answer), estimated=True),
    Line("keys and values, MB a picture", lambda e, c: e.request["kv_bytes_per_image"] / 1e6),
    Line("memory in all, GB", lambda e, c: e.served[c.answer]["memory_bytes"] / 1e9, estimated=True),
)


def milliseconds(entry: Entry, *stages: str) -> float:
    """Of a batch in some stages."""
    return sum(entry.request["ms"][stage] for stage in stages)


def rate(entry: Entry, answer: int) -> float:
    """Requests a second with answers of so many tokens."""
    return entry.served[answer]["requests_per_second"]


def longest_part(entry: Entry, answer: int) -> str:
    """What takes most of a request's time, and its share of it."""
    part, share = max(entry.served[answer]["shares"].items(), key=lambda item: item[1])
    return f"{TOOK[part]} takes {share:.0%} of the time"


def short(value: float) -> str:
    """Three digits that count, whole numbers whole."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def change(now: float, then: float) -> str:
    """How much more or less, as a share."""
    share = 100 * (then / now - 1)
    if abs(share) < 0.05:
        return "the same"
    digits = 1 if abs(share) < 10 or share < -99 else 0
    return f"{share:+.{digits}f} %".replace("-", "−")


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two ranges meet."""
    return one[0] <= other[1] and other[0] <= one[1]


def costs(subject: Subject) -> list[dict[str, str]]:
    """Rows of what both models cost: label, now, then, change."""
    rows = []
    for line in LINES:
        pair = [line.of(entry, subject.case) for entry in (subject.now, subject.then)]
        cells, more = [short(value) for value in pair], change(*pair)
        if line.spread is not None:
            ranges = [line.spread(subject.now), line.spread(subject.then)]
            cells = [f"{cell} [{short(low)}, {short(high)}]" for cell, (low, high) in zip(cells, ranges, strict=True)]
            more += ", within the spread" if overlap(*ranges) and more != "the same" else ""
        label = line.label + (", estimated" if line.estimated else "")
        rows.append({"label": label, "now": cells[0], "then": cells[1], "change": more})
    return rows


def worths(subject: Subject) -> list[dict[str, str]]:
    """Rows of what both models are worth: label, now, then, and the difference."""
    rows = []
    for measure in subject.measures:
        cells = [scored(subject.quality, measure, entry) for entry in (subject.now, subject.then)]
        more = subject.quality.difference(measure, subject.then.worth, subject.now.worth)
        if cells != [NOT_MEASURED] * 2:
            change = "" if more is None else measure.with_interval(more, signed=True) + (", not paired" if more.low is None else "")
            rows.append({"label": measure.title, "now": cells[0], "then": cells[1], "change": change})
    return rows


NOT_MEASURED = "not measured"


def scored(quality: Quality, measure: Measure, entry: Entry) -> str:
    """What a model reached, with its interval."""
    score = quality.score(measure, entry.worth)
    return NOT_MEASURED if score is None else measure.with_interval(score)


def lengths(subject: Subject) -> list[dict[str, str]]:
    """Rows of requests a second by the length of the answer: answer, now, then, change, verdict, and what takes most of the time then."""
    rows = []
    for answer in subject.case.answers:
        now, then = rate(subject.now, answer), rate(subject.then, answer)
        gain = then / now - 1
        verdict = "helps" if gain >= HELPS else "hardly matters" if gain > -HELPS else "costs"
        row = {"answer": str(answer), "now": short(now), "then": short(then), "change": change(now, then), "verdict": verdict}
        rows.append(row | {"takes": longest_part(subject.then, answer)})
    return rows
