"""Conversations about photos, out of what is known about them: captions, questions, statements and labels.

Notable: a question must not give its answer away. Yes and no are balanced word by word ("is there a person?" is almost always yes in
photos of people, and a model learns to answer that without looking), and words that occur in captions alone get questions, too: yes
where a caption names them, no where none of at least five captions does.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_vlm.data.caption_questions import plural, questions_of, with_article
from sparse_vlm.errors import UserError, printable
from sparse_vlm.images.photos import Photo
from sparse_vlm.utils.documents import is_encodable
from sparse_vlm.vlm.prompts import Message, assistant, user

# LLaVA's requests for a brief description; the first is what its successors ask for a caption.
CAPTION_PROMPTS = (
    "Provide a one-sentence caption for the provided image.",
    "Describe the image concisely.",
    "Provide a brief description of the given image.",
    "Offer a succinct explanation of the picture presented.",
    "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image.",
    "Share a concise interpretation of the image provided.",
    "Present a compact description of the photo's key features.",
    "Relay a brief, clear account of the picture shown.",
    "Render a clear and concise summary of the photo.",
    "Write a terse but informative summary of the picture.",
    "Create a compact narrative representing the image presented.",
)
SHORT_ANSWER = "Answer the question using a single word or phrase."
MIN_CAPTIONS = 5  # fewer do not say enough about what is not there
MIN_PHOTOS = 12  # that a word must occur in before it is asked for
_NOT_THINGS = (
    "bunch couple few group lot number pair row side top variety front back background air distance day picture photo image view area "
    "place way set piece part type kind middle end edge bit line style shot scene time trick jump game match kiss break ride run "
    "black white blue brown red yellow green orange pink gray grey purple"
)
# a caption names people in many ways, and all of them are a person
_PERSON = "man men woman women boy girl child children kid people person player lady guy toddler baby skier surfer rider couple crowd"


@dataclass(frozen=True)
class Example:
    """Conversations about the same photos, or about none.

    Attributes:
        name: what to call it in messages to people.
        photos: in the order of their marks; each conversation shows all of them, as `{"type": "image"}` without the image.
    """

    name: str
    photos: tuple[Photo, ...]
    conversations: tuple[tuple[Message, ...], ...]


@dataclass(frozen=True)
class Mixture:
    """What a stage takes from a photo at each visit.

    Attributes:
        captions: maximum number of human captions.
        web_captions: whether captions that no person wrote for the photo are used.
        labels: whether class names become a question.
        questions: maximum number of questions and statements.
        existence_only: whether all of them ask for what is there.
        caption_questions: maximum of each kind of questions that captions answer (`data.caption_questions`).
    """

    captions: int
    web_captions: bool
    labels: bool
    questions: int
    existence_only: bool = False
    caption_questions: int = 0


MIXTURES: dict[str, Mixture] = {
    "read": Mixture(captions=3, web_captions=False, labels=False, questions=12, existence_only=True),
    "align": Mixture(captions=5, web_captions=True, labels=True, questions=0),
    "instruct": Mixture(captions=2, web_captions=False, labels=False, questions=6, caption_questions=1),
}


def clean_caption(text: str) -> str:
    """A caption as a sentence: one space between words, none before punctuation, a capital, a full stop."""
    text = re.sub(r"\s+", " ", text).strip().strip('"').strip()
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"\s+('s\b|n't\b|')", r"\1", text)
    if not text:
        return ""
    if text[-1] not in ".!?":
        text = text.rstrip(",;:") + "."
    return text[0].upper() + text[1:]


def existence(word: str, rng: random.Random) -> str:
    """Ask whether something is there, mostly as POPE asks."""
    if plural(word):
        return f"Are there {word} in the image?"
    return f"Is there {with_article(word)} in the image?" if rng.random() < 0.8 else f"Does {word} exist in the image?"


@dataclass(frozen=True)
class _Item:
    """One question of a photo; `word` where it asks whether something is there."""

    question: str
    answer: str
    word: str | None = None


def known_about(photo: Photo) -> Photo:
    """The photo with what its json says in the types that it must have; one caption may stand without a list.

    Raises:
        UserError: a value of another type, or a text with half of a character; the line names the photo and the key.
    """

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    def records(value: Any, fields: dict[str, type | tuple[type, ...]]) -> bool:
        return isinstance(value, list) and all(
            isinstance(one, dict) and all(isinstance(one.get(name), kind) for name, kind in fields.items()) for one in value
        )

    must = {
        "captions": ("a text or a list of texts", lambda value: isinstance(value, str) or texts(value)),
        "prompt": ("a text", lambda value: isinstance(value, str)),
        "label_name": ("a text", lambda value: isinstance(value, str)),
        "objects": ("a list of texts", texts),
        "qa": ('a list of {"q": text, "a": text}', lambda value: records(value, {"q": str, "a": (str, int, float)})),
        "vsr": ('a list of {"statement": text, "label": true or false}', lambda value: records(value, {"statement": str, "label": int})),
    }
    info, name = photo.info, f"{photo.source.name}:{photo.key}"
    for key, (what, fits) in must.items():
        value = info.get(key)
        if value is not None and not fits(value):
            raise UserError(f"{name}: {key!r} in its json must be {what}, not {json.dumps(value)[:40]}")
        if value is not None and not is_encodable(json.dumps(value, ensure_ascii=False)):
            raise UserError(f"{name}: {key!r} in its json holds half of a character (a surrogate alone); write the whole one")
    if isinstance(info.get("captions"), str):
        return dataclasses.replace(photo, info=info | {"captions": [info["captions"]]})
    return photo


def examples_of_photos(photos: Sequence[Photo], mix: Mixture, visits: int = 1, seed: int = 0) -> list[Example]:
    """Conversations about every photo that something is known about, `visits` times with other captions and questions each time.

    Returns:
        Examples in the order of visits, then photos.

    Raises:
        UserError: nothing is known about any photo, or a photo's json holds something of another type.
    """
    photos = [known_about(photo) for photo in photos]
    items = _balanced(photos, seed) if mix.questions else [[] for _ in photos]
    things = {item.word for asked in items for item in asked if item.word}
    examples = []
    for visit in range(visits):
        for photo, asked in zip(photos, items, strict=True):
            rng = random.Random(f"{seed}/{visit}/{photo.source.name}/{photo.key}".encode("utf-8", "surrogatepass"))
            conversations = [*_captions(photo.info, mix, rng), *_labels(photo.info, mix), *_questions(asked, mix, rng)]
            conversations += _caption_questions(photo.info, things, asked, mix, rng)
            if conversations:
                examples.append(Example(printable(f"{photo.source.name}:{photo.key}"), (photo,), tuple(conversations)))
    if not examples:
        names = list(dict.fromkeys(photo.source.name for photo in photos))
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{where}: no photo has captions, questions or labels that this stage uses; give tars whose json files hold them")
    return examples


def _captions(info: dict[str, Any], mix: Mixture, rng: random.Random) -> Iterable[tuple[Message, ...]]:
    captions = list(dict.fromkeys(text for caption in info.get("captions") or [] if (text := clean_caption(caption))))
    if info.get("prompt") is not None and not mix.web_captions:
        return
    rng.shuffle(captions)
    prompt = CAPTION_PROMPTS[0] if rng.random() < 0.6 else rng.choice(CAPTION_PROMPTS)
    if info.get("prompt") is not None:
        prompt = info["prompt"].replace("<image>", "").strip()
    for caption in captions[: mix.captions]:
        yield user(prompt, 1), assistant(caption)


def _labels(info: dict[str, Any], mix: Mixture) -> Iterable[tuple[Message, ...]]:
    name = str(info.get("label_name") or "").split(",")[0].replace("_", " ").strip().lower()
    if mix.labels and name and not info.get("captions"):
        yield user(f"What is the main object in the image?\n{SHORT_ANSWER}", 1), assistant(name.capitalize())


def _questions(items: list[_Item], mix: Mixture, rng: random.Random) -> Iterable[tuple[Message, ...]]:
    """Conversations of one or two turns out of a photo's questions; single questions share all that stands before them."""
    if mix.existence_only:
        items = [item for item in items if item.word]
    chosen = rng.sample(items, min(len(items), mix.questions))
    while chosen:
        turns = [chosen.pop() for _ in range(min(len(chosen), rng.choice((1, 1, 1, 1, 2))))]
        messages: list[Message] = []
        for turn, item in enumerate(turns):
            question = existence(item.word, rng) if item.word else item.question
            if rng.random() < 0.3:
                question = f"{question}\n{SHORT_ANSWER}"
            messages += [user(question, 1 if turn == 0 else 0), assistant(item.answer)]
        yield tuple(messages)


