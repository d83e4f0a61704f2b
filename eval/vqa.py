"""Questions with one right answer: POPE, existence and VSR (yes or no), A-OKVQA (multiple choice), counting (a number).

Notable: yes/no and multiple choice are answered by comparing the likelihoods of the possible answers, which is deterministic, never
ambiguous and one forward pass a photo; POPE's own protocol generates and looks for "no" among the words. Questions end as LLaVA's do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import Question, generated, scored
from sparse_vlm.eval.metrics import grouped_share, yes_no
from sparse_vlm.eval.task import Data, Result, VLMTask
from sparse_vlm.photos import Photo

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM

FILE = "eval/coco_vqa.tar"
SHORT_ANSWER = "Answer the question using a single word or phrase."
YES_NO = ("Yes", "No")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
OnAnswers = Callable[[int, int], None]


def records_of(data: Data, field: str, source: str | None = None) -> tuple[list[Photo], list[tuple[int, dict[str, Any]]]]:
    """The photos that have questions in `field` (of that source), and each question with its photo's number.

    Raises:
        UserError: no photo has one.
    """

    def asked(photo: Photo) -> list[dict[str, Any]]:
        return [record for record in photo.info.get(field, []) if source is None or record["s"] == source]

    photos = data.cut([photo for photo in data.everything(FILE) if asked(photo)])
    if len(photos) < 2:
        raise UserError(f"{FILE}: fewer than two photos with {source or field} questions; raise --limit or check --data")
    return photos, [(i, record) for i, photo in enumerate(photos) for record in asked(photo)]


def short_answer_prompt(question: str) -> str:
    """The question, and that its answer be short."""
    return f"{question.strip()}\n{SHORT_ANSWER}"


def asking(photo: int, question: str, choices: tuple[str, ...] = ()) -> Question:
    """A question that asks for a short answer."""
    return Question(photo, short_answer_prompt(question), choices)


def says_yes(answer: str, where: str) -> bool:
    """The truth of a yes/no record.

    Raises:
        UserError: neither.
    """
    word = answer.strip().rstrip(".").lower()
    if word not in ("yes", "no"):
        raise UserError(f"{where}: the answer is {answer!r}, expected yes or no")
    return word == "yes"


class _YesNo(VLMTask):
    """Is it there? By the likelihoods of "Yes" and "No"."""

    files = (FILE,)
    field: ClassVar[str]
    source: ClassVar[str | None] = None
    has_splits: ClassVar[bool] = False

    def as_question(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record as question `q`, answer `a` and split `s`, which most are already."""
        return record

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, found = records_of(data, self.field, self.source)
        records = [(i, self.as_question(record)) for i, record in found]
        truth = [says_yes(record["a"], f"{FILE}: {photos[i].key}") for i, record in records]
        likelihoods = scored(model, photos, [asking(i, record["q"], YES_NO) for i, record in records], control, on_answers)
        said = [yes.total > no.total for yes, no in likelihoods]
        splits = np.array([record["s"] for _, record in records])
        owner = np.array([i for i, _ in records])
        details = {}
        for split in dict.fromkeys(splits.tolist()) if self.has_splits else ():
            of = splits == split
            scores = yes_no(np.array(said)[of], np.array(truth)[of], owner[of])
            details |= {f"{split.removeprefix('pope_').replace('_', ' ')} {name}": metric for name, metric in scores.items()}
        predictions = [
            {
                "photo": photos[i].key,
                "split": record["s"],
                "question": record["q"],
                "truth": YES_NO[not t],
                "answer": YES_NO[not s],
                "log_likelihoods": [round(score.total, 4) for score in pair],
            }
            for (i, record), t, s, pair in zip(records, truth, said, likelihoods, strict=True)
        ]
        return Result(yes_no(said, truth, owner), predictions, details=details)


class Pope(_YesNo):
    """POPE over COCO and A-OKVQA objects: random, popular and adversarial absent objects."""

    field, has_splits = "pope", True
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'; all splits together, each split in the details"
    )


class Existence(_YesNo):
    """Existence questions of GVT."""

    field, source = "qa", "gvt_mci"
    protocol: ClassVar[str] = f"question, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'"


class VSR(_YesNo):
    """Statements of Visual Spatial Reasoning (Liu et al. 2023) about where two things are; a prediction's split is the relation."""

    field = "vsr"
    ASKED: ClassVar[str] = "Is this statement true?"  # as the stage `instruct` asks
    protocol: ClassVar[str] = f"'{ASKED}', statement, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'; chance is 50 %"

    def as_question(self, record: dict[str, Any]) -> dict[str, Any]:
        """A statement as a question."""
        return {"q": f"{self.ASKED} {record['statement']}", "a": YES_NO[not record["label"]], "s": record["relation"]}


class AOKVQA(VLMTask):
    """Multiple choice that needs knowledge of the world."""

    files = (FILE,)
    protocol: ClassVar[str] = f"question, then '{SHORT_ANSWER}'; the choice with the highest mean log-likelihood a token; chance is 25 %"

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, records = records_of(data, "aokvqa")
        questions = [asking(i, record["question"], tuple(record["choices"])) for i, record in records]
        likelihoods = scored(model, photos, questions, control, on_answers)
        chosen = [int(np.argmax([score.mean for score in row])) for row in likelihoods]
        predictions = [
            {
                "photo": photos[i].key,
                "question": record["question"],
                "choices": record["choices"],
                "truth": record["choices"][record["correct_choice_idx"]],
                "answer": record["choices"][choice],
                "mean_log_likelihoods": [round(score.mean, 4) for score in row],
            }
            for (i, record), choice, row in zip(records, chosen, likelihoods, strict=True)
        ]
        hits = [choice == record["correct_choice_idx"] for (_, record), choice in zip(records, chosen, strict=True)]
        return Result({"accuracy": grouped_share(hits, [i for i, _ in records])}, predictions)


class Counting(VLMTask):
    """Counting questions of GVT."""

    files = (FILE,)
    MAX_NEW_TOKENS: ClassVar[int] = 8
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; greedy, at most {MAX_NEW_TOKENS} tokens; the first number in the answer must be the right one"
    )

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, records = records_of(data, "qa", "gvt_oc")
        questions = [asking(i, record["q"]) for i, record in records]
        answers = generated(model, photos, questions, control, self.MAX_NEW_TOKENS, on_answers)
        counts = [first_number(answer) for answer in answers]
        hits = [count is not None and count == int(record["a"]) for (_, record), count in zip(records, counts, strict=True)]
        predictions = [
            {"photo": photos[i].key, "question": record["q"], "truth": record["a"], "answer": answer}
            for (i, record), answer in zip(records, answers, strict=True)
        ]
        notes = [f"{sum(count is None for count in counts)} of {len(counts)} answers hold no number"]
        return Result({"accuracy": grouped_share(hits, [i for i, _ in records])}, predictions, notes)


def first_number(answer: str) -> int | None:
    """The first number of an answer, in digits or as a word up to twelve; None where there is none."""
    found = re.search(rf"\d+|\b(?:{'|'.join(NUMBERS)})\b", answer.lower())
    if found is None:
        return None
    return int(found[0]) if found[0].isdigit() else NUMBERS.index(found[0])
