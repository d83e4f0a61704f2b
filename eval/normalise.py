"""Normalization of short answers before they are compared: the rules of VQA, of M4C (TextVQA) and of GQA.

Sources: "Evaluation" of the VQA challenge (visualqa.org/evaluation.html; Antol et al. 2015, section 4, and `vqaEval.py`): lower case, no
articles, number words as digits, apostrophes where a contraction lacks them, punctuation to blanks except apostrophes and colons, no
comma between digits, no full stop but a decimal's; an answer's accuracy is min(matches / 3, 1), averaged over the ten subsets of nine
annotators. M4C's `EvalAIAnswerProcessor`, which LLaVA scores TextVQA with, drops commas and question marks and sets 's apart first. GQA's
`eval.py` compares strings; LLaVA's `convert_gqa_for_eval.py` lower-cases an answer and drops its full stop before.

Notable: `vqaEval.py` normalises only where the annotators differ, the description always; here it is always, which differs where all ten
wrote the same words and the model an equivalent of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

ARTICLES = ("a", "an", "the")
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBER_WORDS)} | {"none": "0"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Contractions that are restored. Each is looked up by its own spelling with one apostrophe missing, whichever of them that is.
RESTORED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in RESTORED.split() for i, letter in enumerate(word) if letter == "'"}
# The official table has this one the wrong way round, and scores were made with it.
CONTRACTIONS["somebody'd"] = "somebodyd"
BETWEEN_DIGITS = re.compile(r"\d,+\d")
FULL_STOP = re.compile(r"\.(?!\d)")


def _without_punctuation(text: str) -> str:
    """A mark goes without a trace where a blank stands beside it or the text has a comma between digits; else it becomes a blank."""
    thousands = BETWEEN_DIGITS.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        found = found.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    return FULL_STOP.sub("", found)


def vqa_answer(text: str) -> str:
    """An answer by VQA's rules, such as "2 dogs" of "The two dogs."."""
    words = [DIGITS.get(word, word) for word in _without_punctuation(" ".join(text.split())).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def m4c_answer(text: str) -> str:
    """An answer by M4C's rules: as VQA's, after commas and question marks are dropped and "'s" is a word of its own."""
    return vqa_answer(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def gqa_answer(text: str) -> str:
    """An answer as LLaVA hands it to GQA's script: lower case, without full stops at its end."""
    return text.strip().rstrip(".").lower()


def human_accuracy(answer: str, humans: Sequence[str], normalise: Callable[[str], str]) -> float:
    """VQA's accuracy of an answer: min(matches / 3, 1), averaged over the subsets that leave one annotator out.

    Args:
        humans: what the annotators answered, ten in VQA and TextVQA.

    Returns:
        With ten annotators 0, 0.3, 0.6 and 0.9 for none to three that agree, and 1 for more.
    """
    predicted, references = normalise(answer), [normalise(human) for human in humans]
    matches = sum(human == predicted for human in references)
    return sum(min(1.0, (matches - (human == predicted)) / 3) for human in references) / len(references)
