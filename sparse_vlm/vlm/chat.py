"""A conversation about images: questions, answers, images and timings.

Notable: an image belongs to the question it is first shown with and is not moved afterwards, so messages are only appended and the
model's prefix cache stays valid. A question that fails leaves the conversation unchanged. An answer that is stopped is kept and marked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import draft_image
from sparse_vlm.images.photos import STDIN, photo_of
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.utils.files import atomic_path

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM

SAVE_FORMAT = "sparse-vlm/chat/1"


@dataclass(frozen=True)
class ChatImage:
    """A decoded image and its path.

    Attributes:
        image: scaled down to the resolution that the tower uses, if read for one.
        size: (width, height) of the file's image; None if it is that of `image`.
    """

    path: Path
    image: Image.Image = field(repr=False)
    decode_ms: float = 0.0
    size: tuple[int, int] | None = None

    @classmethod
    def read(cls, path: Path, preprocessor: Preprocessor) -> ChatImage:
        """Read a file, decoded at about the resolution that the tower uses.

        Args:
            path: of a file, or `-` for stdin, which is read to its end.

        Raises:
            ImageError: as `images.decode.load_image`.
        """
        started = time.perf_counter()
        if str(path) == STDIN:
            draft = draft_image(sys.stdin.buffer.read(), "stdin", *preprocessor.at_least)
        else:
            draft = photo_of(path).draft(*preprocessor.at_least)
        return cls(path, preprocessor.scale_draft(draft), (time.perf_counter() - started) * 1000, draft.size)


@dataclass(frozen=True)
class AnswerTimes:
    """Milliseconds of one answer.

    `decode`: reading and decoding new images; `tower`: encoding them to tokens of the LLM's width; `prefill`: the LLM on new tokens;
    `first_token`: everything before the answer's first token.
    """

    decode: float
    tower: float
    prefill: float
    first_token: float


@dataclass(frozen=True)
class Answer:
    """One answer with its cost. `image_tokens` counts the tokens of all images of the conversation."""

    answer: str
    image_tokens: int
    answer_tokens: int
    ms: AnswerTimes
    tokens_per_second: float
    stopped: bool = False


@dataclass(frozen=True)
class Turn:
    """A question with the images shown beside it, and its answer."""

    images: tuple[ChatImage, ...]
    question: str
    answer: Answer


class Conversation:
    """A multi-turn conversation with one model.

    Args:
        vlm: the model.
        model_name: its name in saved conversations.
        images: shown with the first question, and again after `reset`.
        max_new_tokens: maximum tokens of an answer.
    """

    def __init__(self, vlm: VLM, model_name: str, images: list[ChatImage] | None = None, max_new_tokens: int = 128) -> None:
        self.vlm = vlm
        self.model_name = model_name
        self.max_new_tokens = max_new_tokens
        self.turns: list[Turn] = []
        self._opening = tuple(images or ())
        self._pending = list(self._opening)

    @property
    def images(self) -> list[ChatImage]:
        """Every image of the conversation in the order shown, those of the next question last."""
        return [image for turn in self.turns for image in turn.images] + self._pending

    def add_image(self, image: ChatImage) -> None:
        """Show an image with the next question."""
        self._pending.append(image)

    def reset(self) -> None:
        """Remove all questions and answers and all but the opening images."""
        self.turns.clear()
        self._pending = list(self._opening)

    def messages(self) -> list[dict[str, Any]]:
        """The turns so far, in the form that `VLM.stream` takes."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            messages.append(_user_message(turn.images, turn.question))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.answer}]})
        return messages

    def ask(self, question: str, show: Callable[[str], Any] = lambda _: None, stop: Callable[[], bool] = lambda: False) -> Answer:
        """Answer a question about the images and the conversation so far.

        Args:
            show: called with each piece of the answer as it is generated.
            stop: called after each piece; if it returns true, the answer ends there and is kept.

        Raises:
            UserError: an empty question, or a conversation longer than the context; the conversation is then unchanged.
        """
        question = question.strip()
        if not question:
            raise UserError("the question is empty; ask something about the image")
        images = tuple(self._pending)
        stopped = False
        text = ""
        stream = self.vlm.stream([*self.messages(), _user_message(images, question)], max_new_tokens=self.max_new_tokens)
        try:
            for piece in stream:
                piece = piece if text else piece.lstrip()
                text += piece
                show(piece)
                if stop():
                    stopped = True
                    break
        finally:
            stream.close()
        timings = stream.timings
        decode_ms = sum(image.decode_ms for image in images)
        milliseconds = (decode_ms, timings.tower_ms, timings.prefill_ms, decode_ms + timings.first_token_ms)
        answer = Answer(
            answer=text.rstrip(),
            image_tokens=len(self.images) * self.vlm.tokens_per_image,
            answer_tokens=timings.answer_tokens,
            ms=AnswerTimes(*(round(number, 2) for number in milliseconds)),
            tokens_per_second=round(timings.tokens_per_second, 2),
            stopped=stopped,
        )
        self.turns.append(Turn(images, question, answer))
        self._pending.clear()
        return answer

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON or Markdown, by the suffix; images are named relative to the file's folder.

        Raises:
            UserError: another suffix, an empty conversation, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in WRITERS:
            raise UserError(f"{path}: save as {' or '.join(WRITERS)}")
        if not self.turns:
            raise UserError("nothing to save yet; ask something first")
        text = WRITERS[path.suffix.lower()](self, path.parent)
        try:
            with atomic_path(path) as part:
                part.write_text(text, encoding="utf-8", errors="backslashreplace")  # an image's name may be no text
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            shown = str(path).replace("\0", "\\0")
            raise UserError(f"{shown}: cannot write here ({getattr(error, 'strerror', None) or error})") from None


def _user_message(images: tuple[ChatImage, ...], question: str) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image.image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def _relative(image: ChatImage, folder: Path) -> str:
    return Path(os.path.relpath(image.path, folder)).as_posix()


def _to_json(conversation: Conversation, folder: Path) -> str:
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns:
        shown = [{"type": "image", "image": _relative(image, folder)} for image in turn.images]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": turn.question}]})
        cost = asdict(turn.answer)
        text = cost.pop("answer")
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}], **cost})
    whole = {"format": SAVE_FORMAT, "model": conversation.model_name, "messages": messages}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _to_markdown(conversation: Conversation, folder: Path) -> str:
    parts = [f"# Conversation with {conversation.model_name}"]
    for turn in conversation.turns:
        parts += [f"![{image.path.name}](<{_relative(image, folder)}>)" for image in turn.images]
        parts.append(f"**You:** {turn.question}")
        parts.append(f"**{conversation.model_name}:** {turn.answer.answer}" + (" *(stopped)*" if turn.answer.stopped else ""))
    return "\n\n".join(parts) + "\n"


WRITERS: dict[str, Callable[[Conversation, Path], str]] = {".json": _to_json, ".md": _to_markdown}
