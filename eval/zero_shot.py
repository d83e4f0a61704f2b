"""Tasks `imagenet` and `cifar10`: zero-shot classification by the nearest class prompts.

Shape legend: P photos, C classes, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import mean, top_k_hits
from sparse_vlm.eval.task import Data, ImageTask, Result, classes_of
from sparse_vlm.images.photos import Photo

PROMPTS = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of the {}.")


def normalized(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def class_embeddings(names: list[str], features: Features) -> np.ndarray:
    """(C, E): the mean of each class's normalised prompt embeddings, normalised again."""
    prompts = [prompt.format(name.lower()) for name in names for prompt in PROMPTS]
    embeds = normalized(features.texts(prompts)).reshape(len(names), len(PROMPTS), -1)
    return normalized(embeds.mean(1))


def class_numbers(photos: Sequence[Photo], data: Data, file: str) -> tuple[list[str], np.ndarray]:
    """The names of all classes of a set, also of those that `--limit` leaves out, and the class of each photo, (P,)."""
    classes = classes_of(data.everything(file), file)
    position = {label: i for i, label in enumerate(classes)}
    return list(classes.values()), np.array([position[photo.info["label"]] for photo in photos])


class ZeroShot(ImageTask):
    """Top-1 and top-5 over all classes of a labelled set."""

    needs_text = True
    protocol: ClassVar[str] = (
        f"cosine to the mean of {len(PROMPTS)} prompts a class ({', '.join(repr(p) for p in PROMPTS)}), lower-case names, "
        "all classes of the set"
    )

    def __init__(self, file: str) -> None:
        self.files = (file,)

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Classify every photo."""
        (file,) = self.files
        photos = data.photos(file)
        names, labels = class_numbers(photos, data, file)
        scores = normalized(features.images(model, photos)) @ class_embeddings(names, features).T
        best = np.argsort(-scores, axis=1)[:, :5]
        predictions = [
            {"photo": photo.key, "label": names[label], "top5": [names[i] for i in row], "scores": [round(float(own[i]), 4) for i in row]}
            for photo, label, row, own in zip(photos, labels, best, scores, strict=True)
        ]
        return Result({f"top-{k}": mean(top_k_hits(scores, labels, k)) for k in (1, 5)}, predictions)
