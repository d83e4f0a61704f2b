"""How answers are compared, against cases worked by hand from what the benchmarks' authors say."""

from __future__ import annotations

import pytest

from sparse_vlm.eval.multiple_choice import LETTERS, lettered, mmbench_choice, science_choice
from sparse_vlm.eval.normalise import CONTRACTIONS, gqa_answer, human_accuracy, m4c_answer, vqa_answer


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        # the examples of visualqa.org/evaluation.html
        ("dont", "don't"),
        ("100,978", "100978"),
        ("2:50 pm", "2:50 pm"),
        ("girl's", "girl's"),
        # lower case, articles, number words, full stops but those of decimals
        ("The two  Dogs.", "2 dogs"),
        ("An apple a day", "apple day"),
        ("none", "0"),
        ("TEN", "10"),
        ("eleven", "eleven"),
        ("3.5 m.", "3.5 m"),
        ("U.S.A.", "usa"),
        # punctuation becomes a blank, or nothing beside a blank or where a comma stands between digits
        ("t-shirt", "t shirt"),
        ("red/white", "red white"),
        ("red, white", "red white"),
        ("yes!", "yes"),
        ("(left)", "left"),
        ("1,000 x-rays", "1000 xrays"),
        # contractions, one apostrophe missing of one or two
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall", "y'all"),
        ("oclock", "o'clock"),
        ("shed", "shed"),
        ("somebody'd", "somebodyd"),
        ("a\nb\tc", "b c"),
        ("", ""),
    ],
)
def test_vqa_normalisation(answer: str, left: str) -> None:
    assert vqa_answer(answer) == left
    assert all(vqa_answer(word) == word or word == "somebodyd" for word in CONTRACTIONS.values())


def test_m4c_normalisation_sets_the_genitive_apart() -> None:
    assert m4c_answer("Kellogg's, Inc?") == "kellogg 's inc"
    assert m4c_answer("The 2,000th") == "2000th"
    assert vqa_answer("Kellogg's") == "kellogg's"


def test_they_are_those_of_the_evaluators_in_use() -> None:
    """Beside M4C's processor as lmms-eval carries it, on answers of every kind of part."""
    theirs = pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric", reason="lmms-eval is not installed").EvalAIAnswerProcessor()
    parts = [
        "a",
        "The",
        "two",
        "none",
        "dont",
        "it's",
        "1,000",
        "3.5",
        "dogs.",
        "t-shirt",
        "(red)",
        "2:30",
        "what?",
        "a/b",
        "x,",
        "\n",
        "'s",
    ]
    for one in parts:
        for other in parts:
            for answer in (one + other, f"{one} {other}", f"{one} {other}{one}"):
                assert m4c_answer(answer) == theirs(answer), answer
                plain = theirs.process_digit_article(theirs.process_punctuation(answer.replace("\n", " ").strip()))
                assert vqa_answer(answer) == plain, answer


def test_vqa_accuracy_over_subsets_of_nine() -> None:
    """One who agrees of ten: the nine subsets with them give 1/3, the one without 0: 0.3 on average; and so on."""
    for agreeing, accuracy in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)):
        humans = ["Two dogs."] * agreeing + [f"cat {i}" for i in range(10 - agreeing)]
        assert human_accuracy("The 2 dogs", humans, vqa_answer) == pytest.approx(accuracy)
    assert human_accuracy("Kellogg 's", ["kellogg's"] * 10, m4c_answer) == 1
    assert human_accuracy("Kellogg 's", ["kellogg's"] * 10, vqa_answer) == 0


def test_gqa() -> None:
    assert gqa_answer(" Yes.") == "yes"
    assert gqa_answer("The dog") == "the dog", "GQA's script compares strings, articles and all"


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("B", 1),
        (" B ", 1),
        ("B. a mammal", 1),
        ("The answer is C.", 2),
        ("I think so. The answer is A", 0),
        ("B) a mammal", None),
        ("b", None),
        ("D", None),  # of three options
        ("B\nbecause", 1),
        ("a mammal", None),
        ("", None),
    ],
)
def test_science_choice(answer: str, choice: int | None) -> None:
    assert science_choice(answer, 3) == choice


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("C", 2),
        ("(C)", 2),
        ("C.", 2),
        ("The answer is B", 1),
        ("Answer: B, surely", 1),
        ("A", 0),
        ("A dog", 0),  # three words or fewer: the letter
        ("A dog runs away fast", 1),  # more: an article, so the text decides
        ("It is a CAT.", 0),
        ("cat or dog", None),
        ("B or C", None),
        ("E", None),  # no such option
        ("a horse", None),
        ("", None),
    ],
)
def test_mmbench_choice(answer: str, choice: int | None) -> None:
    assert mmbench_choice(answer, ["cat", "dog", "cow", "hen"]) == choice


def test_lettered_questions_are_those_of_llava() -> None:
    options = ["Maine", "Ohio"]
    ending = "A. Maine\nB. Ohio\nAnswer with the option's letter from the given choices directly."
    assert lettered("Which is farther north?", options) == f"Which is farther north?\n{ending}"
    assert lettered("Which?", options, hint="Context: a map") == f"Context: a map\nWhich?\n{ending}"
    assert len(LETTERS) == 5
