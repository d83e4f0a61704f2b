"""Reading a whole data set before any step: every problem in it, by kind, and how long its samples are.

Notable: nothing stops at the first problem, and no model is started. Samples are read as training reads them (`data.llava`,
`data.samples.render`), so that what passes here passes there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparse_vlm.data.bad_images import absent, broken
from sparse_vlm.data.conversations import Mixture
from sparse_vlm.data.dataset import ConversationDataset, read_conversations
from sparse_vlm.data.llava import MISTAKES, LlavaFile, Mistake
from sparse_vlm.data.records import Record
from sparse_vlm.data.samples import longest_of, render
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo
from sparse_vlm.vlm.prompts import Renderer

_BAD_IMAGE = "or train with --on-bad-image skip or blank"
# kinds of problems, and what to do about each
KINDS = MISTAKES | {
    "missing image": f"put the image there, correct its path or --images, {_BAD_IMAGE}",
    "broken image": f"replace the image, {_BAD_IMAGE}",
    "repeated sample": "take all but one out; to learn from a file more often, write --data FILE=2",
    "label mask": "change the text that the message names; what carries loss must be the answers and nothing else",
    "too long": "shorten the conversation or split it",
}
# what is worth knowing and does no harm
NOTES = {"repeated id": "samples of other content share an id, as they do in LLaVA's own files; look for a sample by its number"}
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 12


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: a key of `KINDS` or `NOTES`, in which sample, and the case at hand."""

    kind: str
    sample: str
    text: str


@dataclass
class Report:
    """What is in a data set.

    Attributes:
        samples: all that were read, those with problems too.
        text_only, several_images: of those without mistakes in their text.
        images: different ones, named by samples without mistakes.
        conversations: of the same samples.
        lengths: for each of the samples that could be rendered its tokens: `all`, `image`, `text` and `with loss`, each (samples,).
        context: tokens that the LLM reads at most.
    """

    samples: int = 0
    text_only: int = 0
    several_images: int = 0
    images: int = 0
    conversations: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    context: int | None = None

    def document(self) -> dict[str, Any]:
        """All of it for programs."""
        histogram = histogram_of(self.lengths["all"])
        return {
            "samples": self.samples,
            "text_only": self.text_only,
            "several_pictures": self.several_images,
            "pictures": self.images,
            "conversations": self.conversations,
            "problems": _grouped(self.problems, KINDS),
            "notes": _grouped(self.notes, NOTES),
            "tokens": {name: summary(values) for name, values in self.lengths.items()},
            "histogram": [{"from": low, "to": high, "samples": count} for low, high, count in histogram],
        }


def _grouped(problems: Sequence[Problem], kinds: dict[str, str]) -> dict[str, Any]:
    return {
        kind: {"count": len(found), "what to do": advice, "cases": [asdict(problem) for problem in found]}
        for kind, advice in kinds.items()
        if (found := [problem for problem in problems if problem.kind == kind])
    }


