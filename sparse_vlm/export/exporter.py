"""The base classes of exporters, and the comparison of an export with its model.

Shape legend: B images, S side of the input, N tokens, d width, E embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.tower import SparseFormer, SparseFormerConfig

# of an element, absolute and relative; bfloat16 has 8 bits, and other kernels sum in another order
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
OUTPUTS = ("visual_tokens", "image_embeds")


@dataclass(frozen=True)
class Comparison:
    """An output of the model compared with that of the export, loaded again.

    Attributes:
        what: name of the output.
        pictures: batch size; 0 where no image is involved.
        difference: the largest absolute difference; infinite where shapes differ.
        largest: the largest absolute value of the model's output.
        tolerance: an element may differ by tolerance * (1 + its absolute value).
        agrees: whether every element is within the tolerance.
    """

    what: str
    pictures: int
    difference: float
    largest: float
    tolerance: float
    agrees: bool


def compare_tensors(what: str, images: int, expected: Tensor, actual: Tensor, tolerance: float) -> Comparison:
    """Compare two tensors element by element; NaN equals nothing."""
    expected, actual = expected.detach().double(), actual.detach().double()
    largest = expected.abs().max().item()
    if expected.shape != actual.shape:
        return Comparison(what, images, float("inf"), largest, tolerance, False)
    agrees = torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
    return Comparison(what, images, (actual - expected).abs().max().item(), largest, tolerance, agrees)


class Exporter(ABC):
    """Exports one model to one format.

    The constructor loads the model and computes its outputs for the images; `write` may change the model.

    Attributes:
        config: of the tower.
        holds: description of the export, after "This folder holds".
        task: the hub's name of its task.
        library: the hub's name of the library that loads it, where it has one.
    """

    config: SparseFormerConfig
    holds: ClassVar[str]
    task: ClassVar[str]
    library: ClassVar[str | None] = None

    @abstractmethod
    def __init__(self, model: str, dtype: str, tokens: int | None, images: Sequence[Image.Image]) -> None:
        """Load a model.

        Args:
            model: a folder, or a name of the zoo.
            dtype: of the weights, a key of `TOLERANCE`.
            tokens: token budget, for a model of several; its own by default.
            images: at least two, to compare on.

        Raises:
            UserError: the model cannot be loaded.
        """

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""

    @abstractmethod
    def compare(self, folder: Path) -> list[Comparison]:
        """Load the folder as its users do, and compare."""

    @abstractmethod
    def example(self) -> str:
        """Python that runs the export from its own folder on photo.jpg."""


class TowerExporter(Exporter):
    """Exports a tower; it is compared on one image and on all of them as a batch.

    Attributes:
        tower: in eval mode.
        dtype: of the weights, a key of `TOLERANCE`.
        inputs: pixels (B, 3, S, S), and for whole images their sizes (B, 2).
    """

    task = "image-feature-extraction"

    @torch.inference_mode()
    def __init__(self, model: str, dtype: str, tokens: int | None, images: Sequence[Image.Image]) -> None:
        self.tower = SparseFormer.from_pretrained(model, getattr(torch, dtype), tokens)
        self.config = self.tower.config
        self.images, self.dtype = list(images), dtype
        self.inputs = [each for each in Preprocessor.of(self.config)(self.images, square=True) if each is not None]
        self.expected = {}
        for count in sorted({1, len(self.images)}):
            out = self.tower(**dict(zip(("pixels", "image_sizes"), self.first(count), strict=False)))
            self.expected[count] = (out.last_hidden_state[:, -self.config.visual_tokens :], out.image_embeds)

    def first(self, count: int) -> list[Tensor]:
        """The inputs of the first `count` images."""
        return [each[:count] for each in self.inputs]

    @abstractmethod
    def load(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        """The export as a function of `inputs`: visual tokens (B, N, d) and image embeddings (B, E)."""

    @torch.inference_mode()
    def compare(self, folder: Path) -> list[Comparison]:
        run = self.load(folder)
        comparisons = []
        for count, expected in self.expected.items():
            for name, one, other in zip(OUTPUTS, expected, run(*self.first(count)), strict=True):
                comparisons.append(compare_tensors(name, count, one, other, TOLERANCE[self.dtype]))
        return comparisons


def synthetic_images(count: int, seed: int = 0) -> list[Image.Image]:
    """Images to compare on without photos: coloured noise with the spectrum of photos (amplitude 1 / frequency)."""
    height, width = 240, 320
    generator = np.random.default_rng(seed)
    down, across = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / width)
    images = []
    for _ in range(count):
        noise = np.fft.fft2(generator.standard_normal((3, height, width)))
        field = np.fft.ifft2(noise * amplitude).real
        field = (field - field.mean()) / field.std()
        images.append(Image.fromarray((127.5 + 55 * field).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return images
