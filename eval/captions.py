"""Task `captions`: CIDEr and BLEU-4 against human captions, through pycocoevalcap.

Notable: the reference tokenizer is Stanford's and needs Java. Without Java a regular expression takes its place; on the 31,270 captions of
our photos the two differ in 14 (mostly stray apostrophes in web captions), and in none of those that this task scores.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.metrics import Metric, bootstrap, mean
from sparse_vlm.eval.questions import Asked, Item, QuestionTask
from sparse_vlm.eval.task import Data, Result, captions_of

PROMPT = "Provide a one-sentence caption for the provided image."  # what models here are trained to answer with one caption
MAX_NEW_TOKENS = 40

PUNCTUATION = {"''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "..", "...", ";"}
SPELLED = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
TOKEN = re.compile(
    r"""
    can(?=not\b)                                            # cannot is two words
  | \d+(?:[.,:/]\d+)+                                       # 1,000  3.5  10:30  1/2
  | (?:[a-z]\.){2,} | \b(?:mr|mrs|ms|dr|st|ft|jr|sr|no(?=\.\s*\d))\.  # u.s.  mr.  no. 1
  | \w+(?=n't\b) | n't\b                                    # do n't
  | '(?:s|m|d|ll|re|ve)\b | \w+?(?='(?:s|m|d|ll|re|ve)\b)   # man 's
  | \w+(?:[-./']\w+)*                                       # t-shirt  o'clock
  | \.\.+ | --+ | \S
    """,
    re.VERBOSE,
)


def regex_tokenize(caption: str) -> str:
    """Lower-case words without punctuation, separated by spaces, as Stanford's PTBTokenizer splits them."""
    return " ".join(SPELLED.get(word, word) for word in TOKEN.findall(caption.lower()) if word not in PUNCTUATION)


def java_tokenize(captions: Sequence[str]) -> list[str]:
    """The same through pycocoevalcap's PTBTokenizer; needs Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = PTBTokenizer().tokenize({i: [{"caption": " ".join(caption.split())}] for i, caption in enumerate(captions)})
    return [lines[i][0] for i in range(len(captions))]


def java_usable() -> bool:
    """Whether there is Java, and a place for the file through which the tokenizer is given its captions."""
    import pycocoevalcap.tokenizer.ptbtokenizer as module

    return shutil.which("java") is not None and os.access(os.path.dirname(module.__file__), os.W_OK)


def tokenize(captions: Sequence[str]) -> tuple[list[str], str]:
    """Tokenized captions, and which tokenizer made them."""
    if java_usable():
        return java_tokenize(captions), "PTBTokenizer (Java)"
    return [regex_tokenize(caption) for caption in captions], "regular expression (no Java here)"


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """CIDEr of tokenized captions; words are weighted by the references of these very photos."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, list(refs))
    return mean(np.asarray(scorer.compute_score()[1]), unit="x100")


def bleu4(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Metric:
    """Corpus BLEU-4 of tokenized captions, with the closest reference length, from pycocoevalcap's counts."""
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    rows = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        counts = cook_test(hypothesis, cook_refs(refs), eff="closest")
        rows.append([*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]])

    def statistic(sums: np.ndarray) -> np.ndarray:
        precisions = (sums[..., :4] + 1e-15) / (sums[..., 4:8] + 1e-9)
        length = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
        return np.exp(np.log(precisions).mean(-1) + np.minimum(0, 1 - 1 / length))

    return bootstrap(np.asarray(rows, float), statistic, unit="x100")


class Captions(QuestionTask):
    """One caption a photo."""

    files = ("eval/coco_vqa.tar",)
    max_new_tokens = MAX_NEW_TOKENS
    protocol: ClassVar[str] = f'"{PROMPT}", greedy, at most {MAX_NEW_TOKENS} tokens; CIDEr and BLEU-4 against the photo\'s captions'

    def items(self, data: Data) -> list[Item]:
        """A caption of every photo."""
        if find_spec("pycocoevalcap") is None:
            raise UserError("scoring captions needs pycocoevalcap: pip install 'sparse-vlm[eval]'")
        (file,) = self.files
        photos = data.everything(file)
        return [Item(photo, PROMPT, written) for photo, written in zip(photos, captions_of(photos, file), strict=True)]

    def grade(self, item: Item, answer: str) -> tuple[float, dict[str, Any]]:
        """No credit of its own: scores weigh words over all captions."""
        return 0.0, {"answer": answer, "references": item.truth}

    def result(self, asked: Asked, answers: Sequence[Any]) -> Result:
        """CIDEr and BLEU-4."""
        predictions = super().result(asked, answers).predictions
        written = [item.truth for _, item in asked]
        tokens, tokenizer = tokenize([*answers, *(caption for refs in written for caption in refs)])
        hypotheses, rest = tokens[: len(asked)], iter(tokens[len(asked) :])
        references = [[next(rest) for _ in refs] for refs in written]
        words = sum(len(hypothesis.split()) for hypothesis in hypotheses) / len(asked)
        notes = [f"tokenizer: {tokenizer}", f"{len(set(answers))} different captions of {len(asked)} photos, {words:.1f} words each"]
        return Result({"CIDEr": cider(hypotheses, references), "BLEU-4": bleu4(hypotheses, references)}, predictions, notes)
