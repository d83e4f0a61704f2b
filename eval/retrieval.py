"""Tasks `flickr8k` and `coco`: retrieval between photos and their captions, both ways.

Shape legend: P photos, T captions.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import image_to_text_ranks, mean, share, text_to_image_ranks
from sparse_vlm.eval.task import Data, ImageTask, Result, captions_of
from sparse_vlm.eval.zero_shot import normalized

DEPTHS = (1, 5, 10)


class Retrieval(ImageTask):
    """Recall at 1, 5 and 10 among all photos (captions) of a captioned set."""

    needs_text = True
    protocol: ClassVar[str] = (
        "cosine; text to image: each caption's photo among all photos; image to text: the best of a photo's own captions among all captions"
    )

    def __init__(self, file: str) -> None:
        self.files = (file,)

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Rank everything against everything."""
        (file,) = self.files
        photos = data.photos(file)
        written = captions_of(photos, file)
        captions = [caption for own in written for caption in own]
        owner = np.repeat(np.arange(len(photos)), [len(own) for own in written])
        similarity = normalized(features.images(model, photos)) @ normalized(features.texts(captions)).T
        of_text, of_image = text_to_image_ranks(similarity, owner), image_to_text_ranks(similarity, owner)
        counts = np.bincount(owner)
        metrics = {f"text to image R@{k}": share(np.bincount(owner, weights=of_text < k), counts) for k in DEPTHS}
        metrics |= {f"image to text R@{k}": mean(of_image < k) for k in DEPTHS}
        predictions = [
            {
                "photo": photo.key,
                "rank": int(of_image[p]) + 1,
                "captions": written[p],
                "ranks": (of_text[owner == p] + 1).tolist(),
            }
            for p, photo in enumerate(photos)
        ]
        return Result(metrics, predictions)
