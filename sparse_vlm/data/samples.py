"""Talks to what a training step eats: token trees with checked label masks, batches of like length, the tower's tokens.

Shape legend: N tokens a picture, d width of the tower.

Notable: the tower is frozen and sees every photo as it is, so its tokens are computed once a photo and kept on disk, whatever the number of
visits, stages and runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_vlm.data.talks import Talk
from sparse_vlm.photos import Photo
from sparse_vlm.preprocess import preprocess
from sparse_vlm.tower import SparseFormer
from sparse_vlm.vlm.prompts import Renderer, text_of
from sparse_vlm.vlm.tree import TokenTree, merge

BATCH = 32


@dataclass(frozen=True)
class Sample:
    """A talk's conversations as one tree.

    Attributes:
        name: what to call it in messages to people.
        photos: indices into the run's photos, in the order of their placeholders; none for text alone.
        tree: its placeholders are N for each of the photos.
    """

    name: str
    photos: tuple[int, ...]
    tree: TokenTree


def build_samples(talks: Sequence[Talk], renderer: Renderer, known: Sequence[Photo] = ()) -> tuple[list[Sample], list[Photo]]:
    """Render and merge talks; every label mask is verified.

    Args:
        known: photos to number first, whether talked about or not, so that runs over the same data share the tower's cached tokens.

    Returns:
        Samples, and the photos that their indices mean.

    Raises:
        UserError: naming the talk whose mask or placeholders are not as they must be.
    """
    photos = {photo: number for number, photo in enumerate(known)}
    samples = []
    for talk in talks:
        tree = merge([renderer.render(conversation, talk.name) for conversation in talk.conversations])
        renderer.check_count(tree.ids, len(talk.photos), talk.name)
        samples.append(Sample(talk.name, tuple(photos.setdefault(photo, len(photos)) for photo in talk.photos), tree))
    return samples, list(photos)


def arrange(samples: Sequence[Sample], batch_size: int, seed: int = 0) -> list[Sample]:
    """Shuffle, then bring samples of like length together, batch by batch; batches themselves come in random order.

    A remainder smaller than a batch is left out, unless it is all there is.
    """
    rng = random.Random(seed)
    order = list(samples)
    rng.shuffle(order)
    pool = 8 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda sample: len(sample.tree))
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size] or batches
    rng.shuffle(whole)
    return [sample for batch in whole for sample in batch]


def report(talks: Sequence[Talk], samples: Sequence[Sample]) -> dict[str, int | float]:
    """What a run will learn from, in numbers."""
    messages = [message for talk in talks for conversation in talk.conversations for message in conversation]
    answers = [text_of(message) for message in messages if message["role"] == "assistant"]
    yes, no = answers.count("Yes"), answers.count("No")
    return {
        "photos": len({photo for sample in samples for photo in sample.photos}),
        "samples": len(samples),
        "conversations": sum(len(talk.conversations) for talk in talks),
        "answers": len(answers),
        "yes": yes,
        "no": no,
        "tokens": sum(len(sample.tree) for sample in samples),
        "tokens with loss": sum(len(sample.tree.targets) for sample in samples),
        "tokens per sample": round(sum(len(sample.tree) for sample in samples) / max(1, len(samples)), 1),
    }


class TokenBank:
    """The tower's tokens of each photo, on disk.

    Args:
        folder: holds a sub-folder for each (tower, photos).
        tower: computes what is missing.
        photos: in a fixed order.
        owner: whether this process computes; others wait until the owner has.
    """

    def __init__(self, folder: Path, tower: SparseFormer, photos: Sequence[Photo], owner: bool = True) -> None:
        self.tower, self.photos, self.owner = tower, photos, owner
        digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True).encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        for photo in photos:
            digest.update(f"{photo.source.name}/{photo.key}/{photo.size}\n".encode())
        self.folder = folder / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        # as 16-bit integers: numpy has no bfloat16
        self._tokens = self._open("tokens.bf16", np.int16, (len(photos), tower.config.visual_tokens, tower.config.width))
        self._done = self._open("done.u8", np.uint8, (len(photos),))

    def _open(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        path = self.folder / name
        size = math.prod(shape) * np.dtype(dtype).itemsize
        while not self.owner and not (path.exists() and path.stat().st_size == size):
            time.sleep(0.1)
        return np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=shape)

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Photos of `wanted` that are not computed yet."""
        return [index for index in sorted(set(wanted)) if not self._done[index]]

    @torch.no_grad()
    def fill(self, wanted: Sequence[int], on_photos: Callable[[int], None] = lambda photos: None) -> None:
        """Compute what is missing; an interrupted fill goes on where it stopped.

        Args:
            on_photos: called with the number of photos just finished.
        """
        config = self.tower.config
        while not self.owner and self.missing(wanted):
            time.sleep(0.5)
        missing = self.missing(wanted)
        device = next(self.tower.parameters()).device
        for start in range(0, len(missing), BATCH):
            chosen = missing[start : start + BATCH]
            images = [self.photos[i].load() for i in chosen]
            pixels = preprocess(images, config.image_size, config.image_mean, config.image_std).to(device)
            # at 49 tokens plain attention is faster than the fused kernel
            with sdpa_kernel(SDPBackend.MATH):
                tokens = self.tower.visual_tokens(pixels)
            self._tokens[chosen] = tokens.to("cpu", torch.bfloat16).view(torch.int16).numpy()
            self._tokens.flush()
            self._done[chosen] = 1
            on_photos(len(chosen))

    def __getitem__(self, index: int) -> Tensor:
        """(N, d) bfloat16."""
        return torch.from_numpy(np.array(self._tokens[index])).view(torch.bfloat16)
