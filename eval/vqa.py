"""Questions answered in the model's own words: VQAv2, GQA, TextVQA, A-OKVQA without its choices, counting, and MM-Vet.

Sources: VQAv2 (Goyal et al. 2017), GQA (Hudson & Manning 2019), TextVQA (Singh et al. 2019), A-OKVQA (Schwenk et al. 2022), MM-Vet (Yu et
al. 2023). All but MM-Vet are asked as LLaVA-1.5 asks (question, then "Answer the question using a single word or phrase."), except that
TextVQA's questions come without the OCR tokens that LLaVA adds. How answers are compared: `sparse_vlm.eval.normalise`.

Notable: MM-Vet's answers are judged by GPT-4, so nothing is scored here; they are written as its evaluator takes them, `{"v1_0": "...",
"v1_1": "..."}`. Its questions are counted from 1 in our tar, which is made of VLMEvalKit's table, and from 0 in MM-Vet's own files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from sparse_vlm.errors import UserError
from sparse_vlm.eval.metrics import grouped_mean
from sparse_vlm.eval.normalise import gqa_answer, human_accuracy, m4c_answer, vqa_answer
from sparse_vlm.eval.questions import LAYOUT, Asked, Item, QuestionTask, RecordTask, check_records, photo_file
from sparse_vlm.eval.task import Data, Result
from sparse_vlm.images.photos import Photo
from sparse_vlm.utils.schema import check

SHORT_ANSWER = "Answer the question using a single word or phrase."
ASKED = f"question, then '{SHORT_ANSWER}'; greedy, at most {QuestionTask.max_new_tokens} tokens"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
OPEN, BINARY = "open", "binary"  # GQA's names for questions of the structural type `query`, and for all others


def short_answer_prompt(question: str) -> str:
    """The question, and that its answer be short."""
    return f"{question.strip()}\n{SHORT_ANSWER}"


def short_answer(number: Any, photo: Photo, question: str, truth: Any, kind: str = "") -> Item:
    """A question that asks for a short answer."""
    text = short_answer_prompt(question)
    return Item(photo, text, truth, {"question_id": str(number), "question": text, "truth": truth}, kind)


class VQAv2(QuestionTask):
    """VQA v2's validation set; the details hold its answer types: yes/no, number, other."""

    files = ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/v2_mscoco_val2014_annotations.json", "vqav2/val2014")
    protocol: ClassVar[str] = f"{ASKED}; VQA accuracy: min(annotators that agree / 3, 1), averaged over all subsets of nine annotators"

    def items(self, data: Data) -> list[Item]:
        """Every question with its ten answers."""
        questions, annotations, folder = self.files
        answered = {row["question_id"]: row for row in data.document(annotations)["annotations"]}
        found = []
        for row in data.document(questions)["questions"]:
            about = answered[row["question_id"]]
            photo = photo_file(data.root / folder, f"COCO_val2014_{row['image_id']:012d}.jpg")
            humans = [one["answer"] for one in about["answers"]]
            found.append(short_answer(row["question_id"], photo, row["question"], humans, about["answer_type"]))
        return found

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """VQA accuracy."""
        return credited(answer, human_accuracy(answer, item.truth, vqa_answer))


class GQA(QuestionTask):
    """GQA's balanced testdev; the details hold accuracy on open and on binary questions."""

    files = ("gqa/testdev_balanced_questions.json", "gqa/images")
    protocol: ClassVar[str] = f"{ASKED}; the very answer, in lower case and without a full stop"

    def items(self, data: Data) -> list[Item]:
        """Every question with its answer."""
        questions, folder = self.files
        found = []
        for number, row in data.document(questions).items():
            photo = photo_file(data.root / folder, f"{row['imageId']}.jpg")
            kind = OPEN if row["types"]["structural"] == "query" else BINARY
            found.append(short_answer(number, photo, row["question"], row["answer"], kind))
        return found

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """1 for the very answer."""
        return credited(answer, float(gqa_answer(answer) == item.truth))


class TextVQA(QuestionTask):
    """TextVQA's validation set."""

    files = ("textvqa/TextVQA_0.5.1_val.json", "textvqa/train_images")
    protocol: ClassVar[str] = f"{ASKED}, no OCR tokens; VQA accuracy after M4C's normalisation, as LLaVA computes it"

    def items(self, data: Data) -> list[Item]:
        """Every question with its ten answers."""
        questions, folder = self.files
        rows = data.document(questions)["data"]
        photos = [photo_file(data.root / folder, f"{row['image_id']}.jpg") for row in rows]
        return [short_answer(row["question_id"], photo, row["question"], row["answers"]) for row, photo in zip(rows, photos, strict=True)]

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """VQA accuracy."""
        return credited(answer, human_accuracy(answer, item.truth, m4c_answer))


