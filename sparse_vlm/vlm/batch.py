"""Answer questions about many images, from files to a file.

    from sparse_vlm.vlm.batch import AnswerConfig, answer

    result = answer(AnswerConfig(images=["photos/*.tar"], out="captions.jsonl"))

Notable: rows are written in the order of the images, each as soon as its batch is done. A run that was stopped continues after the last
complete row. Images of the next batch are decoded while the model answers.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo, PhotoSet, photo_of
from sparse_vlm.utils.documents import parse_json

if TYPE_CHECKING:
    from sparse_vlm.images.preprocess import Preprocessor
    from sparse_vlm.vlm.model import VLM

FIELDS = ("image", "question", "answer", "model", "error")
QUESTION = "Describe the picture in a sentence."


@dataclass(frozen=True)
class AnswerConfig:
    """What to answer.

    Attributes:
        out: file of the answers, `.jsonl` or `.csv`.
        images: image files, folders, glob patterns or tars, about each of which `question` is asked.
        questions: a JSONL file of objects with `image` (a path, relative to the file's folder) and `question`; instead of `images`.
        model: a VLM: folder or zoo name.
        tokens: token budget of the tower.
        batch_size: images that are answered together.
        max_new_tokens: maximum tokens of an answer.
    """

    out: str | Path
    images: Sequence[str] = ()
    questions: str | Path | None = None
    question: str = QUESTION
    model: str = "tiny-chat"
    tokens: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Item:
    """A question about an image.

    Attributes:
        image: its name in the output.
    """

    image: str
    question: str
    photo: Photo


@dataclass(frozen=True)
class AnswerResult:
    """Numbers of rows: those answered before this run, those answered by it, and the rows of this run with an error."""

    kept: int
    answered: int
    failed: tuple[dict[str, str], ...]


def read_items(config: AnswerConfig) -> list[Item]:
    """The images and questions.

    Raises:
        UserError: neither images nor a file of questions, both, an empty question, or a line that is not such an object.
    """
    if bool(config.images) == (config.questions is not None):
        raise UserError("give either images, about which one question is asked, or a file of images and questions")
    if config.questions is None:
        if not config.question.strip():
            raise UserError("the question is empty; ask something about the images")
        return [Item(_name(photo), config.question, photo) for photo in PhotoSet(config.images)]
    path = Path(config.questions)
    items = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        entry = parse_json(line, f"{path}, line {number}")
        image, question = (entry.get(key) for key in ("image", "question")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(image, str) and image and isinstance(question, str) and question.strip()):
            raise UserError(f'{path}, line {number}: write an object with "image", a path, and "question", a text')
        items.append(Item(image, question, photo_of(path.parent / image)))
    if not items:
        raise UserError(f"{path}: holds no line")
    return items


def answer(
    config: AnswerConfig,
    on_start: Callable[[int, int], None] = lambda kept, total: None,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> AnswerResult:
    """Answer all questions, or those that an earlier run left.

    An image that cannot be read, or a conversation that is too long, becomes a row with `error`.

    Args:
        on_start: called with the numbers of rows that are done already and in total, before the model is loaded.
        on_progress: called with the number of rows just written.

    Raises:
        UserError: invalid settings, or `out` holds answers to other questions or by another model.
    """
    from sparse_vlm.vlm.model import VLM

    if config.batch_size < 1 or config.max_new_tokens < 1:
        raise UserError("the batch size and the number of new tokens must be at least 1")
    out = Path(config.out)
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: write to a file whose name ends with {' or '.join(FORMATS)}")
    parse, render = FORMATS[out.suffix.lower()]
    items = read_items(config)
    with _exclusive(out) as stream:
        rows = _finished(stream, items, config.model, parse)
        if stream.tell() == 0 and out.suffix.lower() == ".csv":
            stream.write(_render_csv(dict(zip(FIELDS, FIELDS, strict=True))))
        on_start(len(rows), len(items))
        left = items[len(rows) :]
        failed: list[dict[str, str]] = []
        if left:
            vlm = VLM.from_pretrained(config.model, num_tokens=config.tokens)
            for batch in _answered(vlm, left, config):
                stream.write("".join(map(render, batch)))
                stream.flush()
                failed += [row for row in batch if row["error"]]
                on_progress(len(batch))
    return AnswerResult(len(rows), len(left), tuple(failed))


def _answered(vlm: VLM, items: Sequence[Item], config: AnswerConfig) -> Iterator[list[dict[str, str]]]:
    """Rows, batch by batch."""
    from sparse_vlm.images.preprocess import Preprocessor

    preprocessor = Preprocessor.of(vlm.tower.config)
    batches = [items[start : start + config.batch_size] for start in range(0, len(items), config.batch_size)]
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(_load, batches[0], preprocessor)
        for number, batch in enumerate(batches):
            images = upcoming.result()
            if number + 1 < len(batches):
                upcoming = pool.submit(_load, batches[number + 1], preprocessor)
            readable = [i for i, image in enumerate(images) if not isinstance(image, ImageError)]
            answers = dict(zip(readable, _generate(vlm, [(batch[i].question, images[i]) for i in readable], config), strict=True))
            yield [_row(item, answers.get(i, image), config.model) for i, (item, image) in enumerate(zip(batch, images, strict=True))]


def _load(items: Sequence[Item], preprocessor: Preprocessor) -> list[Image.Image | ImageError]:
    images: list[Image.Image | ImageError] = []
    for item in items:
        try:
            images.append(preprocessor.scale_draft(item.photo.draft(*preprocessor.at_least)))
        except ImageError as error:
            images.append(error)
    return images


def _generate(vlm: VLM, questions: Sequence[tuple[str, Image.Image]], config: AnswerConfig) -> list[str | UserError]:
    """Answers, or for a conversation that cannot be answered its error."""
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for question, image in questions
    ]
    try:
        return list(vlm.generate(conversations, config.max_new_tokens))
    except UserError as error:
        if len(questions) == 1:
            return [error]
        return [_generate(vlm, [one], config)[0] for one in questions]


def _row(item: Item, answer: Any, model: str) -> dict[str, str]:
    failed = isinstance(answer, UserError)
    row = {"image": item.image, "question": item.question, "answer": "" if failed else answer}
    return row | {"model": model, "error": str(answer) if failed else ""}


@contextmanager
def _exclusive(out: Path) -> Iterator[TextIO]:
    """The file, open for reading and appending, and locked against other runs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+", encoding="utf-8", newline="") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{out}: another run writes to it; wait for its end, or name another file") from None
        yield stream


