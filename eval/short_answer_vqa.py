"""VQAv2, GQA and TextVQA: a word or two about a photo, compared with what people answered.

Sources: VQAv2 (Goyal et al. 2017), GQA (Hudson & Manning 2019), TextVQA (Singh et al. 2019), each in the files that its authors publish
and asked as LLaVA-1.5 asks (question, then "Answer the question using a single word or phrase."), except that TextVQA's questions come
without the OCR tokens that LLaVA adds: what is read, the tower must have seen. How answers are compared: `sparse_vlm.eval.normalise`.
"""

from __future__ import annotations

from typing import ClassVar

from sparse_vlm.eval.normalise import gqa_answer, human_accuracy, m4c_answer, vqa_answer
from sparse_vlm.eval.official import Entry, OfficialTask, photo_file
from sparse_vlm.eval.task import Data
from sparse_vlm.eval.vqa import SHORT_ANSWER, short_answer_prompt

MAX_NEW_TOKENS = 16
ASKED = f"question, then '{SHORT_ANSWER}'; greedy, at most {MAX_NEW_TOKENS} tokens"
OPEN, BINARY = "open", "binary"  # GQA's names for questions of the structural type `query`, and for all others


class VQAv2(OfficialTask):
    """VQA v2's validation set; the details hold its answer types: yes/no, number, other."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/v2_mscoco_val2014_annotations.json", "vqav2/val2014")
    protocol: ClassVar[str] = f"{ASKED}; VQA accuracy: min(annotators that agree / 3, 1), averaged over all subsets of nine annotators"

    def entries(self, data: Data) -> list[Entry]:
        """Every question with its ten answers."""
        questions, annotations, folder = self.files
        answered = {row["question_id"]: row for row in data.document(annotations)["annotations"]}
        found = []
        for row in data.document(questions)["questions"]:
            about = answered[row["question_id"]]
            photo = photo_file(data.root / folder, f"COCO_val2014_{row['image_id']:012d}.jpg")
            humans = [one["answer"] for one in about["answers"]]
            found.append(Entry(str(row["question_id"]), photo, short_answer_prompt(row["question"]), humans, about["answer_type"]))
        return found

    def credit(self, answer: str, entry: Entry) -> float:
        """VQA accuracy."""
        return human_accuracy(answer, entry.truth, vqa_answer)


class GQA(OfficialTask):
    """GQA's balanced testdev; the details hold accuracy on open and on binary questions."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("gqa/testdev_balanced_questions.json", "gqa/images")
    protocol: ClassVar[str] = f"{ASKED}; the very answer, in lower case and without a full stop"

    def entries(self, data: Data) -> list[Entry]:
        """Every question with its answer."""
        questions, folder = self.files
        return [
            Entry(
                number,
                photo_file(data.root / folder, f"{row['imageId']}.jpg"),
                short_answer_prompt(row["question"]),
                row["answer"],
                OPEN if row["types"]["structural"] == "query" else BINARY,
            )
            for number, row in data.document(questions).items()
        ]

    def credit(self, answer: str, entry: Entry) -> float:
        """1 for the very answer."""
        return float(gqa_answer(answer) == entry.truth)


class TextVQA(OfficialTask):
    """TextVQA's validation set."""

    max_new_tokens = MAX_NEW_TOKENS
    files = ("textvqa/TextVQA_0.5.1_val.json", "textvqa/train_images")
    protocol: ClassVar[str] = f"{ASKED}, no OCR tokens; VQA accuracy after M4C's normalisation, as LLaVA computes it"

    def entries(self, data: Data) -> list[Entry]:
        """Every question with its ten answers."""
        questions, folder = self.files
        return [
            Entry(
                str(row["question_id"]),
                photo_file(data.root / folder, f"{row['image_id']}.jpg"),
                short_answer_prompt(row["question"]),
                row["answers"],
            )
            for row in data.document(questions)["data"]
        ]

    def credit(self, answer: str, entry: Entry) -> float:
        """VQA accuracy."""
        return human_accuracy(answer, entry.truth, m4c_answer)
