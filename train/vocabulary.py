"""The projector's beginning: an image's tokens say words before the LLM hears them.

Shape legend: B photos, N tokens an image, d width of the tower, D width of the LLM, V words.
A projector that begins at random hands the LLM noise, and running the LLM to tell it so costs far more than the projector itself. But
what a good projector says is half known: an LLM reads embeddings of words. So the projector first learns, without the LLM, to hand on
embeddings of the words that are said about the photo: each token chooses among all words, and each word that is said of the photo must be
chosen by some token (multiple instance learning, as in Fang et al., From Captions to Visual Concepts and Back, arXiv 1411.4952, section 3).
LLaVA's two stages follow.

Notable: the words compete in a softmax. Where each word is decided by itself, all tokens may share a large part that says nothing of the
photo and drowns, for the LLM, what does.
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

MAX_TALKS = 50_000  # that words are taken from
MIN_PHOTOS = 12  # that a word must be said of
MAX_SHARE = 0.5  # of all photos; a word that is said of more says little of any
HELD_OUT_ONE_IN = 20
BATCH = 32
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Words:
    """What is said about photos, as single tokens of the LLM.

    Attributes:
        names: V words.
        ids: (V,) their tokens, as they stand after a space.
        photos: indices of the photos of which one of the words is said.
        said: (len(photos), V) how often the word is said of the photo, as a share of all the words that are.
    """

    names: tuple[str, ...]
    ids: Tensor
    photos: tuple[int, ...]
    said: Tensor


def words_of(examples: ConversationDataset, tokenizer: object) -> Words:
    """Words that are said about photos, where the LLM knows them as one token; of many examples, some evenly from all say enough."""
    sentences = words_by_photo(examples.select(range(0, len(examples), -(-len(examples) // MAX_TALKS))))
    spread = Counter(word for said in sentences.values() for word in set().union(*said))
    names, ids = [], []
    for word in sorted(word for word, count in spread.items() if MIN_PHOTOS <= count <= MAX_SHARE * len(sentences)):
        tokens = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(tokens) == 1:
            names.append(word)
            ids.append(tokens[0])
    place = {word: i for i, word in enumerate(names)}
    counts = torch.zeros(len(sentences), len(names))
    for row, sets in enumerate(sentences.values()):
        for words in sets:
            for word in words & place.keys():
                counts[row, place[word]] += 1
    some = counts.sum(1) > 0
    photos = tuple(photo for photo, kept in zip(sentences, some.tolist(), strict=True) if kept)
    return Words(tuple(names), torch.tensor(ids), photos, counts[some] / counts[some].sum(1, keepdim=True))


class Chosen(nn.Module):
    """Which words a photo's tokens choose: (B, N, d) to log-probabilities (B, V), the mean choice of its tokens."""

    def __init__(self, projector: nn.Module, embeddings: Tensor) -> None:
        super().__init__()
        self.projector = projector
        centre = embeddings.mean(0)
        self.register_buffer("centre", centre)
        self.register_buffer("directions", F.normalize(embeddings - centre, dim=-1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, tokens: Tensor) -> Tensor:
        """The word whose direction from the words' centre is nearest is the likeliest."""
        pointed = F.normalize(self.projector(tokens) - self.centre, dim=-1) @ self.directions.T
        return F.log_softmax(self.log_scale.exp() * pointed, dim=-1).logsumexp(1) - math.log(tokens.shape[1])


def pretrain_projector(
    vlm: VLM, words: Words, features_cache: FeatureCache, epochs: int, seed: int = 0, on_photos: Callable[[int], None] = lambda photos: None
) -> dict[str, float]:
    """Train the projector to say words, and give what it says the length of a word's embedding.

    Args:
        vlm: its projector is float32; nothing else of it changes.
        features_cache: holds the tokens of the photos.
        on_photos: called with the number of photos just learnt from.

    Returns:
        On one photo in twenty, not learnt from: `first`, how often the word that a photo's tokens choose most is said of it, and
        `commonest`, the same for the word that is said most often; nothing where the photos are too few to spare any.
    """
    projector = vlm.projector
    device = projector.linear_1.weight.device
    embeddings = vlm.model.get_input_embeddings().weight[words.ids.to(device)].detach().float()
    held_out = [row for row, photo in enumerate(words.photos) if zlib.crc32(f"{photo}".encode()) % HELD_OUT_ONE_IN == 0]
    learnt = sorted(set(range(len(words.photos))) - set(held_out))
    chosen = Chosen(projector, embeddings).to(device)
    with torch.no_grad():
        projector.linear_2.bias.copy_(chosen.centre)

    def tokens_of(rows: Sequence[int]) -> Tensor:
        return torch.stack([features_cache[words.photos[row]] for row in rows]).float().to(device)

    trained = [p for p in chosen.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * -(-len(learnt) // BATCH)
    # a warm-up of one step would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=max(0.1, 2 / steps))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(learnt), generator=generator).split(BATCH):
            rows = [learnt[i] for i in batch.tolist()]
            loss = -(chosen(tokens_of(rows)) * words.said[rows].to(device)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_photos(len(rows))

    with torch.no_grad():
        probe = tokens_of(learnt[: 8 * BATCH])
        length = (projector(probe) - chosen.centre).norm(dim=-1).mean()
        wanted = (embeddings - chosen.centre).norm(dim=-1).mean()
        for parameter in (projector.linear_2.weight, projector.linear_2.bias):
            parameter.sub_(chosen.centre if parameter.ndim == 1 else 0).mul_(wanted / length)
        projector.linear_2.bias.add_(chosen.centre)
        if not held_out:
            return {}
        first = chosen(tokens_of(held_out)).argmax(1, keepdim=True).cpu()
        there = (words.said[held_out] > 0).float()
        commonest = int((words.said[learnt] > 0).float().mean(0).argmax())
        return {"first": there.gather(1, first).mean().item(), "commonest": there[:, commonest].mean().item()}
