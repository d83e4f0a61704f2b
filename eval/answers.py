"""Runs a vision-language model on many questions about photos: controls, batches, each question once.

Notable: the same question about the same shown photo is asked once, however often a benchmark repeats it (POPE's splits overlap; without an
image nearly all questions are the same). Questions whose answers are only scored go photo by photo, because `VLM.score` reads a photo
once for all questions about it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.utils.documents import is_encodable
from sparse_vlm.vlm.prompts import IMAGE_TOKEN

if TYPE_CHECKING:
    from sparse_vlm.vlm import VLM, Score

GENERATED_AT_ONCE = 16
SCORED_AT_ONCE = 64
Key = tuple[int | None, str, tuple[str, ...]]
Answer = TypeVar("Answer")
OnAnswers = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """A question about a photo.

    Attributes:
        photo: its number in the task's photos.
        choices: the answers whose likelihoods are compared; none for an answer in the model's own words.
    """

    photo: int
    text: str
    choices: tuple[str, ...] = ()


def shown_photo(photo: int, photos: int, control: str) -> int | None:
    """The photo that is shown for a question about `photo`: under wrong-image the one half the set away."""
    return {"none": photo, "no-image": None, "wrong-image": (photo + photos // 2) % photos}[control]


def conversation(image: Image.Image | None, text: str) -> list[dict[str, Any]]:
    """One user turn."""
    content: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def check_question(text: str, where: str) -> None:
    """Make sure that a question can be asked, before the model is asked anything.

    Raises:
        UserError: its text holds the mark of an image, or half of a character; the line begins with `where`.
    """
    if IMAGE_TOKEN in text:
        raise UserError(
            f"{where}: its text holds {IMAGE_TOKEN}, where an image would be shown; take the mark out, the image comes by itself"
        )
    if not is_encodable(text):
        raise UserError(f"{where}: its text holds half of a character (a surrogate alone); write the whole one")


def generated(
    model: VLM, photos: Sequence[Photo], questions: Sequence[Question], control: str, max_new_tokens: int, on_answers: OnAnswers
) -> list[str]:
    """Generate an answer to each question, greedily."""

    def ask(conversations: list[Any], choices: list[list[str]]) -> list[str]:
        return model.generate(conversations, max_new_tokens=max_new_tokens)

    # padding is wasted work: alike lengths go together
    load = Preprocessor.of(model.tower.config).load
    return _ask_each_once(ask, photos, load, questions, control, on_answers, GENERATED_AT_ONCE, lambda key: len(key[1].split()))


def scored(model: VLM, photos: Sequence[Photo], questions: Sequence[Question], control: str, on_answers: OnAnswers) -> list[list[Score]]:
    """Score every choice of every question by its log-likelihood."""
    # the model reads a photo once for all questions about it that stand side by side
    load = Preprocessor.of(model.tower.config).load
    return _ask_each_once(
        model.score, photos, load, questions, control, on_answers, SCORED_AT_ONCE, lambda key: -1 if key[0] is None else key[0]
    )


def _ask_each_once(
    ask: Callable[[list[Any], list[list[str]]], list[Answer]],
    photos: Sequence[Photo],
    load: Callable[[Photo], Image.Image],
    questions: Sequence[Question],
    control: str,
    on_answers: OnAnswers,
    at_once: int,
    sort_by: Callable[[Key], int],
) -> list[Answer]:
    """Answers in the order of the questions; a key is (shown photo, question, choices).

    Args:
        load: what the model's tower sees of a photo, decoded no larger than that needs.
    """
    if control == "wrong-image" and len(photos) < 2:
        raise ValueError("no other photo to show")
    keys: list[Key] = [(shown_photo(question.photo, len(photos), control), question.text, question.choices) for question in questions]
    order = sorted(dict.fromkeys(keys), key=sort_by)
    shown = lru_cache(maxsize=at_once)(lambda index: load(photos[index]))
    found: dict[Key, Answer] = {}
    on_answers(0, len(order))
    for start in range(0, len(order), at_once):
        batch = order[start : start + at_once]
        conversations = [conversation(None if index is None else shown(index), text) for index, text, _ in batch]
        found.update(zip(batch, ask(conversations, [list(choices) for _, _, choices in batch]), strict=True))
        on_answers(len(found), len(order))
    return [found[key] for key in keys]
