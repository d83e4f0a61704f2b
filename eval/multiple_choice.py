"""Multiple choice: A-OKVQA by likelihood; ScienceQA (questions with an image) and MMBench by the letter that the model writes.

Sources: A-OKVQA (Schwenk et al. 2022); ScienceQA (Lu et al. 2022), scored as LLaVA's `eval_science_qa.py` does; MMBench (Liu et al. 2023):
each question is asked once for every rotation of its options, and counts where every round is right ("circular evaluation", section 4.2).
Prompts with letters are LLaVA's (`model_vqa_mmbench.py`, `model_vqa_science.py`). `mmbench_choice` is what MMBench's evaluator tries before
it asks an LLM (section 4, "heuristic matching"); no LLM is asked here, so an answer that it cannot place is wrong.

Notable: a file of MMBench may hold its rotations as rows of their own (`index` from a million on) or not; they are made here from the first
row, so that both give the same.
"""

from __future__ import annotations

import base64
import binascii
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.metrics import grouped_mean
from sparse_vlm.eval.questions import Asked, Item, QuestionTask, RecordTask, by_kind, photo_file
from sparse_vlm.eval.task import Data, Result
from sparse_vlm.eval.vqa import SHORT_ANSWER, credited, short_answer_prompt
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo

LETTERS = "ABCDE"
ANSWER_WITH_A_LETTER = "Answer with the option's letter from the given choices directly."
# What may stand around a letter, in the order in which it is looked for.
AROUND = (
    *(("", after) for after in ("", ".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)
ARTICLE_AMONG = 3  # in an answer of more words, a bare A is an article
MAX_NEW_TOKENS = 32
FIRST_ROTATION = 1_000_000  # rows from here on repeat the row of the same number below it with its options rotated
ASKED = f"question, options, '{ANSWER_WITH_A_LETTER}'; greedy, at most {MAX_NEW_TOKENS} tokens"


class AOKVQA(RecordTask):
    """Multiple choice that needs knowledge of the world.

    Beside accuracy stands the mean probability of the right choice, which moves with every question, also where no other choice overtakes:
    two hundred questions tell smaller differences by it.
    """

    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; accuracy: of the choice with the highest mean log-likelihood a token; probability: of the right "
        "choice, where those are the logits; chance is 25 % for both"
    )

    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """The question with its choices."""
        choices, right = record["choices"], record["correct_choice_idx"]
        about = {"question": record["question"], "choices": choices, "truth": choices[right]}
        return Item(photo, short_answer_prompt(record["question"]), right, about, choices=tuple(choices))

    def grade(self, item: Item, answer: list[float]) -> tuple[float, dict[str, Any]]:
        """1 for the right choice."""
        chosen = int(np.argmax(answer))
        record = {"answer": item.choices[chosen], "mean_log_likelihoods": [round(value, 4) for value in answer]}
        return float(chosen == item.truth), record

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """Accuracy, and the probability of the right choice."""
        result = super().result(asked, answers)
        shares = [np.exp(np.asarray(answer) - max(answer)) for answer in answers]
        right = [float(share[item.truth] / share.sum()) for (_, item), share in zip(asked, shares, strict=True)]
        result.metrics["probability"] = grouped_mean(right, [number for number, _ in asked])
        return result


class ScienceQA(QuestionTask):
    """Questions of ScienceQA's test split that have an image; the details hold its subjects."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("scienceqa/problems.json", "scienceqa/pid_splits.json", "scienceqa/images/test")
    protocol: ClassVar[str] = f"hint, {ASKED}; 'B', 'B. ...' or 'The answer is B', anything else is wrong"

    def items(self, data: Data) -> list[Item]:
        """Every question of the split that has an image."""
        problems, splits, folder = self.files
        found = []
        for number in data.document(splits)["test"]:
            row = data.document(problems)[number]
            if row["image"]:
                photo = photo_file(data.root / folder, f"{number}/{row['image']}")
                hint = f"Context: {row['hint']}" if row["hint"] else ""
                text, truth = lettered(row["question"], row["choices"], hint), {"options": row["choices"], "right": row["answer"]}
                about = {"question_id": number, "question": text, "truth": truth}
                found.append(Item(photo, text, truth, about, row["subject"]))
        return found

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """1 for the right letter."""
        return credited(answer, float(science_choice(answer, len(item.truth["options"])) == item.truth["right"]))


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


class MMBench(QuestionTask):
    """MMBench's English dev set."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("mmbench/MMBench_DEV_EN.tsv",)
    protocol: ClassVar[str] = (
        f"hint, {ASKED}; asked once for every rotation of the options, and right where every round is; one letter, or the text of one "
        "option, anything else is wrong"
    )

    def items(self, data: Data) -> list[Item]:
        """Every round of every question: its options rotated by one more each time, the first round as it is."""
        path, found = data.root / self.files[0], []
        csv.field_size_limit(sys.maxsize)  # a field is an image
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t"):
                if int(row["index"]) >= FIRST_ROTATION:
                    continue
                there = [letter for letter in LETTERS if _cell(row.get(letter))]
                if row["answer"] not in there:
                    problem = f"its answer {row['answer']!r} is none of its options {', '.join(there)}"
                    raise UserError(f"{path}: question {row['index']}: {problem}")
                options, right, hint = [row[letter] for letter in there], there.index(row["answer"]), _cell(row["hint"])
                photo = EncodedPhoto(row["index"], path, int(row["index"]) + 1, len(row["image"]), encoded=row["image"])
                for step in range(len(options)):
                    truth = {"options": options[step:] + options[:step], "right": (right - step) % len(options)}
                    text = lettered(row["question"], truth["options"], hint)
                    about = {"question_id": row["index"], "round": step, "question": text, "truth": LETTERS[truth["right"]]}
                    found.append(Item(photo, text, truth, about, row["category"]))
        return found

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """1 for the right option."""
        return credited(answer, float(mmbench_choice(answer, item.truth["options"]) == item.truth["right"]))

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """A question is right where all its rounds are."""
        predictions = super().result(asked, answers).predictions
        first = [i for i, prediction in enumerate(predictions) if prediction["round"] == 0]
        ends = [*first[1:], len(predictions)]
        every = [min(prediction["credit"] for prediction in predictions[i:end]) for i, end in zip(first, ends, strict=True)]
        photos, kinds = [asked[i][0] for i in first], [asked[i][1].kind for i in first]
        metrics = {
            "circular accuracy": grouped_mean(every, photos),
            "accuracy of the first round": grouped_mean([predictions[i]["credit"] for i in first], photos),
        }
        unclear = sum(mmbench_choice(answer, item.truth["options"]) is None for (_, item), answer in zip(asked, answers, strict=True))
        notes = [f"{unclear} of {len(answers)} answers name no option or several"]
        return Result(metrics, predictions, notes, by_kind("circular accuracy", every, photos, kinds))


def _cell(text: str | None) -> str:
    """The text of a cell; tables that went through pandas hold "nan" where there is nothing."""
    return text if text and text.strip().lower() != "nan" else ""


def lettered(question: str, options: Sequence[str], hint: str = "") -> str:
    """A question with its options, one a line, asking for a letter.

    Args:
        hint: stands on a line before the question.
    """
    lines = [*([hint] if hint else []), question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    return "\n".join([*lines, ANSWER_WITH_A_LETTER])


def science_choice(answer: str, options: int) -> int | None:
    """The option an answer means: "B", "B. ..." or "The answer is B"; None where it is none of them.

    Args:
        options: how many there are.
    """
    text = answer.replace("\n", ". ")
    found = re.fullmatch(r"\s*([A-E])\s*", text) or re.match(r"([A-E])\. ", text) or re.search(r"The answer is ([A-E])", text)
    number = LETTERS.index(found[1]) if found else options
    return number if number < options else None


def mmbench_choice(answer: str, options: Sequence[str]) -> int | None:
    """The option an answer means: by exactly one letter in it, or by the text of exactly one option; None where neither settles it."""
    words = answer.split()
    for before, after in AROUND:
        found = [number for number, letter in enumerate(LETTERS) if f"{before}{letter}{after}" in words]
        if len(found) == 1 and not (not before + after and "A" in words and len(words) > ARTICLE_AMONG):
            return found[0] if found[0] < len(options) else None
    found = [number for number, option in enumerate(options) if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None