class AOKVQADirect(RecordTask):
    """A-OKVQA without its choices: a word or two, compared with what ten people answered."""

    left_out_because = "are marked as difficult and left out"
    protocol: ClassVar[str] = (
        f"{ASKED}, in lower case and without a full stop at the end; min(people who said exactly that / 3, 1); questions that are marked "
        "as difficult to answer so are left out"
    )

    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """The question with what people answered."""
        check(record, {"direct_answers": [str], "difficult_direct_answer": bool}, f"{self.files[0]}: {photo.key}", LAYOUT)
        people = record["direct_answers"]
        about = {"question": record["question"], "truth": people}
        return Item(photo, short_answer_prompt(record["question"]), people, about, left_out=record["difficult_direct_answer"])

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """A third for each of ten people who gave the answer, at most 1."""
        predicted = answer.strip().lower().removesuffix(".")
        return credited(answer, min(1.0, sum(predicted == one.lower() for one in item.truth) / 3))


class Counting(RecordTask):
    """Counting questions of GVT."""

    max_new_tokens = 8
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; greedy, at most {max_new_tokens} tokens; the first number in the answer must be the right one"
    )

    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """The question `q` with the number `a`."""
        if not record["a"].strip().isdecimal():
            raise UserError(f"{self.files[0]}: {photo.key}: the answer is {record['a']!r}, expected a number")
        about = {"question": record["q"], "truth": record["a"]}
        return Item(photo, short_answer_prompt(record["q"]), int(record["a"]), about)

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """1 for the right number."""
        return float(first_number(answer) == item.truth), {"answer": answer}

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """Accuracy, and how many answers hold no number."""
        result = super().result(asked, answers)
        result.notes = [f"{sum(first_number(answer) is None for answer in answers)} of {len(answers)} answers hold no number"]
        return result


class MMVet(QuestionTask):
    """Answers to MM-Vet's open questions, for its own evaluator."""

    files = ("eval/mmvet.tar",)
    max_new_tokens = 128
    protocol: ClassVar[str] = (
        f"question as it is; greedy, at most {max_new_tokens} tokens; not scored here: --out writes the answers for MM-Vet's evaluator, "
        "which asks GPT-4"
    )

    def items(self, data: Data) -> list[Item]:
        """Every question, in the benchmark's order; the truth is the whole record."""
        (file,) = self.files
        found = []
        for photo in data.everything(file):
            for record in check_records(photo.info.get("questions") or [], "questions", f"{data.root / file}: {photo.key}"):
                about = {"question": record["q"], "truth": record["a"], "category": record["category"]}
                found.append(Item(photo, record["q"].strip(), record, about))
        return sorted(found, key=lambda item: item.truth["index"])

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """No credit."""
        return 0.0, {"answer": answer}

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """The answers as the evaluator takes them, and how long they are."""
        result = super().result(asked, answers)
        words = [len(answer.split()) for answer in answers]
        result.metrics = {"words an answer": grouped_mean(words, [number for number, _ in asked], unit="")}
        result.submission = {f"v1_{item.truth['index'] - 1}": answer for (_, item), answer in zip(asked, answers, strict=True)}
        if guessed := sum(item.truth.get("image_inferred", False) for _, item in asked):
            result.notes = [f"{guessed} of {len(asked)} questions stand with an image that was inferred from the order of the set"]
        return result

    def run(self, model: Any, control: str, data: Data, on_answers: Any) -> Result:
        """Ask every question."""
        result = super().run(model, control, data, on_answers)
        if data.limit is not None:
            result.notes.append("a part of the questions, which MM-Vet's evaluator does not take")
        return result


def credited(answer: str, credit: float) -> tuple[float, dict[str, Any]]:
    """A graded answer whose prediction holds the credit."""
    return credit, {"answer": answer, "credit": credit}


def first_number(answer: str) -> int | None:
    """The first number of an answer, in digits or as a word up to twelve; None where there is none."""
    found = re.search(rf"\d+|\b(?:{'|'.join(NUMBERS)})\b", answer.lower())
    if found is None:
        return None
    return int(found[0]) if found[0].isdigit() else NUMBERS.index(found[0])
