"""Zoom: photos that are a sixteenth of a large image, named from the whole and from inside their region.

Shape legend: P photos, C classes, E embedding, T x T photos in a collage.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from sparse_vlm.eval.embedders import Embedder, Features
from sparse_vlm.eval.metrics import mean, top_k_hits
from sparse_vlm.eval.task import Data, ImageTask, Result
from sparse_vlm.eval.zero_shot import class_embeddings, class_numbers, normalized
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import load_crop

SIDE = 4  # T
AT_ONCE = 4  # regions of a large image in a batch


class Zoom(ImageTask):
    """Zero-shot top-5 of the photos in collages."""

    needs_text = True
    files = ("eval/imagenet1k_one_per_class.tar",)
    protocol: ClassVar[str] = (
        f"{SIDE} x {SIDE} photos in one picture, each to be named (zero-shot, all classes of the set) from: the whole picture scaled to "
        "the model's input; the whole picture at full resolution; its region of the small picture; its region at full resolution. A tower "
        "starts its tokens in the region, the teacher is shown the region cut out and scaled"
    )

    def run(self, model: Embedder, teacher: Embedder | None, features: Features, data: Data) -> Result:
        """Name every photo four times; those that do not fill a last collage are left out."""
        (file,) = self.files
        photos = data.photos(file)
        photos = photos[: len(photos) // SIDE**2 * SIDE**2] or photos
        names, labels = class_numbers(photos, data, file)
        words = class_embeddings(names, features)
        found: dict[str, list[np.ndarray]] = {"whole": [], "whole, large": [], "zoomed, small": [], "zoomed": []}
        for start in range(0, len(photos), SIDE**2):
            tiles = photos[start : start + SIDE**2]
            for name, embeds in self._encode(model, tiles).items():
                found[name].append(embeds)
            features.on_photos(f"zoom: {model.name}", start + len(tiles), len(photos))
        scores = {name: normalized(np.concatenate(parts)) @ words.T for name, parts in found.items()}
        metrics = {f"{name} top-5": mean(top_k_hits(of, labels, 5)) for name, of in scores.items()}
        best = {name: of.argmax(1) for name, of in scores.items()}
        predictions = [
            {"photo": photo.key, "label": names[label], **{name: names[of[p]] for name, of in best.items()}}
            for p, (photo, label) in enumerate(zip(photos, labels, strict=True))
        ]
        return Result(metrics, predictions)

    def _encode(self, model: Embedder, tiles: list[Photo]) -> dict[str, np.ndarray]:
        """Embeddings (P, E) of the photos of one collage, by how it is encoded."""
        size = model.size
        collage = Image.new("RGB", (SIDE * size, SIDE * size))
        regions = []
        for i, tile in enumerate(tiles):
            row, column = divmod(i, SIDE)
            collage.paste(load_crop(tile, size), (column * size, row * size))
            regions.append((column / SIDE, row / SIDE, (column + 1) / SIDE, (row + 1) / SIDE))
        small, large = model.pixels([collage]), model.pixels([collage], SIDE * size)
        # all of it as a region, so that a teacher is shown it scaled to its input
        everywhere = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        found = {
            name: [model.encode(inputs, everywhere).expand(len(tiles), -1)] for name, inputs in (("whole", small), ("whole, large", large))
        }
        found |= {"zoomed, small": [], "zoomed": []}
        for start in range(0, len(tiles), AT_ONCE):
            region = torch.tensor(regions[start : start + AT_ONCE])
            for name, inputs in (("zoomed, small", small), ("zoomed", large)):
                found[name].append(model.encode(inputs.repeat(len(region)), region))
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}
