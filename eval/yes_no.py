"""Questions that are answered with yes or no: POPE, existence questions of GVT, and VSR.

Sources: POPE (Li et al. 2023), VSR (Visual Spatial Reasoning, Liu et al. 2023). Questions end as LLaVA's do.

Notable: but for `PopeInWords`, POPE's own protocol, the likelihoods of "Yes" and "No" are compared: deterministic, never ambiguous, and one
forward pass a photo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from sparse_vlm.eval.metrics import yes_no
from sparse_vlm.eval.questions import Asked, Item, RecordTask, says_yes
from sparse_vlm.eval.task import Result
from sparse_vlm.eval.vqa import SHORT_ANSWER, short_answer_prompt
from sparse_vlm.images.photos import Photo

YES_NO = ("Yes", "No")


class YesNo(RecordTask):
    """Accuracy, precision, recall, F1 and the share of yes, by the likelihoods of "Yes" and "No"."""

    likelihood = "total"
    has_splits: ClassVar[bool] = False
    choices: ClassVar[tuple[str, ...]] = YES_NO
    protocol: ClassVar[str] = f"question, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'"

    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """The question `q` with the answer `a`, of the split `s`."""
        truth = says_yes(record["a"], f"{self.files[0]}: {photo.key}")
        about = {"split": record["s"], "question": record["q"], "truth": YES_NO[not truth]}
        return Item(photo, short_answer_prompt(record["q"]), truth, about, choices=self.choices)

    def yes(self, answer: Any) -> tuple[bool, dict[str, Any]]:
        """Whether an answer means yes, and what a prediction says beside it."""
        yes, no = answer
        return yes > no, {"log_likelihoods": [round(yes, 4), round(no, 4)]}

    def grade(self, item: Item, answer: Any) -> tuple[float, dict[str, Any]]:
        """1 for the right one."""
        yes, more = self.yes(answer)
        return float(yes == item.truth), {"answer": YES_NO[not yes], **more}

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """POPE's scores over all questions; those of each split in the details."""
        result = super().result(asked, answers)
        predicted_yes = np.array([prediction["answer"] == "Yes" for prediction in result.predictions])
        truth, photos = np.array([item.truth for _, item in asked]), np.array([number for number, _ in asked])
        splits = np.array([prediction["split"] for prediction in result.predictions])
        result.metrics = yes_no(predicted_yes, truth, photos)
        for split in dict.fromkeys(splits.tolist()) if self.has_splits else ():
            of = splits == split
            title = split.removeprefix("pope_").replace("_", " ")
            result.details |= {f"{title} {name}": metric for name, metric in yes_no(predicted_yes[of], truth[of], photos[of]).items()}
        return result


class Pope(YesNo):
    """POPE over COCO and A-OKVQA objects: random, popular and adversarial absent objects."""

    has_splits = True
    protocol: ClassVar[str] = f"{YesNo.protocol}; all splits together, each split in the details"


class PopeInWords(Pope):
    """POPE as its authors score it: the model answers in its own words, and `pope_says_yes` decides what they mean."""

    choices = ()
    protocol: ClassVar[str] = (
        f"question, then '{SHORT_ANSWER}'; greedy, at most {RecordTask.max_new_tokens} tokens; 'No', 'no' or 'not' among the words before "
        "the first full stop is no, all else yes; all splits together, each split in the details"
    )

    def yes(self, answer: Any) -> tuple[bool, dict[str, Any]]:
        """What the words mean."""
        return pope_says_yes(answer), {"words": answer}


class VSR(YesNo):
    """Statements about where two things are; a prediction's split is the relation."""

    ASKED: ClassVar[str] = "Is this statement true?"  # as the stage `instruct` asks
    protocol: ClassVar[str] = f"'{ASKED}', statement, then '{SHORT_ANSWER}'; the likelier of 'Yes' and 'No'; chance is 50 %"

    def item(self, photo: Photo, record: dict[str, Any]) -> Item:
        """A statement as a question."""
        question = {"q": f"{self.ASKED} {record['statement']}", "a": YES_NO[not record["label"]], "s": record["relation"]}
        return super().item(photo, question)


def pope_says_yes(answer: str) -> bool:
    """What an answer means to POPE's own evaluation: no if `No`, `no` or `not` is a word of its first sentence, else yes."""
    return {"No", "no", "not"}.isdisjoint(answer.split(".")[0].replace(",", "").split(" "))
