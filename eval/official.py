"""Benchmarks in the layout of their own files: entries with the images they are about, and a model's answers credited one by one.

Notable: images are looked for before the model is asked anything, so that one that is missing does not end a run halfway.
"""

from __future__ import annotations

import csv
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import Question, check_question, generated
from sparse_vlm.eval.metrics import Metric, grouped_share
from sparse_vlm.eval.task import Data, Result, VLMTask
from sparse_vlm.images.decode import read_file
from sparse_vlm.images.photos import Photo

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM

OnAnswers = Callable[[int, int], None]
Row = TypeVar("Row")


@dataclass(frozen=True)
class Entry:
    """A question of a benchmark.

    Attributes:
        number: of the question in its benchmark.
        photo: what it is about.
        question: as it is asked.
        truth: what its credit is decided by.
        kind: the part of the benchmark that it belongs to; empty for none.
    """

    number: str
    photo: Photo
    question: str
    truth: Any
    kind: str = ""


class FilePhoto(Photo):
    """An image in a file of its own, which is not looked for before it is read: a benchmark can name a hundred thousand."""

    def read(self) -> bytes:
        """The encoded bytes."""
        return read_file(self.source)


def photo_file(folder: Path, name: str) -> Photo:
    """The image of this name in a folder."""
    return FilePhoto(name, folder / name, 0, -1)


@contextmanager
def own_layout(where: Path | str) -> Iterator[None]:
    """What reads a benchmark's own file, or the line of one, that `where` names.

    Raises:
        UserError: it is in another layout.
    """
    try:
        yield
    except UserError:  # of a part, which has said where it is
        raise
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(f"{where}: not in the benchmark's own layout, which docs/evaluation.md shows ({error!r})") from None


def in_own_layout(data: Data, where: Path, read: Callable[[], list[Row]]) -> list[Row]:
    """What `read` makes of a benchmark's own files, once for all tasks.

    Args:
        where: the first of the files.

    Raises:
        UserError: a file in another layout.
    """
    with own_layout(where):
        return data.once(f"rows {where}", read)


def looked_at(data: Data, rows: Sequence[tuple[Photo, Row]], where: Path) -> tuple[list[Photo], list[tuple[int, Row]]]:
    """The photos that are looked at, each once, and what is asked about each with its photo's number.

    Args:
        where: the file that asks.

    Raises:
        UserError: an image that is not there, or fewer than two.
    """
    photos = data.cut(list(dict.fromkeys(photo for photo, _ in rows)))
    if len(photos) < 2:
        raise UserError(f"{where}: fewer than two images are asked about; raise --limit or check the file")
    if missing := [photo for photo in photos if not os.path.isfile(photo.source)]:
        raise UserError(f"{where}: {len(missing)} of {len(photos)} images are not there, such as {missing[0].source}")
    numbers = {photo: number for number, photo in enumerate(photos)}
    return photos, [(numbers[photo], row) for photo, row in rows if photo in numbers]


class OfficialTask(VLMTask):
    """A benchmark of questions that are answered in the model's own words, greedily."""

    max_new_tokens: ClassVar[int]

    @abstractmethod
    def entries(self, data: Data) -> list[Entry]:
        """Every question, read from `files`."""

    @abstractmethod
    def credit(self, answer: str, entry: Entry) -> float:
        """What an answer is worth, from 0 to 1."""

    def look_up(self, data: Data) -> None:
        """Make sure that its files are there.

        Raises:
            UserError: one is not.
        """
        for file in self.files:
            data.check(file)

    def asked(self, data: Data) -> tuple[list[Photo], list[tuple[int, Entry]]]:
        """The photos that are looked at, and each of their questions with its photo's number.

        Raises:
            UserError: a file in another layout, a question that cannot be asked, an image that is not there, or fewer than two photos.
        """
        where = data.root / self.files[0]
        entries = in_own_layout(data, where, lambda: self.entries(data))
        for entry in entries:
            at = f"{where}: question {entry.number}"
            check_question(entry.question, at)
            with own_layout(at):  # before the model is asked anything: a truth of another type cannot be compared with
                self.credit("", entry)
        return looked_at(data, [(entry.photo, entry) for entry in entries], where)

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, asked = self.asked(data)
        questions = [Question(number, entry.question) for number, entry in asked]
        answers = generated(model, photos, questions, control, self.max_new_tokens, on_answers)
        credits = [self.credit(answer, entry) for answer, (_, entry) in zip(answers, asked, strict=True)]
        owners = [number for number, _ in asked]
        predictions = [
            {
                "photo": entry.photo.key,
                "question_id": entry.number,
                "question": entry.question,
                "truth": entry.truth,
                "answer": answer,
                "credit": credit,
            }
            for (_, entry), answer, credit in zip(asked, answers, credits, strict=True)
        ]
        details = by_kind("accuracy", credits, owners, [entry.kind for _, entry in asked])
        return Result({"accuracy": grouped_share(credits, owners)}, predictions, details=details)


def by_kind(name: str, credits: list[float], owners: list[int], kinds: list[str]) -> dict[str, Metric]:
    """A metric of each kind of question, such as `number accuracy`; kinds in the order in which they come.

    Args:
        credits: of each question, from 0 to 1.
        owners: the photo of each question.
        kinds: of each question; empty for those of none.
    """
    values, of, kind_of = np.asarray(credits, float), np.asarray(owners), np.asarray(kinds)
    return {f"{kind} {name}": grouped_share(values[kind_of == kind], of[kind_of == kind]) for kind in dict.fromkeys(kinds) if kind}
