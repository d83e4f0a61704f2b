"""Metrics against cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparse_vlm.eval.captions import bleu4, cider, java_tokenize, java_usable, regex_tokenize
from sparse_vlm.eval.metrics import (
    bootstrap,
    cosine,
    difference,
    grouped_mean,
    image_to_text_ranks,
    mean,
    ratio,
    text_to_image_ranks,
    top_k_hits,
    yes_no,
)


def test_top_k() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.1], [0.4, 0.4, 0.0]])
    labels = np.array([0, 0, 0])
    assert top_k_hits(scores, labels, 1).tolist() == [1, 0, 0], "a tie is no hit"
    assert top_k_hits(scores, labels, 2).tolist() == [1, 1, 1]


def test_retrieval_ranks() -> None:
    # two photos; texts 0 and 1 belong to photo 0, text 2 to photo 1
    similarity = np.array([[0.1, 0.6, 0.7], [0.5, 0.2, 0.65]])
    owner = np.array([0, 0, 1])
    assert text_to_image_ranks(similarity, owner).tolist() == [1, 0, 1]
    assert image_to_text_ranks(similarity, owner).tolist() == [1, 0]
    # an equal stranger is counted before
    assert image_to_text_ranks(np.array([[0.5, 0.5]]), np.array([0, 1])).tolist() == [1]


def test_a_constant_model_retrieves_nothing() -> None:
    flat = np.ones((4, 8))
    owner = np.repeat(np.arange(4), 2)
    assert (text_to_image_ranks(flat, owner) == 3).all()
    assert (image_to_text_ranks(flat, owner) == 6).all()


def test_yes_no() -> None:
    # 2 true positives, 1 false positive, 1 false negative, 4 true negatives
    truth = [True, True, True, False, False, False, False, False]
    said = [True, True, False, True, False, False, False, False]
    scores = yes_no(said, truth, photo=[0, 0, 1, 1, 2, 2, 3, 3])
    assert {name: round(metric.value, 4) for name, metric in scores.items()} == {
        "accuracy": 0.75,
        "precision": 0.6667,
        "recall": 0.6667,
        "F1": 0.6667,
        "yes-ratio": 0.375,
    }
    assert scores["accuracy"].units == 4, "photos are resampled, not questions"
    always = yes_no([True] * 4, [True, True, False, False], [0, 1, 2, 3])
    assert (always["accuracy"].value, always["recall"].value, always["yes-ratio"].value) == (0.5, 1.0, 1.0)
    assert always["F1"].value == pytest.approx(2 / 3)
    never = yes_no([False] * 2, [True, False], [0, 1])
    assert (never["precision"].value, never["F1"].value) == (0, 0)


def test_questions_weigh_alike_and_photos_are_resampled() -> None:
    metric = grouped_mean([True, True, True, False], [7, 7, 7, 9])
    assert metric.value == 0.75
    assert metric.units == 2
    assert (metric.low, metric.high) == (0.0, 1.0)


def test_interval_is_that_of_a_proportion() -> None:
    hits = np.arange(400) % 4 == 0
    metric = mean(hits)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert metric.value == 0.25
    assert metric.low == pytest.approx(0.25 - half, abs=0.006)
    assert metric.high == pytest.approx(0.25 + half, abs=0.006)
    assert mean(hits) == metric, "the same every time"
    with pytest.raises(ValueError, match="no photos"):
        mean(np.array([]))


def test_ratios_are_paired() -> None:
    hits = (np.arange(300) % 3 == 0).astype(float)
    same = ratio(mean(hits), mean(hits))
    assert (same.value, same.low, same.high) == (1, 1, 1)
    fewer = hits.copy()
    fewer[:30] = 0
    kept = ratio(mean(fewer), mean(hits))
    assert kept.value == pytest.approx(0.9)
    assert 0.83 < kept.low < 0.9 < kept.high < 0.96
    assert np.isnan(ratio(mean(hits), mean(hits * 0)).value)
    with pytest.raises(ValueError, match="300 and 299"):
        ratio(mean(hits), mean(hits[1:]))


def test_differences_are_paired() -> None:
    hits = (np.arange(300) % 3 == 0).astype(float)
    fewer = hits.copy()
    fewer[:30] = 0
    more = difference(mean(hits), mean(fewer))
    assert more.value == pytest.approx(1 / 30)
    # one hit in thirty photos, whatever else is drawn: a tenth as wide as the two values' own intervals would say
    assert 0.01 < more.low < 1 / 30 < more.high < 0.06
    assert (difference(mean(hits), mean(hits)).low, difference(mean(hits), mean(hits)).high) == (0, 0)
    with pytest.raises(ValueError, match="300 and 299"):
        difference(mean(hits), mean(hits[1:]))


def test_statistic_of_sums() -> None:
    parts = np.array([[1.0, 2.0], [3.0, 4.0]])
    assert bootstrap(parts, lambda sums: sums[..., 0] / sums[..., 1]).value == pytest.approx(4 / 6)


def test_cosine() -> None:
    assert cosine(np.array([[3.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [1.0, -1.0]])).tolist() == [1, 0]


HYPOTHESES = ["a man rides a horse on the beach", "two dogs play in snow", "a plate of food"]
REFERENCES = [
    ["a man riding a horse on a beach", "a person rides a horse on the sandy beach"],
    ["two dogs are playing in the snow", "dogs play in the snow", "two dogs run"],
    ["a plate with some food on it", "some food on a white plate"],
]


def test_captions_worked_by_hand() -> None:
    """BLEU: n-grams of the caption that a reference has, each as often as it is there; a caption that is too short pays e^(1 - r/c).
    CIDEr: tf-idf cosines of 1- to 4-grams, averaged, times ten."""
    # 5 of 6 words (one "the" more than there is), 3 of 5 pairs, 2 of 4, 1 of 3
    assert bleu4(["a cat sits on the mat"], [["a cat sits on a mat"]]).value == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert bleu4(["the the the the"], [["the cat the dog"]]).value < 1e-3, "of pairs there is none"
    assert bleu4(["a cat sits on"], [["a cat sits on a mat"]]).value == pytest.approx(math.exp(1 - 6 / 4)), "all of it is right, and short"
    # counts are those of all captions together, 5 + 4 of 6 + 4 words and so on, and the lengths are 10 and 10
    both = bleu4(["a cat sits on the mat", "two dogs run fast"], [["a cat sits on a mat"], ["two dogs run fast"]])
    assert both.value == pytest.approx((9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25)
    # no n-gram is in both photos' references, so all weigh ln 2: 3 of 4 words, 2 of 3 pairs, 1 of 2, 0 of 1; the other is its reference
    found = cider(["red cat sleeps now", "a blue dog runs"], [["red cat sleeps here"], ["a blue dog runs"]])
    assert found.value == pytest.approx((10 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4 + 10) / 2)
    # a word that every photo's references have weighs nothing: "a" is worth no more than no word at all
    assert cider(["a", "a blue dog runs"], [["a cat"], ["a blue dog runs"]]).value == pytest.approx(5)


def test_caption_scores_are_those_of_pycocoevalcap() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    results = {i: [hypothesis] for i, hypothesis in enumerate(HYPOTHESES)}
    truth = dict(enumerate(REFERENCES))
    assert bleu4(HYPOTHESES, REFERENCES).value == pytest.approx(Bleu(4).compute_score(truth, results, verbose=0)[0][3], abs=1e-9)
    assert bleu4(["a man"], [["a man"]]).value == pytest.approx(0, abs=1e-3)
    assert cider(HYPOTHESES, REFERENCES).value == pytest.approx(Cider().compute_score(truth, results)[0], abs=1e-12)


def test_perfect_captions() -> None:
    refs = [row[:1] for row in REFERENCES]
    assert bleu4([row[0] for row in refs], refs).value == pytest.approx(1)
    assert cider([row[0] for row in refs], refs).value == pytest.approx(10)


CAPTIONS = [
    'A man\'s t-shirt says "No. 1" (really)!',
    "Two dogs don't play; they can't -- or cannot...",
    "It is 10:30 o'clock in the U.S. and Mr. Smith's 1,000 sheep, 3.5 of them black, don't care.",
    "she'll say: 'they're the dogs' bone' & we've seen [it] {all}",
    "A woman   looking\tup.. at the sky.com sign skating/skiing",
    "CAFÉ à la carte, naïve 50% of $3",
]


def test_regex_tokens() -> None:
    assert regex_tokenize("A man's t-shirt (really)!") == "a man 's t-shirt -lrb- really -rrb-"
    assert regex_tokenize("Two dogs don't play; they cannot...") == "two dogs do n't play they can not"


@pytest.mark.skipif(not java_usable(), reason="no Java here")
def test_regex_tokens_are_those_of_java() -> None:
    assert [regex_tokenize(caption) for caption in CAPTIONS] == java_tokenize(CAPTIONS)
