"""Talks to what a training step eats: token trees with checked label masks, batches of like length, the tower's tokens.

Shape legend: N tokens an image, d width of the tower.

Notable: a sample is rendered when it is asked for, and its label mask is checked each time, so that a set of any size starts at once; of a
small set all are rendered ahead, so that a mistake shows before the first step. The tower is frozen and sees every photo as it is, so its
tokens are computed once a photo and kept on disk, whatever the number of visits, stages and runs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_vlm.data.bad_images import blank
from sparse_vlm.data.conversations import Example
from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import ImageError
from sparse_vlm.images.photos import Photo
from sparse_vlm.images.preprocess import OVERSAMPLING, Preprocessor
from sparse_vlm.tower import SparseFormer
from sparse_vlm.vlm.prompts import Renderer, text_of
from sparse_vlm.vlm.tree import TokenTree, merge

BATCH = 32
ALL_AHEAD = 20_000  # samples that are all rendered before the first step; of more, some at random
SOME_AHEAD = 2_000


@dataclass(frozen=True)
class Sample:
    """An example's conversations as one tree.

    Attributes:
        name: what to call it in messages to people.
        photos: indices into the run's photos, in the order of their placeholders; none for text alone.
        tree: its placeholders are N for each of the photos.
    """

    name: str
    photos: tuple[int, ...]
    tree: TokenTree


def render(example: Example, photos: tuple[int, ...], renderer: Renderer, context: int | None = None) -> Sample:
    """Render and merge an example's conversations.

    Args:
        photos: the numbers of its photos.
        context: tokens that the LLM reads at most.

    Raises:
        UserError: naming the example, whose mask or placeholders are not as they must be, or which is too long.
    """
    try:
        tree = merge([one for conversation in example.conversations for one in renderer.renderings(conversation, example.name)])
    except UserError as error:
        if example.name in str(error):
            raise
        raise UserError(f"{example.name}: {error}") from error
    if context is not None and longest_of(tree) > context:
        raise UserError(f"{example.name}: {longest_of(tree)} tokens, but the LLM reads {context}; shorten it or leave it out")
    renderer.check_count(tree.ids, len(photos), example.name)
    return Sample(example.name, photos, tree)


def longest_of(tree: TokenTree) -> int:
    """Tokens of a tree's longest conversation, with the last, which is only predicted and no part of the tree."""
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    return max(depths) + 1


@dataclass(frozen=True)
class Counts:
    """What is in some examples and their samples."""

    examples: int = 0
    conversations: int = 0
    answers: int = 0
    yes: int = 0
    no: int = 0
    tokens: int = 0
    targets: int = 0

    def plus(self, example: Example, sample: Sample) -> Counts:
        """The same with one example more."""
        messages = [message for conversation in example.conversations for message in conversation]
        answers = [text_of(message) for message in messages if message["role"] == "assistant"]
        more = (
            1,
            len(example.conversations),
            len(answers),
            answers.count("Yes"),
            answers.count("No"),
            len(sample.tree),
            len(sample.tree.targets),
        )
        return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), more, strict=True)))


class SampleSet(Sequence[Sample]):
    """Samples of a dataset, each rendered when it is asked for.

    Args:
        examples: what they are made of.
        renderer: makes them.
        lengths: (samples,) of their trees in tokens, at least about.
        counts: of those that were rendered ahead.
        context: tokens that the LLM reads at most.
    """

    def __init__(
        self, examples: ConversationDataset, renderer: Renderer, lengths: np.ndarray, counts: Counts, context: int | None = None
    ) -> None:
        self.examples, self.renderer, self.lengths, self.counts, self.context = examples, renderer, lengths, counts, context

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return render(self.examples[index], self.examples.shown(index), self.renderer, self.context)

    def select(self, indices: Sequence[int]) -> SampleSet:
        """Some of the samples, in this order."""
        examples = self.examples.select(indices)
        return SampleSet(examples, self.renderer, self.lengths[np.asarray(indices, dtype=np.int64)], self.counts, self.context)

    def without(self, photos: Collection[int]) -> SampleSet:
        """The samples that show none of some photos."""
        bad = set(photos)
        return self.select([index for index in range(len(self)) if bad.isdisjoint(self.examples.shown(index))])


def build_samples(
    examples: ConversationDataset,
    renderer: Renderer,
    context: int | None = None,
    seed: int = 0,
    on_samples: Callable[[int], None] = lambda samples: None,
) -> SampleSet:
    """Samples of examples; the label masks of all are verified, or of a large set those of some, and the others' when they are rendered.

    Args:
        context: tokens that the LLM reads at most.
        seed: of which are rendered ahead.
        on_samples: called with the number of samples just rendered.

    Raises:
        UserError: naming the example whose mask or placeholders are not as they must be, or which is too long.
    """
    ahead: Sequence[int] = range(len(examples))
    lengths = np.empty(len(examples), dtype=np.int32)
    if len(examples) > ALL_AHEAD:
        ahead = sorted(random.Random(seed).sample(ahead, SOME_AHEAD))
        lengths[:] = [examples.length(index, renderer.tokens_per_image) for index in range(len(examples))]
    counts = Counts()
    for index in ahead:
        example = examples[index]
        sample = render(example, examples.shown(index), renderer, context)
        # what is known of all is exact, and what is known of some is about right for all
        lengths[index] = len(sample.tree) if len(ahead) == len(examples) else lengths[index]
        counts = counts.plus(example, sample)
        on_samples(1)
    return SampleSet(examples, renderer, lengths, counts, context)


