"""Tasks `knn` and `probe`: nearest neighbours and a linear classifier on embeddings of labelled photos.

Shape legend: P photos, E embedding, C classes.

Notable: the labelled sets are small, so each is divided into five folds by a hash of the photo's key, and every photo is classified once by
its neighbours in, or a classifier fitted on, the other four.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections import Counter
from typing import ClassVar

import numpy as np

from sparse_vlm.errors import UserError
from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import mean
from sparse_vlm.eval.task import Data, ImageTask, Result, labels_of
from sparse_vlm.eval.zero_shot import normalized
from sparse_vlm.images.photos import Photo

FOLDS = 5
MIN_PHOTOS = 5  # of a class; smaller ones could miss a fold
NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO
SETS = {
    # name: (tar, value of "set" in the photo's json)
    "imagen-200": ("train/imagen_200x5.tar", None),
    "nips-2017": ("train/nips2017_imagenet_like.tar", None),
    "imagenette": ("train/misc_diverse.tar", "imagenette"),
    "imagewoof": ("train/misc_diverse.tar", "imagewoof"),
    "pacs": ("train/misc_diverse.tar", "pacs"),
}


def fold_of(key: str) -> int:
    """The fold of a photo, 0 to `FOLDS` - 1; depends on its key alone."""
    return zlib.crc32(key.encode()) % FOLDS


class _FoldedClassification(ImageTask):
    """Top-1 on each labelled set, every photo classified from the other folds."""

    files = tuple(dict.fromkeys(file for file, _ in SETS.values()))

    def classify_by_folds(self, rows: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """A label of each row (P, E), from the rows of the other folds and their labels."""
        found = np.full(len(rows), -1)
        for fold in set(folds.tolist()):
            test = folds == fold
            found[test] = self.classify(rows[~test], labels[~test], rows[test])
        return found

    @abstractmethod
    def classify(self, known: np.ndarray, labels: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        """Labels of `unknown` (U, E) from `known` (K, E) and their labels (K,); rows have length one."""

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Classify every photo of every labelled set."""
        metrics, predictions = {}, []
        for name, (file, subset) in SETS.items():
            photos, names = _usable(data, file, subset, name)
            classes = sorted(set(names))
            labels = np.array([classes.index(label) for label in names])
            folds = np.array([fold_of(photo.key) for photo in photos])
            found = self.classify_by_folds(normalized(features.images(model, photos)), labels, folds)
            metrics[f"{name} top-1"] = mean(found == labels)
            predictions += [
                {"set": name, "photo": photo.key, "label": label, "answer": classes[index]}
                for photo, label, index in zip(photos, names, found, strict=True)
            ]
        return Result(metrics, predictions)


def _usable(data: Data, file: str, subset: str | None, name: str) -> tuple[list[Photo], list[str]]:
    """Photos of classes with at least `MIN_PHOTOS` (after --limit, of two folds), and their class names."""
    photos = [photo for photo in data.everything(file) if subset is None or photo.info.get("set") == subset]
    sizes = Counter(labels_of(photos, file))
    photos = data.cut([photo for photo in photos if sizes[photo.info["label_name"]] >= MIN_PHOTOS])
    names = [photo.info["label_name"] for photo in photos]
    folds = {fold_of(photo.key) for photo in photos}
    if len(set(names)) < 2 or len(folds) < 2:
        raise UserError(f"{name} ({file}): too few photos to learn from; raise --limit")
    return photos, names


class NearestNeighbours(_FoldedClassification):
    """k nearest neighbours by cosine."""

    protocol: ClassVar[str] = (
        f"{NEIGHBOURS} nearest neighbours by cosine, votes weighted by exp(cosine / {TEMPERATURE}); {FOLDS} folds by key hash, "
        f"classes of at least {MIN_PHOTOS} photos"
    )

    def classify(self, known: np.ndarray, labels: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        """The class with the most weight among the neighbours."""
        cosines = unknown @ known.T
        nearest = np.argsort(-cosines, axis=1)[:, :NEIGHBOURS]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / TEMPERATURE)
        votes = np.zeros((len(unknown), labels.max() + 1))
        np.add.at(votes, (np.arange(len(unknown))[:, None], labels[nearest]), weights)
        return votes.argmax(1)


class LinearProbe(_FoldedClassification):
    """Logistic regression."""

    STRENGTH: ClassVar[float] = 0.01
    protocol: ClassVar[str] = (
        f"logistic regression (C = {STRENGTH}) on standardised embeddings of length one; {FOLDS} folds by key hash, "
        f"classes of at least {MIN_PHOTOS} photos"
    )

    def classify(self, known: np.ndarray, labels: np.ndarray, unknown: np.ndarray) -> np.ndarray:
        """Fit on `known`, predict `unknown`."""
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise UserError("the linear probe needs scikit-learn: pip install 'sparse-vlm[eval]'") from None

        probe = make_pipeline(StandardScaler(), LogisticRegression(C=self.STRENGTH, max_iter=1000))
        return probe.fit(known, labels).predict(unknown)
