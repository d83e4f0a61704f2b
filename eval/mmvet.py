"""MM-Vet (Yu et al. 2023): open questions whose answers GPT-4 judges. Nothing is scored here; the answers are written as its evaluator
takes them, `{"v1_0": "...", "v1_1": "...", ...}` for the questions in their own order.

Notable: questions are counted from 1 in our tar, which is made of VLMEvalKit's table, and from 0 in MM-Vet's own files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import Question, generated
from sparse_vlm.eval.metrics import bootstrap
from sparse_vlm.eval.questions import check_records
from sparse_vlm.eval.task import Data, Result, VLMTask

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM


class MMVet(VLMTask):
    """Answers to MM-Vet's questions, for its own evaluator."""

    files = ("eval/mmvet.tar",)
    MAX_NEW_TOKENS: ClassVar[int] = 128
    protocol: ClassVar[str] = (
        f"question as it is; greedy, at most {MAX_NEW_TOKENS} tokens; not scored here: --out writes the answers for MM-Vet's evaluator, "
        "which asks GPT-4"
    )

    def run(self, model: VLM, control: str, data: Data, on_answers: Callable[[int, int], None]) -> Result:
        """Ask every question."""
        (file,) = self.files
        photos = data.photos(file)
        if len(photos) < 2:
            raise UserError(f"{file}: fewer than two photos; raise --limit or check --data")
        asked = [
            (i, record)
            for i, photo in enumerate(photos)
            for record in check_records(photo.info.get("questions") or [], "questions", f"{data.root / file}: {photo.key}")
        ]
        questions = [Question(i, record["q"].strip()) for i, record in asked]
        answers = generated(model, photos, questions, control, self.MAX_NEW_TOKENS, on_answers)
        answered = sorted(zip([(record["index"], i, record) for i, record in asked], answers, strict=True), key=lambda pair: pair[0][0])
        predictions = [
            {"photo": photos[i].key, "question": record["q"], "truth": record["a"], "category": record["category"], "answer": answer}
            for (_, i, record), answer in answered
        ]
        words, count = np.zeros(len(photos)), np.zeros(len(photos))
        for (_, i, _), answer in answered:
            words[i] += len(answer.split())
            count[i] += 1
        mean_words = bootstrap(np.stack([words, count], axis=1), lambda sums: sums[..., 0] / sums[..., 1], unit="")
        submission = {f"v1_{index - 1}": answer for (index, _, _), answer in answered}
        guessed = sum(record.get("image_inferred", False) for _, record in asked)
        notes = [f"{guessed} of {len(asked)} questions stand with an image that was inferred from the order of the set"] if guessed else []
        if data.limit is not None:
            notes.append("a part of the questions, which MM-Vet's evaluator does not take")
        return Result({"words an answer": mean_words}, predictions, notes, submission=submission)
