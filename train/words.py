"""The projector's beginning: a picture's tokens say words before the LLM hears them.

Shape legend: B photos, N tokens a picture, d width of the tower, D width of the LLM, V words.
A projector that begins at random hands the LLM noise, and running the LLM to tell it so costs far more than the projector itself. But
what a good projector says is half known: an LLM reads embeddings of words. So the projector first learns, without the LLM, that a photo's
tokens point in the direction of the words that are said about the photo: for each word the token that says it most clearly counts (multiple
instance learning, as in Fang et al., From Captions to Visual Concepts and Back, arXiv 1411.4952, section 3). LLaVA's two stages follow.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_vlm.data.samples import Sample, TokenBank
from sparse_vlm.data.talks import Talk
from sparse_vlm.vlm import VLM

MIN_PHOTOS = 12  # that a word must be said of
MAX_SHARE = 0.2  # of all photos; a word that is said of more says nothing of any
HELD_OUT_ONE_IN = 20
BATCH = 32
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Words:
    """What is said about photos, as single tokens of the LLM.

    Attributes:
        names: V words.
        ids: (V,) their tokens, as they stand after a space.
        photos: indices of the photos that something is said about.
        said: (len(photos), V) the share of a photo's sentences that hold the word.
    """

    names: tuple[str, ...]
    ids: Tensor
    photos: tuple[int, ...]
    said: Tensor


def words_of(talks: Sequence[Talk], samples: Sequence[Sample], tokenizer: object) -> Words:
    """Words that the answers about photos use, where the LLM knows them as one token.

    Args:
        samples: of the same talks, in the same order.
    """
    sentences: dict[int, list[set[str]]] = {}
    for talk, sample in zip(talks, samples, strict=True):
        if sample.photo is None:
            continue
        for conversation in talk.conversations:
            text = " ".join(message["content"][0]["text"] for message in conversation if message["role"] == "assistant")
            sentences.setdefault(sample.photo, []).append(set(re.findall(r"[a-z]{2,}", text.lower())))
    spread = Counter(word for said in sentences.values() for word in set().union(*said))
    names, ids = [], []
    for word in sorted(word for word, count in spread.items() if MIN_PHOTOS <= count <= MAX_SHARE * len(sentences)):
        tokens = tokenizer.encode(f" {word}", add_special_tokens=False)
        if len(tokens) == 1:
            names.append(word)
            ids.append(tokens[0])
    place = {word: i for i, word in enumerate(names)}
    said = torch.zeros(len(sentences), len(names))
    for row, sets in enumerate(sentences.values()):
        for words in sets:
            for word in words & place.keys():
                said[row, place[word]] += 1 / len(sets)
    return Words(tuple(names), torch.tensor(ids), tuple(sentences), said)


class WordScores(nn.Module):
    """How clearly a photo's tokens say each word: (B, N, d) to logits (B, V)."""

    def __init__(self, projector: nn.Module, embeddings: Tensor, said: Tensor) -> None:
        super().__init__()
        self.projector = projector
        centre = embeddings.mean(0)
        self.register_buffer("centre", centre)
        self.register_buffer("directions", F.normalize(embeddings - centre, dim=-1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))
        # begins at how often each word is said at all
        self.bias = nn.Parameter(torch.logit(said.mean(0), eps=1e-4))

    def forward(self, tokens: Tensor) -> Tensor:
        """The clearest token counts, softly: the log-mean-exp over tokens."""
        pointed = F.normalize(self.projector(tokens) - self.centre, dim=-1) @ self.directions.T
        return (self.log_scale.exp() * pointed).logsumexp(1) - math.log(tokens.shape[1]) + self.bias


def say_words(
    vlm: VLM, words: Words, bank: TokenBank, epochs: int, seed: int = 0, on_photos: Callable[[int], None] = lambda photos: None
) -> dict[str, float]:
    """Train the projector to say words, and give what it says the length of a word's embedding.

    Args:
        vlm: its projector is float32; nothing else of it changes.
        bank: holds the tokens of the photos.
        on_photos: called with the number of photos just learnt from.

    Returns:
        On one photo in twenty, not learnt from: `first`, how often the clearest word of a photo is said of it, and `commonest`, the same
        for the word that is said most often; nothing where the photos are too few to spare any.
    """
    projector = vlm.projector
    device = projector.linear_1.weight.device
    embeddings = vlm.model.get_input_embeddings().weight[words.ids.to(device)].detach().float()
    held_out = [row for row, photo in enumerate(words.photos) if zlib.crc32(f"{photo}".encode()) % HELD_OUT_ONE_IN == 0]
    learnt = sorted(set(range(len(words.photos))) - set(held_out))
    scores = WordScores(projector, embeddings, words.said[learnt]).to(device)
    with torch.no_grad():
        projector.linear_2.bias.copy_(scores.centre)

    def tokens_of(rows: Sequence[int]) -> Tensor:
        return torch.stack([bank[words.photos[row]] for row in rows]).float().to(device)

    trained = [p for p in scores.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * -(-len(learnt) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(learnt), generator=generator).split(BATCH):
            rows = [learnt[i] for i in chosen.tolist()]
            loss = F.binary_cross_entropy_with_logits(scores(tokens_of(rows)), words.said[rows].to(device), reduction="none").sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_photos(len(rows))

    with torch.no_grad():
        probe = tokens_of(learnt[: 8 * BATCH])
        length = (projector(probe) - scores.centre).norm(dim=-1).mean()
        wanted = (embeddings - scores.centre).norm(dim=-1).mean()
        for parameter in (projector.linear_2.weight, projector.linear_2.bias):
            parameter.sub_(scores.centre if parameter.ndim == 1 else 0).mul_(wanted / length)
        projector.linear_2.bias.add_(scores.centre)
        if not held_out:
            return {}
        clearest = scores(tokens_of(held_out)).argmax(1, keepdim=True).cpu()
        there = (words.said[held_out] > 0).float()
        commonest = int(words.said[learnt].mean(0).argmax())
        return {"first": there.gather(1, clearest).mean().item(), "commonest": there[:, commonest].mean().item()}
