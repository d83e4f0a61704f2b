"""Words about a photo: from its captions, answers, and questions that are answered with yes."""

from __future__ import annotations

import re

from sparse_vlm.data.conversations import SHORT_ANSWER, Example
from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.vlm.prompts import text_of

# words that name nothing one could see, those of our questions among them
_FUNCTION_WORDS = (
    "a about all along an and another any are around as at be been behind being between but by can do does down during each exist few for "
    "from front had has have he her him his how image in into is it its like many near next no not of off on one or other out over photo "
    "picture question she side some statement that the their them there these they this three through to top true two under up very was "
    "were what where which while who with yes"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def words_by_photo(examples: ConversationDataset) -> dict[int, list[set[str]]]:
    """The words of each sentence about each photo, by the photo's number; a sentence about several photos counts for each."""
    sentences: dict[int, list[set[str]]] = {}
    for index in range(len(examples)):
        if photos := examples.photo_numbers(index):
            words = words_about(examples[index])
            for photo in photos:
                sentences.setdefault(photo, []).extend(words)
    return sentences


def words_about(example: Example) -> list[set[str]]:
    """The words of each sentence that says what is in an example's photos; sentences without any are left out."""
    sentences: list[str] = []
    for photo in example.photos:
        sentences += photo.info.get("captions") or []
        sentences.append(" ".join(photo.info.get("objects") or []))
    for conversation in example.conversations:
        texts = [text_of(message) for message in conversation if message["role"] != "system"]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            sentences.append(question.replace(SHORT_ANSWER, "") if answer == "Yes" else answer)
    return [words for sentence in dict.fromkeys(sentences) if (words := _words(sentence))]


def _words(sentence: str) -> set[str]:
    return set(re.findall(r"[a-z]{2,}", sentence.lower())) - FUNCTION_WORDS
