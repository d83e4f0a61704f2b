"""Short questions whose answers stand in a photo's captions: what is there, who, where, what someone does and with what, what colour.

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
_MANY, _NO_DOING, _COLOR_WORDS = (frozenset(words.split()) for words in (_PLURALS, _NOT_ACTIONS, _COLORS))
_THERE = ("What is in the image?", "What can be seen in the picture?", "What is in this picture?", "Name something in the image.")

_HANDLINGS = "wearing holding riding carrying eating throwing catching chasing hitting kicking pulling pushing using drinking cutting"
_WHO = "man woman boy girl child baby men women boys girls children people"
_SPORTS = (
    "baseball tennis soccer football basketball volleyball hockey golf rugby skateboarding surfing skiing snowboarding swimming kayaking "
    "cycling wrestling"
)
_PLACES = (
    "beach street field court park pool room ocean road sidewalk kitchen yard city woods forest lake river bathroom bedroom mountain hill "
    "slope restaurant playground zoo station airport office store shop track path ramp pond gym farm market snow water"
)

_COLORED = re.compile(rf"\b({'|'.join(_COLORS.split())}) ([a-z]{{3,}})\b(?! and)")
_ACTING = re.compile(rf"\b({'|'.join(_ACTORS.split())})(?: is| are)? ([a-z]{{2,}}ing)\b")
_HANDLING = re.compile(
    rf"\b({'|'.join(_ACTORS.split())})(?: is| are)? ({'|'.join(_HANDLINGS.split())}) "
    r"(?:an?|the|his|her|their|some|two)? ?([a-z]+)(?: ([a-z]+))?"
)
_AT = re.compile(rf"\b(in|on|at) (an? |the )(?:[a-z]+ )?({'|'.join(_PLACES.split())})\b")


@dataclass(frozen=True)
class CaptionQuestion:
    """A question, its answer in one or two words of lower case, and as a sentence."""

    question: str
    word: str
    sentence: str


def questions_of(captions: Iterable[str], things: Collection[str], there: Collection[str]) -> dict[str, list[CaptionQuestion]]:
    """Questions by kind: `there`, `who`, `where`, `sport`, `color`, `doing`, `handling` (what someone holds, rides, wears).

    Args:
        things: words that are known to name things; only these have a colour, or are held, ridden and worn.
        there: what is known to be in the photo.
    """
    colors: dict[str, set[str]] = {}
    doing: set[tuple[str, str]] = set()
    handling: set[tuple[str, str, str]] = set()
    places: dict[str, str] = {}
    words: set[str] = set()
    for caption in map(str.lower, captions):
        words.update(re.findall(r"[a-z]+", caption))
        for actor, verb, *objects in _HANDLING.findall(caption):
            handling.update((actor, verb, thing) for thing in objects if thing in things and thing not in _COLOR_WORDS)
        for at, article, place in _AT.findall(caption):
            places[place] = f"{at} {f'the {place}' if article == 'the ' else with_article(place)}"
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
        "who": [
            CaptionQuestion(
                "Who is in the picture?", who, f"There {_be(who in _MANY)} {who if who in _MANY else with_article(who)} in the picture."
            )
            for who in _WHO.split()
            if who in words
        ],
        "where": [CaptionQuestion("Where is this?", place, f"This is {at}.") for place, at in sorted(places.items())],
        "sport": [CaptionQuestion("What sport is this?", sport, f"The sport is {sport}.") for sport in _SPORTS.split() if sport in words],
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
        "handling": [
            CaptionQuestion(
                f"What {_be(actor in _MANY)} the {actor} {verb}?", thing, f"The {actor} {_be(actor in _MANY)} {verb} {with_article(thing)}."
            )
            for actor, verb, thing in sorted(handling)
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
