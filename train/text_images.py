"""Reading before seeing: images of words, from which the LLM learns to answer about what stands in an image's place.

Shape legend: N tokens an image, D width of the LLM.
An LLM of 135 M parameters cannot use even plain words: told all that is in a photo, it tells the things that are there from those that are
not no better than by chance, yet it learns to within a few hundred photos. Before a projector's first tokens it had not learnt it in four
times as many steps (lab/notebook.md), because both sides are noise to each other. So the LLM learns to read first, from embeddings of words
in the place of a photo's tokens. Neither tower nor projector takes part.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.data.words import words_by_photo
from sparse_vlm.vlm import VLM


class WordImages:
    """For each photo N embeddings of words that are said about it, all of them where they fit, in random order: (N, D).

    Args:
        examples: each with a word about its photos.
        seed: of the order.
    """

    def __init__(self, vlm: VLM, examples: ConversationDataset, seed: int = 0) -> None:
        # in the processor's memory: what loads samples on a GPU's behalf are other processes, which must not touch it
        self._embeddings = vlm.model.get_input_embeddings().weight.detach().cpu()
        self._tokens, self._seed = vlm.tokens_per_image, seed
        said = {photo: set().union(*sentences) for photo, sentences in words_by_photo(examples).items()}
        # a word of several tokens is known by its first
        first = {word: vlm.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for words in said.values() for word in words}
        self._ids = {photo: sorted({first[word] for word in words}) for photo, words in said.items()}

    def __getitem__(self, photo: int) -> Tensor:
        """(N, D)."""
        rng = random.Random(f"{self._seed}/{photo}")
        ids = self._ids[photo]
        shown = rng.sample(ids, min(len(ids), self._tokens))
        shown += rng.choices(ids, k=self._tokens - len(shown))
        rng.shuffle(shown)
        return self._embeddings[torch.tensor(shown)]
