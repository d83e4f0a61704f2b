"""Vocabulary pretraining: a new projector learns to map image tokens to word embeddings, without running the LLM.

Shape legend: B photos, N tokens per image, d width of the tower, D width of the LLM, V words.
Training a new projector through the LLM costs far more than the projector itself, but the LLM's word embeddings are known targets. So each
projected token predicts a distribution over words, and some token must predict each word about the photo (multiple instance learning, as
in Fang et al., From Captions to Visual Concepts and Back, arXiv 1411.4952, section 3). LLaVA's two stages follow.

Notable: words compete in a softmax. With a sigmoid for each word, all tokens may share a large component that is independent of the photo.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.data.dataset import ConversationDataset
from sparse_vlm.data.samples import FeatureCache
from sparse_vlm.data.words import words_by_photo
from sparse_vlm.vlm import VLM

MAX_EXAMPLES = 50_000  # whose words are used
MIN_PHOTOS = 12  # that a word must occur in
MAX_SHARE = 0.5  # of all photos; more frequent words do not distinguish photos
HELD_OUT_ONE_IN = 20
BATCH = 32
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Words:
    """Words about photos that are single tokens of the LLM.

    Attributes:
        names: V words.
        ids: (V,) their tokens after a space.
        photos: indices of the photos with at least one of the words.
        frequencies: (len(photos), V) relative frequency of the word in sentences about the photo; each row sums to 1.
    """

    names: tuple[str, ...]
    ids: Tensor
    photos: tuple[int, ...]
    frequencies: Tensor


def words_of(examples: ConversationDataset, tokenizer: object) -> Words:
    """The words of a dataset; of a large one, from examples spread evenly over it."""
    sentences = words_by_photo(examples.select(range(0, len(examples), -(-len(examples) // MAX_EXAMPLES))))
    photo_counts = Counter(word for sets in sentences.values() for word in set().union(*sets))
    names, ids = [], []
    for word in sorted(word for word, count in photo_counts.items() if MIN_PHOTOS <= count <= MAX_SHARE * len(sentences)):
        tokens = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(tokens) == 1:
            names.append(word)
            ids.append(tokens[0])
    column = {word: i for i, word in enumerate(names)}
    counts = torch.zeros(len(sentences), len(names))
    for row, sets in enumerate(sentences.values()):
        for words in sets:
            for word in words & column.keys():
                counts[row, column[word]] += 1
    with_words = counts.sum(1) > 0
    photos = tuple(photo for photo, kept in zip(sentences, with_words.tolist(), strict=True) if kept)
    return Words(tuple(names), torch.tensor(ids), photos, counts[with_words] / counts[with_words].sum(1, keepdim=True))


class WordChoice(nn.Module):
    """Image tokens (B, N, d) to log-probabilities of words (B, V), averaged over the tokens."""

    def __init__(self, projector: nn.Module, embeddings: Tensor) -> None:
        super().__init__()
        self.projector = projector
        centre = embeddings.mean(0)
        self.register_buffer("centre", centre)
        self.register_buffer("directions", F.normalize(embeddings - centre, dim=-1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, tokens: Tensor) -> Tensor:
        """By cosine between a projected token and a word's embedding, both centred."""
        cosines = F.normalize(self.projector(tokens) - self.centre, dim=-1) @ self.directions.T
        return F.log_softmax(self.log_scale.exp() * cosines, dim=-1).logsumexp(1) - math.log(tokens.shape[1])


def pretrain_projector(
    vlm: VLM, words: Words, features: FeatureCache, epochs: int, seed: int = 0, on_photos: Callable[[int], None] = lambda photos: None
) -> dict[str, float]:
    """Train the projector on words, then scale its output to the mean norm of word embeddings.

    Args:
        vlm: its projector is float32; nothing else of it changes.
        features: holds the tokens of the photos.
        on_photos: called with the number of photos of each step.

    Returns:
        Accuracy on one photo in twenty, held out: `first`, of the likeliest word, and `commonest`, of always choosing the most
        frequent word; empty if there are too few photos to hold any out.
    """
    projector = vlm.projector
    device = projector.linear_1.weight.device
    embeddings = vlm.model.get_input_embeddings().weight[words.ids.to(device)].detach().float()
    held_out = [row for row, photo in enumerate(words.photos) if zlib.crc32(f"{photo}".encode()) % HELD_OUT_ONE_IN == 0]
    trained_rows = sorted(set(range(len(words.photos))) - set(held_out))
    chosen = WordChoice(projector, embeddings).to(device)
    with torch.no_grad():
        projector.linear_2.bias.copy_(chosen.centre)

    def tokens_of(rows: Sequence[int]) -> Tensor:
        return torch.stack([features[words.photos[row]] for row in rows]).float().to(device)

    trained = [p for p in chosen.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * -(-len(trained_rows) // BATCH)
    # a warm-up of one step would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=max(0.1, 2 / steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(trained_rows), generator=generator).split(BATCH):
            rows = [trained_rows[i] for i in batch.tolist()]
            loss = -(chosen(tokens_of(rows)) * words.frequencies[rows].to(device)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_photos(len(rows))

    with torch.no_grad():
        probe = tokens_of(trained_rows[: 8 * BATCH])
        length = (projector(probe) - chosen.centre).norm(dim=-1).mean()
        target_length = (embeddings - chosen.centre).norm(dim=-1).mean()
        for parameter in (projector.linear_2.weight, projector.linear_2.bias):
            parameter.sub_(chosen.centre if parameter.ndim == 1 else 0).mul_(target_length / length)
        projector.linear_2.bias.add_(chosen.centre)
        if not held_out:
            return {}
        first = chosen(tokens_of(held_out)).argmax(1, keepdim=True).cpu()
        present = (words.frequencies[held_out] > 0).float()
        commonest = int((words.frequencies[trained_rows] > 0).float().mean(0).argmax())
        return {"first": present.gather(1, first).mean().item(), "commonest": present[:, commonest].mean().item()}
