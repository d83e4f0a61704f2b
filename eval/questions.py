"""Tasks of questions: what is asked about which image, how answers are graded, and where the questions come from.

Notable: every question is read and checked, and every image looked for, before the model is asked anything, so that a faulty one does not
end a run halfway. Questions lie beside the photos of a tar (`tar_records`), or in the files that a benchmark's authors publish.
"""

from __future__ import annotations

import csv
import json
import os
from abc import abstractmethod
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import OnAnswers, Question, check_question, generated, scored
from sparse_vlm.eval.metrics import Metric, grouped_mean
from sparse_vlm.eval.task import Data, Result, VLMTask
from sparse_vlm.images.decode import read_file
from sparse_vlm.images.photos import Photo
from sparse_vlm.utils.documents import is_encodable, parse_json
from sparse_vlm.utils.schema import COUNT, check

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM

FILE = "eval/coco_vqa.tar"
LAYOUT = "docs/evaluation.md shows the layout"
POPE_SPLITS = ("random", "popular", "adversarial")
_QUESTION = {"q": str, "a": str, "s": str}
_PAIR = {"type": str, "pos": str, "neg": str, "vote?": float}
RECORDS: dict[str, dict[str, Any]] = {  # what a question of each field must hold, as `utils.schema.check` takes it
    "pope": _QUESTION,
    "qa": _QUESTION,
    "aokvqa": {
        "question": str,
        "choices": [str],
        "correct_choice_idx": COUNT,
        "direct_answers?": [str],
        "difficult_direct_answer?": bool,
    },
    "vsr": {"statement": str, "label": int, "relation": str},
    "sugarcrepe": _PAIR,
    "valse": _PAIR,
    "questions": {"q": str, "a": (str, float), "index": COUNT, "category": str, "image_inferred?": bool},
}


@dataclass(frozen=True)
class Item:
    """A question of a task.

    Attributes:
        text: as the model is asked.
        truth: what an answer is graded by.
        about: what a prediction says of the question.
        kind: the part of the benchmark that it belongs to, for the details; empty for none.
        choices: the answers whose likelihoods are compared; none for an answer in the model's own words.
        left_out: not asked, though its photo counts for `--limit` and the controls.
    """

    photo: Photo
    text: str
    truth: Any
    about: dict[str, Any] = field(default_factory=dict)
    kind: str = ""
    choices: tuple[str, ...] = ()
    left_out: bool = False


Asked = Sequence[tuple[int, Item]]  # questions, each with its photo's number


class QuestionTask(VLMTask):
    """A task of questions, all answered in the model's own words (greedily) or all by the likelihoods of choices."""

    max_new_tokens: ClassVar[int] = 16
    likelihood: ClassVar[str] = "mean"  # the log-likelihood of a choice: the `mean` of its tokens or their `total`
    left_out_because: ClassVar[str] = ""  # for a note on how many questions are

    @abstractmethod
    def items(self, data: Data) -> list[Item]:
        """Every question, read from `files`."""

    @abstractmethod
    def grade(self, item: Item, answer: Any) -> tuple[float, dict[str, Any]]:
        """The credit of an answer, from 0 to 1, and what a prediction says of it.

        Args:
            answer: a text, or the log-likelihood of each choice.
        """

    def asked(self, data: Data) -> tuple[list[Photo], list[tuple[int, Item]]]:
        """The photos, at most `--limit`, and each of their questions with its photo's number.

        Raises:
            UserError: a file in another layout, a question that cannot be asked, an image that is not there, or fewer than two photos.
        """
        where = data.root / self.files[0]
        items: list[Item] = data.once(self, lambda: self._checked(data, where))
        photos = data.cut(list(dict.fromkeys(item.photo for item in items)))
        if len(photos) < 2:
            raise UserError(f"{where}: fewer than two images are asked about; raise --limit or check --data")
        if missing := [photo for photo in photos if not os.path.isfile(photo.source)]:
            raise UserError(f"{where}: {len(missing)} of {len(photos)} images are not there, such as {missing[0].source}")
        numbers = {photo: number for number, photo in enumerate(photos)}
        return photos, [(numbers[item.photo], item) for item in items if item.photo in numbers]

    def _checked(self, data: Data, where: Path) -> list[Item]:
        with own_layout(where):
            items = self.items(data)
        for item in items:
            at = f"{where}: question {item.about.get('question_id', item.photo.key)}"
            check_question(item.text, at)
            if not item.choices:
                with own_layout(at):  # a truth of another type cannot be compared with
                    self.grade(item, "")
        return items

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, found = self.asked(data)
        asked = [(number, item) for number, item in found if not item.left_out]
        if not asked:
            raise UserError(f"{data.root / self.files[0]}: every question is left out; raise --limit")
        questions = [Question(number, item.text, item.choices) for number, item in asked]
        answers: Sequence[Any]
        if asked[0][1].choices:
            scores = scored(model, photos, questions, control, on_answers)
            answers = [[getattr(score, self.likelihood) for score in of_choices] for of_choices in scores]
        else:
            answers = generated(model, photos, questions, control, self.max_new_tokens, on_answers)
        result = self.result(asked, answers)
        if self.left_out_because and (left := len(found) - len(asked)):
            result.notes.append(f"{left} of {len(found)} questions {self.left_out_because}")
        return result

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """What the answers are worth: accuracy, and that of each kind in the details."""
        grades = [self.grade(item, answer) for (_, item), answer in zip(asked, answers, strict=True)]
        predictions = [{"photo": item.photo.key} | item.about | record for (_, item), (_, record) in zip(asked, grades, strict=True)]
        credits, photos = [credit for credit, _ in grades], [number for number, _ in asked]
        details = by_kind("accuracy", credits, photos, [item.kind for _, item in asked])
        return Result({"accuracy": grouped_mean(credits, photos)}, predictions, details=details)


