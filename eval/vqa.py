"""Questions with one right answer: POPE, existence and VSR (yes or no), A-OKVQA (choices, or in its own words), counting (a number).

Sources: POPE (Li et al. 2023), A-OKVQA (Schwenk et al. 2022); their own protocols are `PopeInWords` and `AOKVQADirect`.

Notable: else yes/no and multiple choice are answered by comparing the likelihoods of the possible answers, which is deterministic, never
ambiguous and one forward pass a photo. Questions end as LLaVA's do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import Question, generated, scored
from sparse_vlm.eval.metrics import grouped_share, yes_no
from sparse_vlm.eval.questions import LAYOUT, Questions, says_yes
from sparse_vlm.eval.task import Data, Result, VLMTask
from sparse_vlm.images.photos import Photo
from sparse_vlm.utils.schema import check

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM

SHORT_ANSWER = "Answer the question using a single word or phrase."
YES_NO = ("Yes", "No")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
OnAnswers = Callable[[int, int], None]


def short_answer_prompt(question: str) -> str:
    """The question, and that its answer be short."""
    return f"{question.strip()}\n{SHORT_ANSWER}"


def asking(photo: int, question: str, choices: tuple[str, ...] = ()) -> Question:
    """A question that asks for a short answer."""
    return Question(photo, short_answer_prompt(question), choices)


class _Asking(VLMTask):
    """A task of questions about COCO photos, wherever they come from."""

    def __init__(self, questions: Questions) -> None:
        self.questions = questions
        self.files = questions.files

    def look_up(self, data: Data) -> None:
        """Make sure that the questions are there."""
        self.questions.look_up(data)


class _YesNo(_Asking):
    """Is it there? By the likelihoods of "Yes" and "No"."""

    has_splits: ClassVar[bool] = False

    def as_question(self, record: dict[str, Any]) -> dict[str, Any]:
        """A record as question `q`, answer `a` and split `s`, which most are already."""
        return record

    def ask(
        self, model: VLM, photos: list[Photo], asked: list[tuple[int, str]], control: str, on_answers: OnAnswers
    ) -> list[tuple[bool, dict[str, Any]]]:
        """Whether each question is answered with yes, and what else a prediction holds.

        Args:
            asked: a photo's number and a question about it.
        """
        likelihoods = scored(model, photos, [asking(i, question, YES_NO) for i, question in asked], control, on_answers)
        return [(yes.total > no.total, {"log_likelihoods": [round(yes.total, 4), round(no.total, 4)]}) for yes, no in likelihoods]

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, found = self.questions.read(data)
        records = [(i, self.as_question(record)) for i, record in found]
        truth = [says_yes(record["a"], f"{self.files[0]}: {photos[i].key}") for i, record in records]
        answers = self.ask(model, photos, [(i, record["q"]) for i, record in records], control, on_answers)
        said = [yes for yes, _ in answers]
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
                "answer": YES_NO[not yes],
                **more,
            }
            for (i, record), t, (yes, more) in zip(records, truth, answers, strict=True)
        ]
        return Result(yes_no(said, truth, owner), predictions, details=details)


class Pope(_YesNo):
    """POPE over COCO and A-OKVQA objects: random, popular and adversarial absent objects."""

    has_splits = True
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'; all splits together, each split in the details"
    )


class PopeInWords(Pope):
    """POPE as its authors score it: the model answers in its own words, and `pope_says_yes` decides what they mean."""

    MAX_NEW_TOKENS: ClassVar[int] = 16
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; greedy, at most {MAX_NEW_TOKENS} tokens; 'No', 'no' or 'not' among the words before the first "
        "full stop is no, all else yes; all splits together, each split in the details"
    )

    def ask(
        self, model: VLM, photos: list[Photo], asked: list[tuple[int, str]], control: str, on_answers: OnAnswers
    ) -> list[tuple[bool, dict[str, Any]]]:
        """What is said, and what it means."""
        words = generated(model, photos, [asking(i, question) for i, question in asked], control, self.MAX_NEW_TOKENS, on_answers)
        return [(pope_says_yes(answer), {"words": answer}) for answer in words]


class Existence(_YesNo):
    """Existence questions of GVT."""

    protocol: ClassVar[str] = f"question, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'"


class VSR(_YesNo):
    """Statements of Visual Spatial Reasoning (Liu et al. 2023) about where two things are; a prediction's split is the relation."""

    ASKED: ClassVar[str] = "Is this statement true?"  # as the stage `instruct` asks
    protocol: ClassVar[str] = f"'{ASKED}', statement, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'; chance is 50 %"

    def as_question(self, record: dict[str, Any]) -> dict[str, Any]:
        """A statement as a question."""
        return {"q": f"{self.ASKED} {record['statement']}", "a": YES_NO[not record["label"]], "s": record["relation"]}