def arrange(samples: SampleSet, batch_size: int, seed: int = 0) -> SampleSet:
    """Shuffle, then bring samples of like length together, batch by batch; batches themselves come in random order.

    A remainder smaller than a batch is left out, unless it is all there is.
    """
    rng = random.Random(seed)
    order = list(range(len(samples)))
    rng.shuffle(order)
    pool = 8 * batch_size
    batches = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=samples.lengths.__getitem__)
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    whole = [batch for batch in batches if len(batch) == batch_size] or batches
    rng.shuffle(whole)
    return samples.select([index for batch in whole for index in batch])


def report(samples: SampleSet) -> dict[str, int | float]:
    """What a run will learn from, in numbers; those of text are extrapolated where not all samples were rendered ahead."""
    counts = samples.counts
    share = len(samples) / max(1, counts.examples)
    return {
        "photos": len(samples.examples.wanted()),
        "samples": len(samples),
        "conversations": round(counts.conversations * share),
        "answers": round(counts.answers * share),
        "yes": round(counts.yes * share),
        "no": round(counts.no * share),
        "tokens": round(counts.tokens * share),
        "tokens with loss": round(counts.targets * share),
        "tokens per sample": round(counts.tokens / max(1, counts.examples), 1),
    }


def _stamp(path: Path) -> str:
    """What tells a file from others, and from what it was before it was replaced, without reading it."""
    try:
        return f"{os.path.realpath(path)} {path.stat().st_mtime_ns}"
    except (OSError, ValueError):  # not there
        return str(path)


class FeatureCache:
    """The tower's tokens of each photo, on disk; photos are known by the path, size and time of change of their files.

    Where several commands want the same ones, one looks and the others wait for it.

    Args:
        folder: holds a sub-folder for each (tower, photos).
        tower: computes what is missing.
        photos: in a fixed order.
        owner: whether this process computes; others wait until the owner has.
    """

    def __init__(self, folder: Path, tower: SparseFormer, photos: Sequence[Photo], owner: bool = True) -> None:
        self.tower, self.photos, self.owner = tower, photos, owner
        self.preprocessor = Preprocessor.of(tower.config)
        digest = hashlib.sha256(json.dumps(tower.config.to_dict(), sort_keys=True).encode())  # with the fit and the size of the canvas
        digest.update(f"drafts {OVERSAMPLING}\n".encode())  # how large JPEGs are decoded, which changes their last bits
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        stamp = functools.cache(_stamp)  # of a tar, once for all of its photos
        for photo in photos:
            digest.update(os.fsencode(f"{stamp(photo.source)}/{photo.key}/{photo.offset}/{photo.size}\n"))
        self.folder = folder / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        # as 16-bit integers: numpy has no bfloat16
        self._tokens = self._open("tokens.bf16", np.int16, (len(photos), tower.config.visual_tokens, tower.config.width))
        self._done = self._open("done.u8", np.uint8, (len(photos),))
        self._blank: dict[int, Tensor] = {}

    def _open(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        path = self.folder / name
        size = math.prod(shape) * np.dtype(dtype).itemsize
        while not self.owner and not (path.exists() and path.stat().st_size == size):
            time.sleep(0.1)
        path.touch()  # "w+" would empty what another command has begun to fill; "r+" makes a file longer, by zeros
        return np.memmap(path, dtype, "r+", shape=shape)

    def missing(self, wanted: Sequence[int]) -> list[int]:
        """Photos of `wanted` that are not computed yet."""
        return [index for index in sorted(set(wanted)) if not self._done[index]]

    def fill(
        self,
        wanted: Sequence[int],
        on_photos: Callable[[int], None] = lambda photos: None,
        on_bad: Callable[[int, ImageError], None] | None = None,
    ) -> None:
        """Compute what is missing; an interrupted fill goes on where it stopped.

        Args:
            on_photos: called with the number of photos just finished.
            on_bad: called with each photo that cannot be used, and why; these stay missing.

        Raises:
            ImageError: the first photo that cannot be used, where there is no `on_bad`.
        """
        while not self.owner and self.missing(wanted):
            time.sleep(0.5)
        count = len(self.missing(wanted))
        with FileLock(self.folder / "lock"):
            missing = self.missing(wanted)
            if len(missing) < count:
                on_photos(count - len(missing))  # another command looked
            for start in range(0, len(missing), BATCH):
                part = missing[start : start + BATCH]
                named = on_bad and (lambda place, error, part=part: on_bad(part[place], error))
                loaded = self.preprocessor.load_all([self.photos[index] for index in part], on_bad=named)
                images = {index: image for index, image in zip(part, loaded, strict=True) if image is not None}
                if images:
                    chosen = list(images)
                    self._tokens[chosen] = self._look(list(images.values())).view(torch.int16).numpy()
                    self._tokens.flush()
                    self._done[chosen] = 1
                on_photos(len(part))

    def stand_in(self, photos: Collection[int]) -> None:
        """Give some photos the tokens of a blank image, in this process alone."""
        config = self.tower.config
        tokens = self._look([blank(config.image_size, config.image_mean)])[0] if photos else None
        self._blank = dict.fromkeys(photos, tokens)

    @torch.no_grad()
    def _look(self, images: Sequence[Image.Image]) -> Tensor:
        """(images, N, d) bfloat16."""
        inputs = self.preprocessor(images).to(next(self.tower.parameters()).device)
        # at 49 tokens plain attention is faster than the fused kernel
        with sdpa_kernel(SDPBackend.MATH):
            return self.tower.visual_tokens(*inputs).to("cpu", torch.bfloat16)

    def __getitem__(self, index: int) -> Tensor:
        """(N, d) bfloat16."""
        if index in self._blank:
            return self._blank[index]
        return torch.from_numpy(np.array(self._tokens[index])).view(torch.bfloat16)