def _caption_questions(
    info: dict[str, Any], things: set[str], items: list[_Item], mix: Mixture, rng: random.Random
) -> Iterable[tuple[Message, ...]]:
    """Single questions that the captions answer."""
    if not mix.caption_questions:
        return
    there = {item.word for item in items if item.word and item.answer == "Yes"}
    for found in questions_of(info.get("captions") or [], things, there).values():
        for asked in rng.sample(found, min(len(found), mix.caption_questions)):
            if rng.random() < 0.5:
                yield user(f"{asked.question}\n{SHORT_ANSWER}", 1), assistant(asked.word)
            else:
                yield user(asked.question, 1), assistant(asked.sentence)


def _balanced(photos: Sequence[Photo], seed: int) -> list[list[_Item]]:
    """Every photo's questions, yes and no equally often for each word."""
    rng = random.Random(seed)
    items: list[list[_Item]] = []
    yes: dict[str, list[int]] = {}
    no: dict[str, list[int]] = {}
    for index, photo in enumerate(photos):
        known, own = _known(photo.info)
        items.append(own)
        for word, there in known.items():
            (yes if there else no).setdefault(word, []).append(index)
    for word, mentioned in _mentions(photos, yes.keys() | no.keys()).items():
        there = sorted(mentioned | set(yes.get(word, ())))
        absent = sorted(set(no.get(word, ())) - mentioned)
        taken = {*there, *absent}
        silent = [i for i, p in enumerate(photos) if i not in taken and _says_enough(p)]
        wanted = max(0, len(there) - len(absent))
        yes[word], no[word] = there, [*absent, *rng.sample(silent, min(wanted, len(silent)))]
    for word in sorted(yes.keys() | no.keys()):
        sides = [yes.get(word, []), no.get(word, [])]
        count = min(map(len, sides))
        for side, answer in zip(sides, ("Yes", "No"), strict=True):
            for index in rng.sample(side, count):
                items[index].append(_Item("", answer, word))
    return items


