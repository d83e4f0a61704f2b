"""Text-as-image pretraining: train the LLM to answer from word embeddings in the place of image tokens.

Shape legend: N tokens an image, D width of the LLM.
An LLM of 135 M parameters, given a list of all objects in a photo, answers at chance whether one of them is there, but learns it within a
few hundred photos. Together with a new projector it did not learn it in four times as many steps (lab/notebook.md). So the LLM is trained
first, on word embeddings in the place of image tokens, without tower and projector.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.data.words import words_by_photo
from sparse_vlm.vlm import VLM


class WordImages:
    """For each photo N embeddings of words about it, (N, D): all words if they fit, in random order.

    Args:
        examples: has at least one word about each photo.
        seed: of the order.
    """

    def __init__(self, vlm: VLM, examples: ConversationDataset, seed: int = 0) -> None:
        # on the CPU: data loader workers must not use the GPU
        self._embeddings = vlm.model.get_input_embeddings().weight.detach().cpu()
        self._tokens, self._seed = vlm.tokens_per_image, seed
        words_of_photo = {photo: set().union(*sentences) for photo, sentences in words_by_photo(examples).items()}
        # the first token stands for a word of several
        first = {word: vlm.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for words in words_of_photo.values() for word in words}
        self._ids = {photo: sorted({first[word] for word in words}) for photo, words in words_of_photo.items()}

    def __getitem__(self, photo: int) -> Tensor:
        """(N, D)."""
        rng = random.Random(f"{self._seed}/{photo}")
        ids = self._ids[photo]
        shown = rng.sample(ids, min(len(ids), self._tokens))
        shown += rng.choices(ids, k=self._tokens - len(shown))
        rng.shuffle(shown)
        return self._embeddings[torch.tensor(shown)]