def summary(values: np.ndarray) -> dict[str, float]:
    """Sum, mean, extremes and percentiles of token counts; nothing where there are none."""
    if not len(values):
        return {}
    percentiles = {f"{p} %": float(value) for p, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    return {
        "sum": int(values.sum()),
        "mean": round(float(values.mean()), 1),
        "min": int(values.min()),
        **percentiles,
        "max": int(values.max()),
    }


def histogram_of(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to, samples) of bins of one width, the last of which holds all that is longer than nearly all."""
    if not len(values):
        return []
    # one very long sample must not push all others into the first bin
    usual = values[values <= np.percentile(values, 99)]
    low, high = int(usual.min()), int(usual.max()) + 1
    width = max(1, -(-(high - low) // BINS))
    edges = list(range(low, high, width))
    counts, _ = np.histogram(values, [*edges, int(values.max()) + 1])
    tops = [edge - 1 for edge in edges[1:]] + [int(values.max())]
    return list(zip(edges, tops, counts.tolist(), strict=True))


class Checker:
    """Checks a data set in three steps, in this order: `read`, `look`, `render`; then `report` is whole.

    Args:
        files: LLaVA's; every sample is read, whatever the weight.
        photos: of tars.
        images: folder of the images that the files name.
        allow_outside: whether they may lie outside it.
        mix: what a stage says about the photos.
    """

    def __init__(
        self, files: Sequence[Path], photos: Sequence[Photo], images: Path | None, mix: Mixture, allow_outside: bool = False
    ) -> None:
        self.files, self.photos, self.images, self.mix, self.allow_outside = files, photos, images, mix, allow_outside
        self.report = Report()
        self.examples: ConversationDataset
        self._names: dict[str, str] = {}  # the first sample of an id
        self._contents: dict[int, str] = {}  # the first sample of a content

    def read(self, on_bytes: Callable[[int], None]) -> None:
        """Read all text.

        Raises:
            UserError: a file that cannot be read at all, or images without `images`.
        """
        open_file = functools.partial(LlavaFile, on_bytes=on_bytes, on_record=self._record, allow_outside=self.allow_outside)
        photos = {1.0: self.photos} if self.photos else {}
        self.examples = read_conversations([(path, 1.0) for path in self.files], photos, self.images, self.mix, open_file=open_file)
        report = self.report
        if not len(self.examples) and not report.problems:
            raise UserError(f"{', '.join(map(str, self.files))}: no samples")
        report.samples += len(self.examples)
        shown = np.array([len(self.examples.photo_numbers(index)) for index in range(len(self.examples))], dtype=np.int64)
        report.text_only, report.several_images = int((shown == 0).sum()), int((shown > 1).sum())
        report.images = len(self.examples.used_photos())

    def _record(self, name: str, record: Record, mistakes: list[Mistake]) -> None:
        self.report.problems += [Problem(mistake.kind, name, mistake.text) for mistake in mistakes]
        self.report.samples += bool(mistakes)
        if not isinstance(record.value, dict):
            return
        try:
            content = hash(json.dumps(record.value, sort_keys=True))
        except RecursionError:  # in a field that is not used
            return
        first = self._contents.setdefault(content, name)
        if first is not name:
            self.report.problems.append(Problem("repeated sample", name, f"is {first} once more"))
        elif "id" in record.value:
            first = self._names.setdefault(str(record.value["id"]), name)
            if first is not name:
                self.report.notes.append(Problem("repeated id", name, f"has the id of {first}"))

    def look(self, on_photos: Callable[[int], None], threads: int = 1) -> None:
        """Decode every image in full.

        Args:
            threads: that decode.
        """
        photos, wanted = self.examples.photos, self.examples.used_photos()
        users: dict[int, list[int]] = {}
        missing = absent(photos, wanted)
        bad: dict[int, tuple[str, str]] = {number: ("missing image", why) for number, why in missing.items()}

        def on_bad(number: int, error: ImageError) -> None:
            bad[number] = ("broken image", str(error))

        broken(photos, [number for number in wanted if number not in missing], on_bad, on_photos, threads)
        for index in range(len(self.examples)) if bad else ():
            for number in bad.keys() & set(self.examples.photo_numbers(index)):
                users.setdefault(number, []).append(index)
        for number, (kind, why) in sorted(bad.items()):
            first, *others = users[number]
            more = f" (and {len(others):,} more samples show it)" if others else ""
            name = self.examples[first].name
            self.report.problems.append(Problem(kind, name, why.removeprefix(f"{name}: ") + more))

    def render(self, renderer: Renderer, context: int | None, on_samples: Callable[[int], None]) -> None:
        """Render every sample that has no mistakes, and check its label mask.

        Args:
            context: tokens that the LLM reads at most.
        """
        self.report.context = context
        lengths: dict[str, list[int]] = {"all": [], "image": [], "text": [], "with loss": []}
        for index in range(len(self.examples)):
            example = self.examples[index]
            self.report.conversations += len(example.conversations)
            on_samples(1)
            try:
                tree = render(example, self.examples.photo_numbers(index), renderer).tree
            except UserError as error:
                self.report.problems.append(Problem("label mask", example.name, str(error).removeprefix(f"{example.name}: ")))
                continue
            longest = longest_of(tree)
            if context is not None and longest > context:
                self.report.problems.append(Problem("too long", example.name, f"{longest} tokens, but the LLM reads {context}"))
            shown = len(example.photos) * renderer.tokens_per_image
            for name, value in (("all", len(tree)), ("image", shown), ("text", len(tree) - shown), ("with loss", len(tree.targets))):
                lengths[name].append(value)
        self.report.lengths = {name: np.array(values, dtype=np.int64) for name, values in lengths.items()}
