"""ScienceQA (questions with an image) and MMBench: lettered options, answered in the model's own words.

Sources: ScienceQA (Lu et al. 2022), scored as LLaVA does; MMBench (Liu et al. 2023): each question is asked once for every rotation of its
options, and counts where every round is right ("circular evaluation", section 4.2). Letters: `sparse_vlm.eval.lettered_options`.

Notable: a file of MMBench may hold its rotations as rows of their own (`index` from a million on) or not; they are made here from the first
row, so that both give the same.
"""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import Question, generated
from sparse_vlm.eval.lettered_options import ANSWER_WITH_A_LETTER, LETTERS, lettered, mmbench_choice, science_choice
from sparse_vlm.eval.metrics import grouped_share
from sparse_vlm.eval.official import Entry, OfficialTask, OnAnswers, by_kind, photo_file
from sparse_vlm.eval.task import Data, Result
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM

MAX_NEW_TOKENS = 32
FIRST_ROTATION = 1_000_000  # rows from here on repeat the row of the same number below it with its options rotated
ASKED = f"question, options, '{ANSWER_WITH_A_LETTER}'; greedy, at most {MAX_NEW_TOKENS} tokens"


class ScienceQA(OfficialTask):
    """Questions of ScienceQA's test split that have an image; the details hold its subjects."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("scienceqa/problems.json", "scienceqa/pid_splits.json", "scienceqa/images/test")
    protocol: ClassVar[str] = f"hint, {ASKED}; 'B', 'B. ...' or 'The answer is B', anything else is wrong"

    def entries(self, data: Data) -> list[Entry]:
        """Every question of the split that has an image."""
        problems, splits, folder = self.files
        found = []
        for number in data.document(splits)["test"]:
            row = data.document(problems)[number]
            if row["image"]:
                photo = photo_file(data.root / folder, f"{number}/{row['image']}")
                hint = f"Context: {row['hint']}" if row["hint"] else ""
                truth = {"options": row["choices"], "right": row["answer"]}
                found.append(Entry(number, photo, lettered(row["question"], row["choices"], hint), truth, row["subject"]))
        return found

    def credit(self, answer: str, entry: Entry) -> float:
        """1 for the right letter."""
        return float(science_choice(answer, len(entry.truth["options"])) == entry.truth["right"])


@dataclass(frozen=True)
class EncodedPhoto(Photo):
    """An image that a table holds in base64; its offset is the line."""

    encoded: str = field(default="", repr=False, compare=False)

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            ImageError: not base64.
        """
        try:
            return base64.b64decode(self.encoded, validate=True)
        except binascii.Error as error:
            raise ImageError(f"{self.source.name}:{self.key}: its image is not base64 ({error})") from None


class MMBench(OfficialTask):
    """MMBench's English dev set."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("mmbench/MMBench_DEV_EN.tsv",)
    protocol: ClassVar[str] = (
        f"hint, {ASKED}; asked once for every rotation of the options, and right where every round is; one letter, or the text of one "
        "option, anything else is wrong"
    )

    def entries(self, data: Data) -> list[Entry]:
        """The first round of every question."""
        return list(self._rows(data))

    def _rows(self, data: Data) -> Iterator[Entry]:
        path = data.root / self.files[0]
        csv.field_size_limit(sys.maxsize)  # a field is an image
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t"):
                if int(row["index"]) >= FIRST_ROTATION:
                    continue
                there = [letter for letter in LETTERS if _said(row.get(letter))]
                if row["answer"] not in there:
                    raise UserError(
                        f"{path}: question {row['index']}: its answer {row['answer']!r} is none of its options {', '.join(there)}"
                    )
                options, hint = [row[letter] for letter in there], _said(row["hint"])
                photo = EncodedPhoto(row["index"], path, int(row["index"]) + 1, len(row["image"]), encoded=row["image"])
                truth = {"question": row["question"], "hint": hint, "options": options, "right": there.index(row["answer"])}
                yield Entry(row["index"], photo, lettered(row["question"], options, hint), truth, row["category"])

    def credit(self, answer: str, entry: Entry) -> float:
        """1 for the right option in the round of this entry."""
        return float(mmbench_choice(answer, entry.truth["options"]) == entry.truth["right"])

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every round of every question."""
        photos, asked = self.asked(data)
        rounds = [(number, rotated) for number, entry in asked for rotated in rotations(entry)]
        questions = [Question(number, entry.question) for number, entry in rounds]
        answers = iter(generated(model, photos, questions, control, self.max_new_tokens, on_answers))
        predictions, first, every, unsettled, total = [], [], [], 0, 0
        for _, entry in asked:
            said = [(rotated, next(answers)) for rotated in rotations(entry)]
            credits = [self.credit(answer, rotated) for rotated, answer in said]
            total += len(said)
            unsettled += sum(mmbench_choice(answer, rotated.truth["options"]) is None for rotated, answer in said)
            first.append(credits[0])
            every.append(min(credits))
            for number, ((rotated, answer), credit) in enumerate(zip(said, credits, strict=True)):
                about = {"photo": entry.photo.key, "question_id": entry.number, "round": number, "question": rotated.question}
                predictions.append(about | {"truth": LETTERS[rotated.truth["right"]], "answer": answer, "credit": credit})
        owners, kinds = [number for number, _ in asked], [entry.kind for _, entry in asked]
        metrics = {"circular accuracy": grouped_share(every, owners), "accuracy of the first round": grouped_share(first, owners)}
        notes = [f"{unsettled} of {total} answers name no option or several"]
        return Result(metrics, predictions, notes, by_kind("circular accuracy", every, owners, kinds))


def _said(cell: str | None) -> str:
    """What a cell says; tables that went through pandas hold "nan" where there is nothing."""
    return cell if cell and cell.strip().lower() != "nan" else ""


def rotations(entry: Entry) -> list[Entry]:
    """The entry once for every place that its first option can have; the first as it is."""
    truth = entry.truth
    count = len(truth["options"])
    found = []
    for step in range(count):
        options = truth["options"][step:] + truth["options"][:step]
        turned = truth | {"options": options, "right": (truth["right"] - step) % count}
        found.append(Entry(entry.number, entry.photo, lettered(truth["question"], options, truth["hint"]), turned, entry.kind))
    return found
