"""The dataset of a run: examples of several sources, mixed by weight, and their photos by number.

Notable: examples about photos of tars are in memory; those of LLaVA's files may be many and are read when they are asked for
(`data.llava`). An order of examples costs eight bytes an example.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sparse_vlm.data import records
from sparse_vlm.data.conversations import Example, Mixture, examples_of_photos
from sparse_vlm.data.llava import TURN_CHARACTERS, LlavaFile, image_in
from sparse_vlm.data.source import Source
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo, PhotoSet
from sparse_vlm.vlm.prompts import text_of

CHARACTERS_PER_TOKEN = 4  # of English, about


class Photos(Sequence[Photo]):
    """Photos of tars, then images of the image folder, which are made when they are asked for.

    Args:
        photos: of tars.
        folder: of the named images.
        names: their paths in it.
    """

    def __init__(self, photos: Sequence[Photo], folder: Path | None = None, names: Sequence[str] = ()) -> None:
        self._photos, self._folder, self._names = photos, folder, names

    def __len__(self) -> int:
        return len(self._photos) + len(self._names)

    def __getitem__(self, index: int) -> Photo:  # type: ignore[override]
        if index < len(self._photos):
            return self._photos[index]
        return image_in(self._folder or Path(), self._names[index - len(self._photos)])


class ExampleList(Source):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example], numbers: dict[Photo, int]) -> None:
        super().__init__()
        self._examples = examples
        for example in examples:
            messages = [message for conversation in example.conversations for message in conversation]
            texts = [text for message in messages for text in (message["role"], text_of(message))]
            characters = sum(map(len, texts[1::2])) + TURN_CHARACTERS * len(messages)
            photos = [numbers.setdefault(photo, len(numbers)) for photo in example.photos]
            self.add(photos, characters, [*(photo.key for photo in example.photos), "", *texts])

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self._examples[index]


class ConversationDataset(Sequence[Example]):
    """Examples of several sources in the order of training.

    Args:
        sources: of one entry of `--data` each.
        photos: by the numbers that the sources use.
        order: (examples, 2) int32: source, and example in it.
    """

    def __init__(self, sources: Sequence[Source], photos: Sequence[Photo], order: np.ndarray) -> None:
        self.sources, self.photos, self.order = sources, photos, order

    @classmethod
    def of(cls, examples: Sequence[Example], known: Sequence[Photo] = ()) -> ConversationDataset:
        """A dataset of examples in memory.

        Args:
            known: photos to number first, whether used or not, so that runs over the same data share cached features.
        """
        numbers = {photo: number for number, photo in enumerate(known)}
        source = ExampleList(examples, numbers)
        return cls([source], Photos(list(numbers)), _order([(0, np.arange(len(examples)))]))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        source, place = self.order[index].tolist()
        return self.sources[source][place]

    def photo_numbers(self, index: int) -> tuple[int, ...]:
        """Numbers of an example's photos; the example is not read."""
        source, place = self.order[index].tolist()
        return self.sources[source].photo_numbers(place)

    def length(self, index: int, tokens_per_image: int) -> int:
        """Approximate length of an example in tokens, as LLaVA's grouping by length takes it; the example is not read."""
        source, place = self.order[index].tolist()
        text = self.sources[source].characters(place) // CHARACTERS_PER_TOKEN
        return text + len(self.sources[source].photo_numbers(place)) * tokens_per_image

    def select(self, indices: Sequence[int]) -> ConversationDataset:
        """Some of the examples, in this order."""
        return ConversationDataset(self.sources, self.photos, self.order[np.asarray(indices, dtype=np.int64)])

    def example_showing(self, photo: int) -> str:
        """Name of the first example with a photo."""
        return self[next(index for index in range(len(self)) if photo in self.photo_numbers(index))].name

    def used_photos(self) -> list[int]:
        """Numbers of the photos of all examples, each once."""
        return sorted({photo for index in range(len(self)) for photo in self.photo_numbers(index)})

    def fingerprint(self) -> str:
        """Changes with the examples, their text, photos and order; not with the place of their files."""
        digest = hashlib.sha256(self.order.tobytes())
        for source in self.sources:
            digest.update(source.digest().encode())
        return digest.hexdigest()[:16]


def _order(parts: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.stack([np.full_like(places, source), places], axis=1) for source, places in parts]).astype(np.int32)


def weighted(entry: str) -> tuple[str, float]:
    """An entry of `--data` and its weight, `a.json=0.5`; 1 where none is given.

    Raises:
        UserError: not a positive number.
    """
    name, mark, number = entry.rpartition("=")
    # an address may hold = as a part of its own
    if not mark or os.path.exists(entry) or ("://" in name and "?" in name):
        return entry, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"--data {entry}: {number!r} is no weight; write a number above 0 after =, such as {name}=0.5")
    return name, weight


def drawn(count: int, times: float, seed: int) -> np.ndarray:
    """Indices of `count` examples repeated `times` times; the fractional part is drawn without replacement."""
    if not count:
        return np.arange(0)
    total = max(1, round(count * times))
    rest = np.random.default_rng(seed).permutation(count)[: total % count]
    return np.concatenate([*[np.arange(count)] * (total // count), np.sort(rest)])


def files_of(data: Sequence[str]) -> list[tuple[Path, float]]:
    """LLaVA's files among the entries of `--data`, with their weights; glob patterns are resolved."""
    found = []
    for name, weight in map(weighted, data):
        if name.lower().endswith(records.SUFFIXES):
            matching = [] if os.path.exists(name) else sorted(glob.glob(name))
            found += [(Path(path), weight) for path in matching or [name]]
    return found


def photos_of(
    data: Sequence[str], on_fetched: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[float, list[Photo]]:
    """Photos of the other entries of `--data` by their weight.

    Args:
        on_fetched: called with downloads, as in `PhotoSet`.

    Raises:
        UserError: an entry that cannot be used.
    """
    found: dict[float, list[Photo]] = {}
    for name, weight in map(weighted, data):
        if not name.lower().endswith(records.SUFFIXES):
            found.setdefault(weight, []).extend(PhotoSet(name, on_fetched))
    return found


def read_conversations(
    files: Sequence[tuple[Path, float]],
    photos: Mapping[float, Sequence[Photo]],
    images: Path | None,
    mix: Mixture,
    epochs: int = 1,
    seed: int = 0,
    open_file: Callable[[Path, Path | None, dict[str, int], int], LlavaFile] = LlavaFile,
) -> ConversationDataset:
    """The examples of all entries of `--data`.

    Args:
        files: from `files_of`.
        photos: from `photos_of`.
        images: folder of the images that LLaVA's files name.
        mix: what to take from photos of tars.
        epochs: visits to each photo; passes over LLaVA's files.
        open_file: makes a `LlavaFile`.

    Raises:
        UserError: a file or sample that is not valid.
    """
    known = list(dict.fromkeys(photo for some in photos.values() for photo in some))
    # over all photos together, as yes and no are balanced word by word
    examples = examples_of_photos(known, mix, epochs, seed) if known else []
    numbers = {photo: number for number, photo in enumerate(known)}
    sources: list[Source] = []
    parts = []
    for weight, some in photos.items():
        own = set(some)
        sources.append(ExampleList([example for example in examples if example.photos[0] in own], numbers))
        parts.append((len(parts), drawn(len(sources[-1]), weight, seed)))
    names: dict[str, int] = {}
    for path, weight in files:
        sources.append(open_file(path, images, names, len(known)))
        parts.append((len(parts), drawn(len(sources[-1]), weight * epochs, seed)))
    return ConversationDataset(sources, Photos(known, images, list(names)), _order(parts))
