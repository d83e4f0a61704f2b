"""What an exporter is, what those of towers share, and how two answers are compared.

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

# Of an element, absolute and relative; bfloat16 has 8 bits, and another kernel may sum in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
OUTPUTS = ("visual_tokens", "image_embeds")


@dataclass(frozen=True)
class Comparison:
    """What the model said beside what its export says, once loaded again.

    Attributes:
        what: the name of the output.
        pictures: how many it was computed for, all at once; 0 for what images have no part in.
        difference: the largest, absolute; infinite where shapes differ.
        largest: the largest value of the model's own, absolute.
        tolerance: how far an element may be off: tolerance * (1 + its absolute value).
        agrees: whether every element is within it.
    """

    what: str
    pictures: int
    difference: float
    largest: float
    tolerance: float
    agrees: bool


def compared(what: str, pictures: int, expected: Tensor, found: Tensor, tolerance: float) -> Comparison:
    """Compare two tensors, element by element; a value that is no number agrees with none."""
    expected, found = expected.detach().double(), found.detach().double()
    largest = expected.abs().max().item()
    if expected.shape != found.shape:
        return Comparison(what, pictures, float("inf"), largest, tolerance, False)
    agrees = torch.allclose(found, expected, rtol=tolerance, atol=tolerance)
    return Comparison(what, pictures, (found - expected).abs().max().item(), largest, tolerance, agrees)


class Exporter(ABC):
    """One model on its way into one format.

    An exporter has loaded its model and asked it about the images when it has been made; `write` may change the model.

    Attributes:
        config: of the tower.
        holds: what the export is, in words that follow "This folder holds".
        task: the hub's name for what the export is used for.
        library: the hub's name for what loads it, where it has one.
    """

    config: SparseFormerConfig
    holds: ClassVar[str]
    task: ClassVar[str]
    library: ClassVar[str | None] = None

    @abstractmethod
    def __init__(self, model: str, dtype: str, tokens: int | None, pictures: Sequence[Image.Image]) -> None:
        """Load a model.

        Args:
            model: its folder, or its name in the zoo.
            dtype: of the weights, a key of `TOLERANCE`.
            tokens: latent tokens an image, for a model of several budgets; its own number by default.
            pictures: at least two, to compare on.

        Raises:
            UserError: what loading the model raises.
        """

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""

    @abstractmethod
    def compare(self, folder: Path) -> list[Comparison]:
        """Load the folder as its users will, and compare."""

    @abstractmethod
    def example(self) -> str:
        """Python that runs the export from its own folder on photo.jpg."""


class TowerExporter(Exporter):
    """A tower that is asked about one image, and about all of them at once.

    Attributes:
        tower: in eval mode.
        dtype: its weights', a key of `TOLERANCE`.
        inputs: the pixels of the images (B, 3, S, S), and of whole ones their sizes (B, 2).
    """

    task = "image-feature-extraction"

    @torch.inference_mode()
    def __init__(self, model: str, dtype: str, tokens: int | None, pictures: Sequence[Image.Image]) -> None:
        self.tower = SparseFormer.from_pretrained(model, getattr(torch, dtype), tokens)
        self.config = self.tower.config
        self.pictures, self.dtype = list(pictures), dtype
        self.inputs = [given for given in Preprocessor.of(self.config)(self.pictures, square=True) if given is not None]
        self.expected = {}
        for count in sorted({1, len(self.pictures)}):
            out = self.tower(**dict(zip(("pixels", "image_sizes"), self.first(count), strict=False)))
            self.expected[count] = (out.last_hidden_state[:, -self.config.visual_tokens :], out.image_embeds)

    def first(self, count: int) -> list[Tensor]:
        """The inputs of so many images."""
        return [given[:count] for given in self.inputs]

    @abstractmethod
    def load(self, folder: Path) -> Callable[..., Sequence[Tensor]]:
        """The export as a function of `inputs`: visual tokens (B, N, d) and image embeddings (B, E)."""

    @torch.inference_mode()
    def compare(self, folder: Path) -> list[Comparison]:
        run = self.load(folder)
        found = []
        for count, expected in self.expected.items():
            for name, one, other in zip(OUTPUTS, expected, run(*self.first(count)), strict=True):
                found.append(compared(name, count, one, other, TOLERANCE[self.dtype]))
        return found


def made_up_pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Images to compare on where no photos were given: coloured noise with the spectrum of photos (amplitude one by frequency)."""
    height, width = 240, 320
    generator = np.random.default_rng(seed)
    down, across = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / width)
    made = []
    for _ in range(count):
        noise = np.fft.fft2(generator.standard_normal((3, height, width)))
        field = np.fft.ifft2(noise * amplitude).real
        field = (field - field.mean()) / field.std()
        made.append(Image.fromarray((127.5 + 55 * field).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))
    return made
