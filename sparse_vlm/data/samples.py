"""Examples to samples: token trees with checked label masks, in batches of similar length, and cached image features.

Shape legend: N tokens an image, d width of the tower.

Notable: a sample is rendered when it is asked for, and its label mask is checked each time, so that a dataset of any size starts at once;
all samples of a small one are rendered ahead, so that a mistake shows before the first step. A frozen tower encodes each photo once; the
features stay on disk for all visits, stages and runs.
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
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

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


class ImageSource(Protocol):
    """What a VLM is shown of each photo, by the photo's number: a `FeatureCache`, or `train`'s `LiveImages` and `WordImages`."""

    def __getitem__(self, photo: int) -> Tensor: ...


@dataclass(frozen=True)
class Sample:
    """An example's conversations as one token tree, and its images.

    Attributes:
        name: what to call it in messages to people.
        photos: indices into the dataset's photos, in the order of their placeholders; none for text alone.
        tree: its placeholders are N for each of the photos.
        images: each (N, d) features, (3, h, w) pixels where the tower is trained, or (N, D) embeddings; none unless asked for.
    """

    name: str
    photos: tuple[int, ...]
    tree: TokenTree
    images: tuple[Tensor, ...] = ()


def render(
    example: Example, photos: tuple[int, ...], renderer: Renderer, context: int | None = None, images: ImageSource | None = None
) -> Sample:
    """Tokenize an example: render its conversations and merge them.

    Args:
        photos: the numbers of its photos.
        context: tokens that the LLM reads at most.
        images: by photo, what `Sample.images` is to hold.

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
    return Sample(example.name, photos, tree, tuple(images[photo] for photo in photos) if images is not None else ())


def longest_of(tree: TokenTree) -> int:
    """Tokens of a tree's longest conversation, with the last, which is only predicted and no part of the tree."""
    depths: list[int] = []
    for parent in tree.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 1)
    return max(depths) + 1


@dataclass(frozen=True)
class Counts:
    """Numbers of some examples and their samples."""

    examples: int = 0
    conversations: int = 0
    answers: int = 0
    yes: int = 0
    no: int = 0
    tokens: int = 0
    targets: int = 0

    def plus(self, example: Example, sample: Sample) -> Counts:
        """With one more example."""
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


class TokenizedDataset(Dataset):
    """The samples of a dataset, each rendered when it is asked for: what the Trainer iterates over.

    Args:
        examples: what they are made of.
        renderer: makes them.
        lengths: (samples,) of their trees in tokens; approximate where not all were rendered ahead.
        counts: of those that were rendered ahead.
        context: tokens that the LLM reads at most.
        images: by photo, what `Sample.images` holds; samples come without unless given.
    """

    def __init__(
        self,
        examples: ConversationDataset,
        renderer: Renderer,
        lengths: np.ndarray,
        counts: Counts,
        context: int | None = None,
        images: ImageSource | None = None,
    ) -> None:
        self.examples, self.renderer, self.lengths, self.counts, self.context = examples, renderer, lengths, counts, context
        self.images = images

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Sample:
        return render(self.examples[index], self.examples.photo_numbers(index), self.renderer, self.context, self.images)

    def with_images(self, images: ImageSource) -> TokenizedDataset:
        """The same samples with their images."""
        return TokenizedDataset(self.examples, self.renderer, self.lengths, self.counts, self.context, images)

    def select(self, indices: Sequence[int]) -> TokenizedDataset:
        """Some of the samples, in this order."""
        examples, lengths = self.examples.select(indices), self.lengths[np.asarray(indices, dtype=np.int64)]
        return TokenizedDataset(examples, self.renderer, lengths, self.counts, self.context, self.images)

    def without(self, photos: Collection[int]) -> TokenizedDataset:
        """The samples that show none of some photos."""
        bad = set(photos)
        return self.select([index for index in range(len(self)) if bad.isdisjoint(self.examples.photo_numbers(index))])


def build_samples(
    examples: ConversationDataset,
    renderer: Renderer,
    context: int | None = None,
    seed: int = 0,
    on_samples: Callable[[int], None] = lambda samples: None,
) -> TokenizedDataset:
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
        sample = render(example, examples.photo_numbers(index), renderer, context)
        # what is known of all is exact, and what is known of some is about right for all
        lengths[index] = len(sample.tree) if len(ahead) == len(examples) else lengths[index]
        counts = counts.plus(example, sample)
        on_samples(1)
    return TokenizedDataset(examples, renderer, lengths, counts, context)


def arrange(samples: TokenizedDataset, batch_size: int, seed: int = 0) -> TokenizedDataset:
    """Shuffle, then sort by length within pools of eight batches; the batches come in random order.

    A last batch that is not full is left out, unless it is the only one.
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


def summarize(samples: TokenizedDataset) -> dict[str, int | float]:
    """Numbers of the training data; those of text are extrapolated where not all samples were rendered ahead."""
    counts = samples.counts
    share = len(samples) / max(1, counts.examples)
    return {
        "photos": len(samples.examples.used_photos()),
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
    """Identifies a file and its version without reading it."""
    try:
        return f"{os.path.realpath(path)} {path.stat().st_mtime_ns}"
    except (OSError, ValueError):  # not there
        return str(path)


class FeatureCache:
    """Image features on disk: the tower's tokens of each photo, which is identified by path, size and time of change of its file.

    Where several processes want the same ones, one computes and the rest wait.

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
                on_photos(count - len(missing))  # another process has computed them
            for start in range(0, len(missing), BATCH):
                part = missing[start : start + BATCH]
                named = on_bad and (lambda place, error, part=part: on_bad(part[place], error))
                loaded = self.preprocessor.load_all([self.photos[index] for index in part], on_bad=named)
                images = {index: image for index, image in zip(part, loaded, strict=True) if image is not None}
                if images:
                    chosen = list(images)
                    self._tokens[chosen] = self._encode(list(images.values())).view(torch.int16).numpy()
                    self._tokens.flush()
                    self._done[chosen] = 1
                on_photos(len(part))

    def stand_in(self, photos: Collection[int]) -> None:
        """Give some photos the tokens of a blank image, in this process alone."""
        config = self.tower.config
        tokens = self._encode([blank(config.image_size, config.image_mean)])[0] if photos else None
        self._blank = dict.fromkeys(photos, tokens)

    @torch.no_grad()
    def _encode(self, images: Sequence[Image.Image]) -> Tensor:
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