class AOKVQA(_Asking):
    """Multiple choice that needs knowledge of the world.

    Beside accuracy stands the mean probability of the right choice, which moves with every question, also where no other choice overtakes:
    two hundred questions tell smaller differences by it.
    """

    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; accuracy: of the choice with the highest mean log-likelihood a token; probability: of the right "
        "choice, where those are the logits; chance is 25 % for both"
    )

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, records = self.questions.read(data)
        questions = [asking(i, record["question"], tuple(record["choices"])) for i, record in records]
        likelihoods = scored(model, photos, questions, control, on_answers)
        means = [[score.mean for score in row] for row in likelihoods]
        chosen = [int(np.argmax(row)) for row in means]
        predictions = [
            {
                "photo": photos[i].key,
                "question": record["question"],
                "choices": record["choices"],
                "truth": record["choices"][record["correct_choice_idx"]],
                "answer": record["choices"][choice],
                "mean_log_likelihoods": [round(value, 4) for value in row],
            }
            for (i, record), choice, row in zip(records, chosen, means, strict=True)
        ]
        right = [record["correct_choice_idx"] for _, record in records]
        hits = [choice == index for choice, index in zip(chosen, right, strict=True)]
        shares = [probability(row, index) for row, index in zip(means, right, strict=True)]
        owners = [i for i, _ in records]
        return Result({"accuracy": grouped_share(hits, owners), "probability": grouped_share(shares, owners)}, predictions)


class AOKVQADirect(_Asking):
    """A-OKVQA without its choices: a word or two, compared with what ten people answered."""

    MAX_NEW_TOKENS: ClassVar[int] = 16
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; greedy, at most {MAX_NEW_TOKENS} tokens, in lower case and without a full stop at the end; "
        "min(people who said exactly that / 3, 1); questions that are marked as difficult to answer so are left out"
    )

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question that is not marked."""
        photos, found = self.questions.read(data)
        for i, record in found:
            check(record, {"direct_answers": [str], "difficult_direct_answer": bool}, f"{self.files[0]}: {photos[i].key}", LAYOUT)
        records = [(i, record) for i, record in found if not record["difficult_direct_answer"]]
        if not records:
            raise UserError(f"{self.files[0]}: every question is marked as difficult to answer without choices; raise --limit")
        answers = generated(model, photos, [asking(i, r["question"]) for i, r in records], control, self.MAX_NEW_TOKENS, on_answers)
        credits = [direct_credit(answer, record["direct_answers"]) for answer, (_, record) in zip(answers, records, strict=True)]
        predictions = [
            {"photo": photos[i].key, "question": record["question"], "truth": record["direct_answers"], "answer": answer, "credit": credit}
            for (i, record), answer, credit in zip(records, answers, credits, strict=True)
        ]
        notes = [f"{len(found) - len(records)} of {len(found)} questions are marked as difficult and left out"]
        return Result({"accuracy": grouped_share(credits, [i for i, _ in records])}, predictions, notes)


class Counting(_Asking):
    """Counting questions of GVT."""

    MAX_NEW_TOKENS: ClassVar[int] = 8
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; greedy, at most {MAX_NEW_TOKENS} tokens; the first number in the answer must be the right one"
    )

    def run(self, model: VLM, control: str, data: Data, on_answers: OnAnswers) -> Result:
        """Ask every question."""
        photos, records = self.questions.read(data)
        for i, record in records:
            if not record["a"].strip().isdecimal():
                raise UserError(f"{self.files[0]}: {photos[i].key}: the answer is {record['a']!r}, expected a number")
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


def pope_says_yes(answer: str) -> bool:
    """What an answer means to POPE's own evaluation: no if `No`, `no` or `not` is a word of its first sentence, else yes."""
    return {"No", "no", "not"}.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))


def direct_credit(answer: str, people: Sequence[str]) -> float:
    """A-OKVQA's credit for a direct answer: a third for each of ten people who gave it, at most 1."""
    said = answer.strip().lower().removesuffix(".")
    return min(1.0, sum(said == one.lower() for one in people) / 3)


def probability(logits: Sequence[float], index: int) -> float:
    """The share of one choice in the softmax over all."""
    shares = np.exp(np.asarray(logits) - max(logits))
    return float(shares[index] / shares.sum())


def first_number(answer: str) -> int | None:
    """The first number of an answer, in digits or as a word up to twelve; None where there is none."""
    found = re.search(rf"\d+|\b(?:{'|'.join(NUMBERS)})\b", answer.lower())
    if found is None:
        return None
    return int(found[0]) if found[0].isdigit() else NUMBERS.index(found[0])
