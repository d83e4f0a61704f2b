"""Short questions whose answers stand in a photo's captions: what is there, what someone does, what colour something has.

Source: the generated questions of COCO-QA (Ren et al., Exploring Models and Data for Image Question Answering, arXiv 1505.02074, section
3.2); patterns in the place of a parser, and only where the captions do not contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

_COLORS = "black white blue brown red yellow green orange pink gray grey purple tan silver gold"
_PLURALS = "men women boys girls people children kids dogs"
_ACTORS = f"man woman boy girl person child kid guy lady baby player surfer skier dog cat horse bird elephant {_PLURALS}"
_NOT_ACTIONS = (
    "doing wearing being having including containing featuring showing during morning evening building wedding clothing ceiling king ring"
)
_MANY, _NO_DOING = frozenset(_PLURALS.split()), frozenset(_NOT_ACTIONS.split())
_THERE = ("What is in the image?", "What can be seen in the picture?", "What is in this picture?", "Name something in the image.")

_COLORED = re.compile(rf"\b({'|'.join(_COLORS.split())}) ([a-z]{{3,}})\b(?! and)")
_ACTING = re.compile(rf"\b({'|'.join(_ACTORS.split())})(?: is| are)? ([a-z]{{2,}}ing)\b")


@dataclass(frozen=True)
class CaptionQuestion:
    """A question, its answer in one or two words of lower case, and as a sentence."""

    question: str
    word: str
    sentence: str


def questions_of(captions: Iterable[str], things: Collection[str], there: Collection[str]) -> dict[str, list[CaptionQuestion]]:
    """Questions by kind: `there`, `color`, `doing`.

    Args:
        things: words that are known to name things; only these are asked the colour of.
        there: what is known to be in the photo.
    """
    colors: dict[str, set[str]] = {}
    doing: set[tuple[str, str]] = set()
    for caption in map(str.lower, captions):
        for color, thing in _COLORED.findall(caption):
            if thing in things:
                colors.setdefault(thing, set()).add("gray" if color == "grey" else color)
        # two captions may call the same action by two names, each of which is an answer
        doing.update((actor, verb) for actor, verb in _ACTING.findall(caption) if verb not in _NO_DOING)
    return {
        "there": [
            CaptionQuestion(_THERE[i % len(_THERE)], thing, f"There {_be(plural(thing))} {with_article(thing)} in the image.")
            for i, thing in enumerate(sorted(there))
        ],
        "color": [
            CaptionQuestion(f"What color is the {thing}?", color, f"The {thing} is {color}.")
            for thing, said in sorted(colors.items())
            for color in said
            if len(said) == 1
        ],
        "doing": [
            CaptionQuestion(f"What {_be(actor in _MANY)} the {actor} doing?", verb, f"The {actor} {_be(actor in _MANY)} {verb}.")
            for actor, verb in sorted(doing)
        ],
    }


def _be(many: bool) -> str:
    return "are" if many else "is"


def plural(word: str) -> bool:
    """Whether a word looks like more than one thing."""
    return word.endswith("s") and not word.endswith("ss") and word not in ("bus", "tennis")


def with_article(word: str) -> str:
    """`a dog`, `an apple`, `skis`."""
    return word if plural(word) else f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
