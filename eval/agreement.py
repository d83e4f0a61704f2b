"""Task `cosine`: cosine of student and teacher embeddings on held-out photos.

Shape legend: P photos, E embedding.

Notable: embeddings of one model share a large common part, which makes plain cosines look good for free. The centred cosine takes that part
(the teacher's mean over the same held-out photos) away from both sides; it is the one to trust.
"""

from __future__ import annotations

from typing import ClassVar

from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import cosine, mean
from sparse_vlm.eval.task import Data, ImageTask, Result

SETS = {"Flickr8k": "eval/flickr8k_retrieval.tar", "ImageNet": "eval/imagenet1k_one_per_class.tar"}


class Agreement(ImageTask):
    """Cosine to the teacher, plain and centred."""

    needs_teacher = True
    files = tuple(SETS.values())
    protocol: ClassVar[str] = (
        "mean cosine of student and teacher embeddings of the same photo; centred: after the teacher's mean over that held-out set "
        "is taken from both"
    )

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Compare photo by photo."""
        assert teacher is not None
        metrics, predictions = {}, []
        for name, file in SETS.items():
            photos = data.photos(file)
            ours, theirs = features.images(model, photos), features.images(teacher, photos)
            centre = theirs.mean(0)
            plain, centred = cosine(ours, theirs), cosine(ours - centre, theirs - centre)
            metrics[f"{name} centred"] = mean(centred, unit="")
            metrics[f"{name} plain"] = mean(plain, unit="")
            predictions += [
                {"photo": photo.key, "cosine": round(float(a), 4), "centred": round(float(b), 4)}
                for photo, a, b in zip(photos, plain, centred, strict=True)
            ]
        return Result(metrics, predictions)
