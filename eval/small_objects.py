"""Task `small-objects`: photos shrunk and pasted into a larger image, recognized by their embeddings.

Shape legend: P photos, E embedding.

Notable: a tower is compared with its teacher, whose space it was taught: its embedding of the whole image must be nearest to the
teacher's embedding of that photo alone. A teacher, or any other ViT beside it, is compared with its own embedding of the photo, since
embedding spaces differ.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image

from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import mean
from sparse_vlm.eval.task import Data, ImageTask, Result
from sparse_vlm.eval.zero_shot import normalized
from sparse_vlm.images.preprocess import load_crop

SIDE = 224  # of the image that a photo is pasted into
CANDIDATES = 250  # photos that each is retrieved from
OBJECTS, BACKGROUNDS = "eval/imagenet1k_one_per_class.tar", "eval/flickr8k_retrieval.tar"


class Scene(NamedTuple):
    """What an image is made of: the side of the shrunk photo in pixels, and whether the background is plain."""

    size: int
    plain: bool

    @property
    def name(self) -> str:
        """Its name in metrics."""
        return f"{self.size} px on {'plain' if self.plain else 'photos'}"


SCENES = (*(Scene(size, True) for size in (112, 84, 56, 40)), *(Scene(size, False) for size in (112, 84)))


class SmallObjects(ImageTask):
    """Recall at 1 of shrunk photos by their embeddings alone."""

    needs_teacher = True
    includes_teacher = True
    files = (OBJECTS, BACKGROUNDS)
    protocol: ClassVar[str] = (
        f"{CANDIDATES} photos, each shrunk to the given side and pasted at a random place of a {SIDE}-px image, either plain with a "
        "vertical gradient or another photo; R@1 of the image's embedding among the teacher's embeddings of the photos alone (a ViT's: its "
        "own), by cosine after each set's mean is taken from it"
    )

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Search with every scene of every photo."""
        assert teacher is not None
        photos, others = data.photos(OBJECTS, CANDIDATES), data.photos(BACKGROUNDS, CANDIDATES)
        objects = data.once(f"{OBJECTS} {SIDE} px", lambda: [load_crop(photo, SIDE) for photo in photos])
        backgrounds = data.once(f"{BACKGROUNDS} {SIDE} px", lambda: [load_crop(photo, SIDE) for photo in others])
        targets = centred(features.images(teacher if model.kind == "tower" else model, photos))
        ranks = {}
        for scene in SCENES:

            def image(i: int, scene: Scene = scene) -> Image.Image:
                return compose(objects[i], i, scene.size, None if scene.plain else backgrounds[i % len(backgrounds)])

            queries = centred(features.generated(model, f"{model.name}: {scene.name}", len(photos), image))
            ranks[scene.name] = rank_of_own(queries @ targets.T)
        metrics = {f"{name} R@1": mean(of == 1) for name, of in ranks.items()}
        details = {f"{name} R@5": mean(of <= 5) for name, of in ranks.items()}
        predictions = [{"photo": photo.key, "ranks": {name: int(of[p]) for name, of in ranks.items()}} for p, photo in enumerate(photos)]
        return Result(metrics, predictions, details=details)


def compose(photo: Image.Image, index: int, size: int, background: Image.Image | None = None) -> Image.Image:
    """A photo shrunk to `size` pixels a side, at a place that depends on `index` and `size` alone.

    Args:
        background: a square of `SIDE` pixels; a plain colour with a vertical gradient by default.
    """
    random = np.random.default_rng([index, size])
    if background is None:
        colour, gradient = random.uniform(60, 200, 3), np.linspace(-25, 25, SIDE)[:, None, None]
        pixels = np.broadcast_to(colour + gradient, (SIDE, SIDE, 3)).round().clip(0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    else:
        image = background.copy()
    x, y = random.integers(0, SIDE - size + 1, 2).tolist()
    image.paste(photo.resize((size, size), Image.Resampling.BICUBIC), (x, y))
    return image


def centred(embeds: np.ndarray) -> np.ndarray:
    """(P, E) minus the mean row, normalized."""
    return normalized(embeds - embeds.mean(0))


def rank_of_own(similarity: np.ndarray) -> np.ndarray:
    """The rank (1 is first) of each row's own column in (P, P); a tie counts against the model."""
    return (similarity >= np.diagonal(similarity)[:, None]).sum(1)
