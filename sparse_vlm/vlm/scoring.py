"""Log-likelihoods of candidate answers.

Notable: conversations about the same images, and their candidates, are merged into token trees (`vlm.tree`), so that common prefixes are
computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.vlm.prompts import Message, Rendered, assistant, images_of
from sparse_vlm.vlm.tree import TokenTree, collate, merge, target_log_probs

if TYPE_CHECKING:
    from sparse_vlm.vlm.model import VLM

TREE_TOKENS = 640  # maximum of a tree, because attention costs its square


class Score(NamedTuple):
    """Log-likelihood of an answer, its end-of-turn token included."""

    total: float
    mean: float  # per token


@dataclass(frozen=True)
class _ImageTree:
    """A tree, the (conversation, candidate) of each of its sequences, and its images."""

    tree: TokenTree
    owners: tuple[tuple[int, int], ...]
    images: tuple[Image.Image, ...]


@torch.inference_mode()
def score(vlm: VLM, conversations: Sequence[Sequence[Message]], answers: Sequence[Sequence[str]], batch_size: int) -> list[list[Score]]:
    """See `VLM.score`."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, conversation in enumerate(conversations):
        groups.setdefault(tuple(id(image) for image in images_of(conversation)), []).append(i)
    grown = [tree for group in groups.values() for tree in _grow(vlm, group, conversations, answers)]
    grown.sort(key=lambda one: len(one.tree))
    features: dict[int, Tensor] = {}
    log_probs: dict[tuple[int, int], list[float]] = {}
    for start in range(0, len(grown), batch_size):
        chosen = grown[start : start + batch_size]
        batch = collate([one.tree for one in chosen], vlm.tokenizer.pad_token_id).to(vlm.model.device)
        values = target_log_probs(vlm.model, batch, _encode(vlm, [image for one in chosen for image in one.images], features))
        for value, (tree, sequence) in zip(values.tolist(), batch.target_owners.tolist(), strict=True):
            log_probs.setdefault(chosen[tree].owners[sequence], []).append(value)
    return [
        [Score(sum(log_probs[i, k]), sum(log_probs[i, k]) / len(log_probs[i, k])) for k in range(len(candidates))]
        for i, candidates in enumerate(answers)
    ]


def _encode(vlm: VLM, images: Sequence[Image.Image], known: dict[int, Tensor]) -> Tensor | None:
    """Features of images, each encoded once."""
    if not images:
        return None
    new = {id(image): image for image in images if id(image) not in known}
    if new:
        known.update(zip(new, vlm.image_features(list(new.values())), strict=True))
    return torch.stack([known[id(image)] for image in images])


def _grow(
    vlm: VLM, group: Sequence[int], conversations: Sequence[Sequence[Message]], answers: Sequence[Sequence[str]]
) -> Iterator[_ImageTree]:
    """Trees of conversations about the same images."""
    images = tuple(images_of(conversations[group[0]]))
    expected = len(images) * vlm.tokens_per_image
    sequences: list[Rendered] = []
    owners: list[tuple[int, int]] = []
    tree: TokenTree | None = None
    for i in group:
        if not answers[i]:
            continue
        new = [_candidate(vlm, conversations[i], answer, f"conversation {i}") for answer in answers[i]]
        grown = merge([*sequences, *new])
        # an image behind different prefixes is not shared and would be in the tree twice
        apart = sum(token == vlm.renderer.image_id for token in grown.ids) != expected
        if tree is not None and (apart or len(grown) > TREE_TOKENS):
            yield _ImageTree(tree, tuple(owners), images)
            sequences, owners, grown = [], [], merge(new)
        sequences += new
        owners += [(i, k) for k in range(len(new))]
        tree = grown
    if tree is not None:
        yield _ImageTree(tree, tuple(owners), images)


def _candidate(vlm: VLM, conversation: Sequence[Message], answer: str, name: str) -> Rendered:
    """The conversation with an answer, whose tokens alone are scored."""
    return vlm.renderer.render([*conversation, assistant(answer)], name, last_only=True, to_learn=False)
