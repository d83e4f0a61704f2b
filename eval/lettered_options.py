"""Questions with lettered options: how they are asked, and which option an answer in a model's own words means.

Sources: the prompt is LLaVA's (`model_vqa_mmbench.py`, `model_vqa_science.py`). `science_choice` is LLaVA's `eval_science_qa.py`.
`mmbench_choice` is what MMBench (Liu et al. 2023, section 4, "heuristic matching") tries before it asks an LLM, as in the evaluator that
its authors published: one letter alone or with its usual marks, then the text of one option. No LLM is asked here, so an answer that this
does not settle is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDE"
ANSWER_WITH_A_LETTER = "Answer with the option's letter from the given choices directly."
# What may stand around a letter, in the order in which it is looked for.
AROUND = (
    *(("", after) for after in ("", ".", ",", ":", ")", ").")),
    *(("(", after) for after in (")", ").")),
    *((":", after) for after in ("", ",", ".", ")", ").")),
)
ARTICLE_AMONG = 3  # in an answer of more words, a bare A is an article


def lettered(question: str, options: Sequence[str], hint: str = "") -> str:
    """A question with its options, one a line, asking for a letter.

    Args:
        hint: stands on a line before the question.
    """
    lines = [*([hint] if hint else []), question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    return "\n".join([*lines, ANSWER_WITH_A_LETTER])


def science_choice(answer: str, options: int) -> int | None:
    """The option an answer means: "B", "B. ..." or "The answer is B"; None where it is none of them.

    Args:
        options: how many there are.
    """
    said = answer.replace("\n", ". ")
    found = re.fullmatch(r"\s*([A-E])\s*", said) or re.match(r"([A-E])\. ", said) or re.search(r"The answer is ([A-E])", said)
    number = LETTERS.index(found[1]) if found else options
    return number if number < options else None


def mmbench_choice(answer: str, options: Sequence[str]) -> int | None:
    """The option an answer means: by exactly one letter in it, or by the text of exactly one option; None where neither settles it."""
    words = answer.split()
    for before, after in AROUND:
        found = [number for number, letter in enumerate(LETTERS) if f"{before}{letter}{after}" in words]
        if len(found) == 1 and not (not before + after and "A" in words and len(words) > ARTICLE_AMONG):
            return found[0] if found[0] < len(options) else None
    found = [number for number, option in enumerate(options) if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None
