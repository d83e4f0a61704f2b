"""Task `rendered-words`: words drawn onto photos, recognized by a linear classifier on the embeddings.

Shape legend: P photos, H letter heights, E embedding.

Notable: every photo bears one word of each height, in capitals, so that all its letters are as high. Which word it is, its place and its
colours depend on the photo's number and the height alone. Words lie within the centre square, which models that crop see as well, and have
three letters, so that large ones fit. One classifier learns words of all heights, because the small ones alone are too few to learn from.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparse_vlm.errors import UserError
from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import mean
from sparse_vlm.eval.probes import FOLDS, LinearProbe, fold_of
from sparse_vlm.eval.task import Data, ImageTask, Result
from sparse_vlm.eval.zero_shot import normalized

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

HEIGHTS = (7, 10, 14, 19, 26)  # of the letters, in % of the image's shorter side
WORDS = tuple(re.findall(r"\w+", "APE BAG BED BOX BUS CAT COW DOG EGG FAN HAT INK JAM KEY MAP NUT OWL PIG SKY ZOO"))
CAPITALS = 0.729  # height of DejaVu's capitals, relative to the size of the font


class RenderedWords(ImageTask):
    """Top-1 of a linear classifier over words, by letter height."""

    files = ("eval/flickr8k_retrieval.tar",)
    protocol: ClassVar[str] = (
        f"one of {len(WORDS)} words of three capitals in DejaVu Sans on each photo, white with a black edge or the reverse, letters as "
        f"high as the given share of the photo's shorter side; logistic regression (C = {LinearProbe.STRENGTH}) on standardised embeddings "
        f"of length one, of all heights together; {FOLDS} folds by hash of the photo's key"
    )

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Embed every photo with a word of each height, and classify it from the other folds."""
        (file,) = self.files
        photos = data.photos(file)
        folds = np.array([fold_of(photo.key) for photo in photos])
        if len(set(folds.tolist())) < 2:
            raise UserError(f"{file}: too few photos to learn from; raise --limit")
        labels = np.stack([word_numbers(len(photos), height) for height in HEIGHTS])  # (H, P)

        def image(i: int) -> Image.Image:
            photo, height = i % len(photos), i // len(photos)
            return write(photos[photo].load(), WORDS[labels[height, photo]], HEIGHTS[height], photo)

        rows = normalized(features.generated(model, f"{model.name}: rendered words", labels.size, image))
        answers = LinearProbe().classify_by_folds(rows, labels.ravel(), np.tile(folds, len(HEIGHTS))).reshape(labels.shape)
        metrics = {f"letters of {height} % top-1": mean(answers[h] == labels[h]) for h, height in enumerate(HEIGHTS)}
        predictions = [
            {"photo": photo.key, "height": height, "word": WORDS[labels[h, p]], "answer": WORDS[answers[h, p]]}
            for h, height in enumerate(HEIGHTS)
            for p, photo in enumerate(photos)
        ]
        return Result(metrics, predictions)


def word_numbers(photos: int, height: int) -> np.ndarray:
    """The index of the word on each photo, (P,); all words equally often."""
    return np.random.default_rng(height).permutation(photos) % len(WORDS)


def write(photo: Image.Image, word: str, height: float, seed: int) -> Image.Image:
    """A copy of a photo with a word drawn onto it.

    Args:
        height: of its letters, in % of the photo's shorter side.
        seed: decides, with the height, its place and colours.
    """
    random = np.random.default_rng([seed, round(height)])
    side = min(photo.size)
    letters = height / 100 * side
    font, edge = dejavu(max(1, round(letters / CAPITALS))), max(1, round(letters / 10))
    left, top, right, bottom = font.getbbox(word, stroke_width=edge)
    room = np.maximum(0, side - np.array([right - left, bottom - top]))
    x, y = ((np.array(photo.size) - side) // 2 + random.integers(0, room + 1)).tolist()
    ink, around = random.permutation(["white", "black"]).tolist()
    image = photo.copy()
    ImageDraw.Draw(image).text((x - left, y - top), word, font=font, fill=ink, stroke_width=edge, stroke_fill=around)
    return image


@lru_cache
def dejavu(size: int) -> FreeTypeFont:
    """DejaVu Sans, which matplotlib brings, of a size in pixels."""
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