def by_kind(name: str, credits: Sequence[float], photos: Sequence[int], kinds: Sequence[str]) -> dict[str, Metric]:
    """A metric of each kind of question, such as `number accuracy`; kinds in the order in which they come.

    Args:
        credits, photos, kinds: of each question: its credit from 0 to 1, its photo's number, and its kind, empty for none.
    """
    values, of, kind_of = np.asarray(credits, float), np.asarray(photos), np.asarray(kinds)
    return {f"{kind} {name}": grouped_mean(values[kind_of == kind], of[kind_of == kind]) for kind in dict.fromkeys(kinds) if kind}


class FilePhoto(Photo):
    """An image file that is not opened before it is read: a benchmark can name a hundred thousand."""

    def read(self) -> bytes:
        """The encoded bytes."""
        return read_file(self.source)


def photo_file(folder: Path, name: str) -> Photo:
    """The image of this name in a folder."""
    return FilePhoto(name, folder / name, 0, -1)


@contextmanager
def own_layout(where: Path | str) -> Iterator[None]:
    """Errors of code that reads a benchmark's own file, or the line of one, as one line that begins with `where`.

    Raises:
        UserError: the file is in another layout.
    """
    try:
        yield
    except UserError:  # of a part; its message names it
        raise
    except (LookupError, TypeError, AttributeError, ValueError, csv.Error) as error:
        raise UserError(f"{where}: not in the benchmark's own layout, which docs/evaluation.md shows ({error!r})") from None


def check_records(records: Any, field: str, where: str) -> list[dict[str, Any]]:
    """The questions of a field, after a check.

    Args:
        field: a key of `RECORDS`.

    Raises:
        UserError: a question is not as it must be; the line begins with `where`, and names the part.
    """
    check(records, [RECORDS[field]], f"{where}: {field}", LAYOUT)
    for number, record in enumerate(records):
        at = f"{where}: {field}[{number}]"
        if "choices" in record and record["correct_choice_idx"] >= len(record["choices"]):
            raise UserError(f"{at}: correct_choice_idx is {record['correct_choice_idx']} of {len(record['choices'])} choices; {LAYOUT}")
        if not is_encodable(json.dumps(record, ensure_ascii=False)):
            raise UserError(f"{at}: a text holds half of a character (a surrogate alone); write the whole one")
    return records


def says_yes(answer: str, where: str) -> bool:
    """The truth of a yes/no record.

    Raises:
        UserError: neither yes nor no.
    """
    word = answer.strip().rstrip(".").lower()
    if word not in ("yes", "no"):
        raise UserError(f"{where}: the answer is {answer!r}, expected yes or no")
    return word == "yes"


@dataclass(frozen=True)
class Records:
    """Questions that several tasks ask.

    Attributes:
        files: what is read below the data folder.
        read: every photo with a question (fields as `RECORDS` has them).
    """

    files: tuple[str, ...]
    read: Callable[[Data], list[tuple[Photo, dict[str, Any]]]]


def tar_records(field: str, source: str | None = None, file: str = FILE) -> Records:
    """Questions in the json beside each photo of a tar.

    Args:
        field: of the json, a key of `RECORDS`.
        source: keeps to the questions whose `s` is this; all by default.
    """

    def read(data: Data) -> list[tuple[Photo, dict[str, Any]]]:
        found = []
        for photo in data.everything(file):
            records = check_records(photo.info.get(field) or [], field, f"{data.root / file}: {photo.key}")
            found += [(photo, record) for record in records if source is None or record["s"] == source]
        return found

    return Records((file,), read)


def _read_pope(data: Data) -> list[tuple[Photo, dict[str, Any]]]:
    """POPE's three files about COCO photos, a json a line."""
    found = []
    *files, folder = POPE_FILES.files
    for split, file in zip(POPE_SPLITS, files, strict=True):
        lines = [line for line in read_file(data.root / file).removeprefix(BOM_UTF8).split(b"\n") if line.strip()]
        for number, line in enumerate(lines, 1):
            where = f"{data.root / file}, line {number}"
            with own_layout(where):
                row = parse_json(line, where)
                record = {"q": row["text"], "a": row["label"], "s": f"pope_coco_{split}"}
                found.append((photo_file(data.root / folder, row["image"]), record))
                says_yes(row["label"], where)
    check_records([record for _, record in found], "pope", str(data.root / files[0]))
    return found


def _read_aokvqa(data: Data) -> list[tuple[Photo, dict[str, Any]]]:
    """A-OKVQA's validation set, as it is in its file."""
    file, folder = AOKVQA_FILES.files
    used = ("image_id", "question", "choices", "correct_choice_idx", "direct_answers", "difficult_direct_answer")
    rows = check_records([{name: row[name] for name in used} for row in data.document(file)], "aokvqa", str(data.root / file))
    return [(photo_file(data.root / folder, f"{row['image_id']:012d}.jpg"), row) for row in rows]


POPE_FILES = Records((*(f"pope/coco_pope_{split}.json" for split in POPE_SPLITS), "pope/val2014"), _read_pope)
AOKVQA_FILES = Records(("aokvqa/aokvqa_v1p0_val.json", "aokvqa/val2017"), _read_aokvqa)


class RecordTask(QuestionTask):
    """A question task on `Records`."""

    def __init__(self, records: Records) -> None:
        self.records, self.files = records, records.files

    def items(self, data: Data) -> list[Item]:
        """An item of each record."""
        return [self.item(photo, record) for photo, record in self.records.read(data)]

    @abstractmethod
    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """A record as it is asked."""
