"""Metrics with 95 % bootstrap intervals: top-k, recall at k, yes/no scores.

Shape legend: U units (photos), R bootstrap resamples, k sums a statistic is made of, P photos, T texts, C classes.

Notable: every metric is a function of sums over photos (accuracy is hits / answers, F1 is 2 TP / (2 TP + FP + FN), BLEU a product of such
ratios). So one function serves all: it draws how often each photo falls into a resample, multiplies those counts with the photos' rows, and
evaluates the function on R sums at once. The photo is what is resampled, never a single question or caption of it, because questions
about one photo are not independent. Two models over the same photos meet the same resamples, so the interval of their ratio is paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """A measured value with its 95 % interval over photos.

    Attributes:
        units: photos it was measured on.
        resampled: (R,) the value on each resample, kept for ratios.
        unit: "%" for a share of 1 that is shown as percent, "x100" for a score that is shown times 100, "" for a plain number.
    """

    value: float
    low: float
    high: float
    units: int
    unit: str = "%"
    resampled: Array = field(default_factory=lambda: np.empty(0), repr=False, compare=False)

    def shown(self) -> str:
        """The value as printed in tables."""
        return f"{100 * self.value:.1f}" if self.unit in ("%", "x100") else f"{self.value:.3f}"

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "photos": self.units, "unit": self.unit}


def bootstrap(parts: Array, statistic: Callable[[Array], Array], unit: str = "%", seed: int = 0) -> Metric:
    """A statistic of sums over photos, with its 95 % percentile interval over `RESAMPLES` resamples of the photos.

    Args:
        parts: (U, k) or (U,), one row a photo.
        statistic: from sums (..., k) to values (...).

    Raises:
        ValueError: no photo at all.
    """
    parts = np.asarray(parts, dtype=np.float64)
    if parts.ndim == 1:
        parts = parts[:, None]
    count = len(parts)
    if count == 0:
        raise ValueError("a metric over no photos")
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    resampled = statistic(draws @ parts)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Metric(float(statistic(parts.sum(0))), float(low), float(high), count, unit, resampled)


def _divide(top: Array, bottom: Array) -> Array:
    """0 where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom != 0)


def mean(values: Array, unit: str = "%") -> Metric:
    """The mean of one number a photo, (U,)."""
    return share(values, np.ones(len(values)), unit)


def share(sums: Array, counts: Array, unit: str = "%") -> Metric:
    """The mean of several numbers a photo: their sums and how many they are, both (U,)."""
    return bootstrap(np.stack([sums, counts], axis=1), lambda parts: _divide(parts[..., 0], parts[..., 1]), unit)


def ratio(metric: Metric, reference: Metric) -> Metric:
    """`metric` relative to `reference`, with a paired interval; both must be over the same photos. NaN against a reference of 0."""
    if metric.units != reference.units:
        raise ValueError(f"a ratio of metrics over {metric.units} and {reference.units} photos")
    if reference.value == 0:
        return Metric(float("nan"), float("nan"), float("nan"), metric.units)
    usable = reference.resampled != 0
    low, high = np.percentile(metric.resampled[usable] / reference.resampled[usable], [2.5, 97.5])
    return Metric(metric.value / reference.value, float(low), float(high), metric.units)


def difference(metric: Metric, reference: Metric) -> Metric:
    """`metric` minus `reference`, with a paired interval; both must be over the same photos."""
    if metric.units != reference.units:
        raise ValueError(f"a difference of metrics over {metric.units} and {reference.units} photos")
    low, high = np.percentile(metric.resampled - reference.resampled, [2.5, 97.5])
    return Metric(metric.value - reference.value, float(low), float(high), metric.units, metric.unit)


def top_k_hits(scores: Array, labels: Array, k: int) -> Array:
    """Whether the label is among the k highest of (P, C) scores: (P,) of 0 and 1. A tie counts against the model."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    return ((scores >= own).sum(1) <= k).astype(np.float64)


def image_to_text_ranks(similarity: Array, owner: Array) -> Array:
    """The best rank (0 is first) of any of a photo's own texts, (P,).

    Args:
        similarity: (P, T).
        owner: (T,), the photo each text belongs to.
    """
    own = owner[None, :] == np.arange(len(similarity))[:, None]
    best = np.where(own, similarity, -np.inf).max(1, keepdims=True)
    return ((similarity >= best) & ~own).sum(1)


def text_to_image_ranks(similarity: Array, owner: Array) -> Array:
    """The rank (0 is first) of each text's photo among all photos, (T,). `similarity` is (P, T), `owner` (T,)."""
    own = similarity[owner, np.arange(similarity.shape[1])]
    return (similarity >= own[None, :]).sum(0) - 1


def cosine(a: Array, b: Array) -> Array:
    """Cosine of matching rows, (U,)."""
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def yes_no(said_yes: Sequence[bool], is_yes: Sequence[bool], photo: Sequence[int]) -> dict[str, Metric]:
    """Accuracy, precision, recall, F1 (of "yes") and the share of "yes" among the answers, as POPE reports them.

    Args:
        said_yes: the model's answer to each question.
        is_yes: the truth.
        photo: the photo each question is about, as a number; questions are resampled a photo at a time.
    """
    predicted, truth, photo = np.asarray(said_yes, bool), np.asarray(is_yes, bool), np.asarray(photo)
    outcome = np.stack([predicted & truth, predicted & ~truth, ~predicted & truth, ~predicted & ~truth], axis=1).astype(np.float64)
    _, unit = np.unique(photo, return_inverse=True)
    parts = np.zeros((int(unit.max()) + 1, 4))
    np.add.at(parts, unit, outcome)

    def of(top: Sequence[float], bottom: Sequence[float]) -> Metric:
        return bootstrap(parts, lambda sums: _divide(sums @ np.asarray(top, float), sums @ np.asarray(bottom, float)))

    # the columns: true positives, false positives, false negatives, true negatives
    return {
        "accuracy": of([1, 0, 0, 1], [1, 1, 1, 1]),
        "precision": of([1, 0, 0, 0], [1, 1, 0, 0]),
        "recall": of([1, 0, 0, 0], [1, 0, 1, 0]),
        "F1": of([2, 0, 0, 0], [2, 1, 1, 0]),
        "yes-ratio": of([1, 1, 0, 0], [1, 1, 1, 1]),
    }


def grouped_mean(values: Sequence[float], photo: Sequence[int], unit: str = "%") -> Metric:
    """The mean over questions, resampled a photo at a time; `photo` numbers the photo of each question."""
    _, group = np.unique(np.asarray(photo), return_inverse=True)
    return share(np.bincount(group, weights=np.asarray(values, float)), np.bincount(group), unit)
