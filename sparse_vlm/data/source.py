"""What is known of the examples of one entry of `--data` without reading them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from sparse_vlm.data.conversations import Example


class Source(Sequence[Example]):
    """Examples of one entry of `--data`, which a subclass reads when they are asked for; numbers of photos and lengths are in memory."""

    def __init__(self) -> None:
        self._numbers, self._ends = array("l"), array("q")  # photos of all examples, and where those of each example end
        self._characters = array("l")
        self._digest = hashlib.sha256()

    def add(self, photos: Sequence[int], characters: int, texts: Iterable[str]) -> None:
        """Note one more example.

        Args:
            photos: their numbers.
            characters: approximate length of the text with its markup.
            texts: all that the example says and the names of its photos.
        """
        self._numbers.extend(photos)
        self._ends.append(len(self._numbers))
        self._characters.append(characters)
        for text in texts:
            self._digest.update(text.encode("utf-8", "surrogatepass") + b"\0")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_digest": None}  # hashes cannot be pickled, and workers that load samples need none

    def __len__(self) -> int:
        return len(self._ends)

    def photo_numbers(self, index: int) -> tuple[int, ...]:
        """Numbers of an example's photos."""
        return tuple(self._numbers[self._ends[index - 1] if index else 0 : self._ends[index]])

    def characters(self, index: int) -> int:
        """Approximate length of an example's text with its markup."""
        return self._characters[index]

    def digest(self) -> str:
        """Of all texts and photo names."""
        return self._digest.hexdigest()
