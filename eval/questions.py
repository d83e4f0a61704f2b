"""Where questions about COCO photos come from: a tar that holds them beside the photos, or the files that a benchmark is published in."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparse_vlm.errors import UserError
from sparse_vlm.eval.answers import check_question
from sparse_vlm.eval.official import in_own_layout, looked_at, own_layout, photo_file
from sparse_vlm.eval.task import Data
from sparse_vlm.images.decode import read_file
from sparse_vlm.images.photos import Photo
from sparse_vlm.utils.documents import is_encodable, parse_json
from sparse_vlm.utils.schema import COUNT, check

FILE = "eval/coco_vqa.tar"
LAYOUT = "docs/evaluation.md shows the layout"
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
Found = tuple[list[Photo], list[tuple[int, dict[str, Any]]]]


def check_records(records: Any, field: str, where: str) -> list[dict[str, Any]]:
    """The questions of a field, which are as they must be.

    Args:
        field: a key of `RECORDS`.

    Raises:
        UserError: one is not; the line begins with `where`, and names the part.
    """
    check(records, [RECORDS[field]], f"{where}: {field}", LAYOUT)
    for number, record in enumerate(records):
        at = f"{where}: {field}[{number}]"
        if "choices" in record and record["correct_choice_idx"] >= len(record["choices"]):
            raise UserError(f"{at}: correct_choice_idx is {record['correct_choice_idx']} of {len(record['choices'])} choices; {LAYOUT}")
        if not is_encodable(json.dumps(record, ensure_ascii=False)):
            raise UserError(f"{at}: a text holds half of a character (a surrogate alone); write the whole one")
        check_question(record.get("q") or record.get("question") or record.get("statement") or "", at)
    return records


def says_yes(answer: str, where: str) -> bool:
    """The truth of a yes/no record.

    Raises:
        UserError: neither.
    """
    word = answer.strip().rstrip(".").lower()
    if word not in ("yes", "no"):
        raise UserError(f"{where}: the answer is {answer!r}, expected yes or no")
    return word == "yes"


class Questions(ABC):
    """Questions about photos; `files` are what is read below the data folder."""

    files: tuple[str, ...]

    @abstractmethod
    def look_up(self, data: Data) -> None:
        """Make sure that the files are there.

        Raises:
            UserError: one is not.
        """

    @abstractmethod
    def read(self, data: Data) -> Found:
        """The photos that are looked at, and each question with its photo's number.

        Raises:
            UserError: fewer than two photos, or a file in another layout.
        """


@dataclass(frozen=True)
class InTar(Questions):
    """Questions in the json beside each photo of a tar.

    Attributes:
        field: of the json.
        source: keeps to the questions whose `s` is this; all by default.
    """

    field: str
    source: str | None = None
    files: tuple[str, ...] = (FILE,)

    def look_up(self, data: Data) -> None:
        """Index the tar."""
        for file in self.files:
            data.everything(file)

    def read(self, data: Data) -> Found:
        """The photos that have such questions, and the questions."""

        (file,) = self.files

        def asked(photo: Photo) -> list[dict[str, Any]]:
            records = check_records(photo.info.get(self.field) or [], self.field, f"{data.root / file}: {photo.key}")
            return [record for record in records if self.source is None or record["s"] == self.source]

        photos = data.cut([photo for photo in data.everything(file) if asked(photo)])
        if len(photos) < 2:
            raise UserError(f"{file}: fewer than two photos with {self.source or self.field} questions; raise --limit or check --data")
        return photos, [(i, record) for i, photo in enumerate(photos) for record in asked(photo)]


class Published(Questions):
    """Questions in a benchmark's own files; the last of `files` is the folder of its images.

    Attributes:
        field: of a tar that holds the same questions, a key of `RECORDS`.
    """

    field: ClassVar[str]

    @abstractmethod
    def rows(self, data: Data) -> list[tuple[str, dict[str, Any]]]:
        """The name of the image, and the question in the form in which a tar holds it."""

    def look_up(self, data: Data) -> None:
        """Look for each file."""
        for file in self.files:
            data.check(file)

    def read(self, data: Data) -> Found:
        """The photos and their questions."""
        where, folder = data.root / self.files[0], data.root / self.files[-1]
        rows = in_own_layout(data, where, lambda: [(photo_file(folder, name), row) for name, row in self.rows(data)])
        check_records([row for _, row in rows], self.field, str(where))
        return looked_at(data, rows, where)


class PopeFiles(Published):
    """POPE's three files about COCO photos, a json a line."""

    field = "pope"
    SPLITS: ClassVar[Sequence[str]] = ("random", "popular", "adversarial")
    files = (*(f"pope/coco_pope_{split}.json" for split in SPLITS), "pope/val2014")

    def rows(self, data: Data) -> list[tuple[str, dict[str, Any]]]:
        """Every question of every split."""
        found = []
        for split, file in zip(self.SPLITS, self.files, strict=False):
            lines = [line for line in read_file(data.root / file).removeprefix(BOM_UTF8).split(b"\n") if line.strip()]
            for number, line in enumerate(lines, 1):
                where = f"{data.root / file}, line {number}"
                with own_layout(where):
                    row = parse_json(line, where)
                    found.append((row["image"], {"q": row["text"], "a": row["label"], "s": f"pope_coco_{split}"}))
                    says_yes(row["label"], where)
        return found


class AOKVQAFiles(Published):
    """A-OKVQA's validation set."""

    field = "aokvqa"
    files = ("aokvqa/aokvqa_v1p0_val.json", "aokvqa/val2017")

    def rows(self, data: Data) -> list[tuple[str, dict[str, Any]]]:
        """Every question, as it is in the file."""
        used = ("question_id", "question", "choices", "correct_choice_idx", "direct_answers", "difficult_direct_answer")
        return [(f"{row['image_id']:012d}.jpg", {name: row[name] for name in used}) for row in data.document(self.files[0])]