def _known(info: dict[str, Any]) -> tuple[dict[str, bool], list[_Item]]:
    """What a photo's annotations say is there or not, and its other questions."""
    known: dict[str, bool] = {str(name): True for name in info.get("objects") or []}
    items = []
    for question in info.get("qa") or []:
        text, answer = question["q"].strip(), str(question["a"]).strip().rstrip(".")
        found = re.fullmatch(r"Does (.+) exist in the image\?", text)
        if found and answer in ("Yes", "No"):
            known[found.group(1)] = answer == "Yes"
        else:
            items.append(_Item(text, answer))
    for statement in info.get("vsr") or []:
        items.append(_Item(f"Is this statement true? {statement['statement']}", "Yes" if statement["label"] else "No"))
    return known, items


def _says_enough(photo: Photo) -> bool:
    return len(photo.info.get("captions") or []) >= MIN_CAPTIONS


def _mentions(photos: Sequence[Photo], known: Iterable[str]) -> dict[str, set[int]]:
    """Things, and the photos whose captions name them: the known ones, and words that captions use as the name of a thing.

    A word counts as one where it stands, often enough, between an article and a word that can only follow a noun.
    """
    head = re.compile(r"\b(?:a|an)\s+([a-z]{3,})\s+(?:in|on|at|is|near|next|under|while|that|by|behind|beside|to|sitting|standing)\b")
    found: Counter[str] = Counter()
    phrases: dict[str, set[int]] = {}
    for index, photo in enumerate(photos):
        if not _says_enough(photo):
            continue
        text = " ".join(photo.info["captions"]).lower()
        found.update(set(head.findall(text)))
        words = re.findall(r"[a-z]+", text)
        for phrase in {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}:
            phrases.setdefault(phrase, set()).add(index)
    new = {word for word, count in found.items() if count >= MIN_PHOTOS and not word.endswith("ing")} - set(_NOT_THINGS.split())
    names = {thing: [thing, f"{thing}s", f"{thing}es"] for thing in sorted({*known, *new})}
    if "person" in names:
        names["person"] += _PERSON.split()
    return {thing: set().union(*(phrases.get(name, set()) for name in forms)) for thing, forms in names.items()}