def _finished(stream: TextIO, items: Sequence[Item], model: str, parse: Callable[[str], list[Any]]) -> list[dict[str, str]]:
    """Rows of an earlier run; a line that was only half written is removed from the file."""
    out, again = stream.name, "name another file for these answers, or remove it"
    stream.seek(0)
    try:
        text = stream.read()
        text = text[: text.rfind("\n") + 1]
        rows = parse(text)
        if not all(isinstance(row, dict) and set(row) == set(FIELDS) for row in rows):
            raise ValueError("a line is not a row of answers")
    except ValueError as error:
        raise UserError(f"{out}: holds something else ({error}); {again}") from error
    if len(rows) > len(items):
        raise UserError(f"{out}: holds {len(rows)} answers already, and there are {len(items)} questions; {again}")
    for number, (row, item) in enumerate(zip(rows, items, strict=False), 1):
        if tuple(map(_one_line, (row["image"], row["question"]))) != tuple(map(_one_line, (item.image, item.question))):
            raise UserError(f"{out}: its answer {number} is about {row['image']!r}, not {item.image!r}, or to another question; {again}")
        if row["model"] != model:
            raise UserError(f"{out}: its answer {number} is by {row['model']}, not {model}; {again}")
    stream.truncate(len(text.encode()))
    stream.seek(0, os.SEEK_END)
    return rows


def _name(photo: Photo) -> str:
    return f"{photo.source}:{photo.key}" if photo.offset else str(photo.source)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parse_jsonl(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def _render_jsonl(row: dict[str, str]) -> str:
    return json.dumps(row, ensure_ascii=True) + "\n"


def _parse_csv(text: str) -> list[Any]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def _render_csv(row: dict[str, str]) -> str:
    """A row without line breaks inside, so that a line is a row."""
    line = io.StringIO(newline="")
    csv.DictWriter(line, FIELDS, lineterminator="\n").writerow({name: _one_line(text) for name, text in row.items()})
    return line.getvalue()


# By suffix: a parser of complete rows, and a renderer of a row.
FORMATS: dict[str, tuple[Callable[[str], list[Any]], Callable[[dict[str, str]], str]]] = {
    ".jsonl": (_parse_jsonl, _render_jsonl),
    ".csv": (_parse_csv, _render_csv),
}
