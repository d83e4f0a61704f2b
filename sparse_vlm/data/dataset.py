"""All that a run learns from: examples of several sources, mixed by weight, and the photos that they are about, numbered once.

Notable: examples about the photos of tars are few and kept; those of LLaVA's files may be many and are read when they are asked for
(`data.llava`). Either way a dataset is a sequence of examples, and an order of them costs eight bytes an example.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sparse_vlm.data import records
from sparse_vlm.data.conversations import Example, Mixture, examples_of_photos
from sparse_vlm.data.llava import TURN_CHARACTERS, LlavaFile, picture
from sparse_vlm.errors import UserError
from sparse_vlm.images.photos import Photo, PhotoSet
from sparse_vlm.vlm.prompts import text_of

CHARACTERS_PER_TOKEN = 4  # of English, about


class Source(Protocol):
    """Talks of one entry of `--data`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def shown(self, index: int) -> tuple[int, ...]:
        """Numbers of an example's photos."""

    def characters(self, index: int) -> int:
        """Length of an example's text with its markup, about."""

    def digest(self) -> str:
        """Of all that is said, and of the photos' names."""


class Photos(Sequence[Photo]):
    """Photos of tars, then images of the image folder, which are made when they are asked for.

    Args:
        known: photos of tars.
        folder: where the named images lie.
        names: their paths in it.
    """

    def __init__(self, known: Sequence[Photo], folder: Path | None = None, names: Sequence[str] = ()) -> None:
        self._known, self._folder, self._names = known, folder, names

    def __len__(self) -> int:
        return len(self._known) + len(self._names)

    def __getitem__(self, index: int) -> Photo:  # type: ignore[override]
        if index < len(self._known):
            return self._known[index]
        return picture(self._folder or Path(), self._names[index - len(self._known)])


class _Kept:
    """A `Source` in memory."""

    def __init__(self, examples: Sequence[Example], numbers: dict[Photo, int]) -> None:
        self._talks = examples
        self._shown = [tuple(numbers.setdefault(photo, len(numbers)) for photo in example.photos) for example in examples]

    def __len__(self) -> int:
        return len(self._talks)

    def __getitem__(self, index: int) -> Example:
        return self._talks[index]

    def shown(self, index: int) -> tuple[int, ...]:
        """Numbers of an example's photos."""
        return self._shown[index]

    def characters(self, index: int) -> int:
        """Of all conversations together, which share the photo alone."""
        messages = [message for conversation in self._talks[index].conversations for message in conversation]
        return sum(len(text_of(message)) + TURN_CHARACTERS for message in messages)

    def digest(self) -> str:
        """Of all that is said, and of the photos' names."""
        digest = hashlib.sha256()
        for example in self._talks:
            said = [(message["role"], text_of(message)) for conversation in example.conversations for message in conversation]
            for text in (*(photo.key for photo in example.photos), "", *(part for turn in said for part in turn)):
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()


class ConversationDataset(Sequence[Example]):
    """Talks in the order in which they were drawn.

    Args:
        sources: what they are drawn from.
        photos: what the sources' numbers mean.
        order: (examples, 2) int32: source, and example in it.
    """

    def __init__(self, sources: Sequence[Source], photos: Sequence[Photo], order: np.ndarray) -> None:
        self.sources, self.photos, self.order = sources, photos, order

    @classmethod
    def of(cls, examples: Sequence[Example], known: Sequence[Photo] = ()) -> ConversationDataset:
        """A dataset of examples in memory.

        Args:
            known: photos to number first, whether talked about or not, so that runs over the same data share the tower's cached tokens.
        """
        numbers = {photo: number for number, photo in enumerate(known)}
        source = _Kept(examples, numbers)
        return cls([source], Photos(list(numbers)), _order([(0, np.arange(len(examples)))]))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        source, place = self.order[index].tolist()
        return self.sources[source][place]

    def shown(self, index: int) -> tuple[int, ...]:
        """Numbers of an example's photos, without reading it."""
        source, place = self.order[index].tolist()
        return self.sources[source].shown(place)

    def length(self, index: int, tokens_per_image: int) -> int:
        """Length of an example in tokens, about, without reading it, as LLaVA's grouping by length does."""
        source, place = self.order[index].tolist()
        text = self.sources[source].characters(place) // CHARACTERS_PER_TOKEN
        return text + len(self.sources[source].shown(place)) * tokens_per_image

    def select(self, indices: Sequence[int]) -> ConversationDataset:
        """Some of the examples, in this order."""
        return ConversationDataset(self.sources, self.photos, self.order[np.asarray(indices, dtype=np.int64)])

    def naming(self, photo: int) -> str:
        """The name of the first example that shows a photo."""
        return self[next(index for index in range(len(self)) if photo in self.shown(index))].name

    def wanted(self) -> list[int]:
        """Numbers of all photos that are talked about, each once."""
        return sorted({photo for index in range(len(self)) for photo in self.shown(index)})

    def fingerprint(self) -> str:
        """Changes when examples come, go, say something else, show other photos or change their place; not when their files are moved."""
        digest = hashlib.sha256(self.order.tobytes())
        for source in self.sources:
            digest.update(source.digest().encode())
        return digest.hexdigest()[:16]


def _order(parts: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.stack([np.full_like(places, source), places], axis=1) for source, places in parts]).astype(np.int32)


def weighted(entry: str) -> tuple[str, float]:
    """An entry of `--data` and its weight, `a.json=0.5`; 1 where none is given.

    Raises:
        UserError: a weight that is none.
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
    """Which of so many examples are learnt from: all, as often as `times` is whole; of the rest that part, without replacement."""
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
        on_fetched: told what is fetched, as in `PhotoSet`.

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
        mix: what is said about the photos of tars.
        epochs: visits to each photo; how often LLaVA's files are gone through.
        open_file: makes a `LlavaFile`.

    Raises:
        UserError: a file that cannot be used, or a sample that is not as it must be.
    """
    known = list(dict.fromkeys(photo for some in photos.values() for photo in some))
    # over all photos together, as yes and no are balanced word by word
    examples = examples_of_photos(known, mix, epochs, seed) if known else []
    numbers = {photo: number for number, photo in enumerate(known)}
    sources: list[Source] = []
    parts = []
    for weight, some in photos.items():
        own = set(some)
        sources.append(_Kept([example for example in examples if example.photos[0] in own], numbers))
        parts.append((len(parts), drawn(len(sources[-1]), weight, seed)))
    names: dict[str, int] = {}
    for path, weight in files:
        sources.append(open_file(path, images, names, len(known)))
        parts.append((len(parts), drawn(len(sources[-1]), weight * epochs, seed)))
    return ConversationDataset(sources, Photos(known, images, list(names)), _order(parts))
