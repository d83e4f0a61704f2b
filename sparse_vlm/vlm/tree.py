"""Token trees: conversations about the same images in one forward pass, with common prefixes computed once.

Shape legend: B trees in a batch, L tokens of the longest tree, S tokens of all trees, T targets.
Five captions and six questions about a photo begin with the same tokens, the photo's among them. Their token sequences are merged
into a prefix tree. A token attends to its ancestors, and its position is its depth, so the result equals separate forward passes
(`tests/unit/vlm/test_tree.py`).

Notable: a tree is an attention mask and position ids, which stock models take. Trees of a batch are padded to the longest (`collate`).
Single conversations can be packed into one row (`pack`) for flash-attention with variable lengths. The LLM's head runs only at positions
with a target.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_vlm.vlm.prompts import Rendered

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True)
class Target:
    """A token to predict, the position that predicts it, and its sequence."""

    position: int
    token: int
    sequence: int


@dataclass(frozen=True)
class TokenTree:
    """Merged sequences: token `i` follows token `parents[i]` (-1 for the first); parents come before their children."""

    ids: tuple[int, ...]
    parents: tuple[int, ...]
    targets: tuple[Target, ...]

    def __len__(self) -> int:
        return len(self.ids)


def merge(sequences: Sequence[Rendered]) -> TokenTree:
    """Merge sequences by their common prefixes; tokens after a sequence's last supervised token are left out.

    A token that several sequences predict at the same place is one target per sequence, as in separate passes.

    Raises:
        ValueError: the sequences do not begin with the same unsupervised token.
    """
    ids: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    targets: list[Target] = []
    for number, sequence in enumerate(sequences):
        last = max((i for i, carries in enumerate(sequence.supervised) if carries), default=-1)
        parent = -1
        for token, carries in zip(sequence.ids[: last + 1], sequence.supervised, strict=False):
            if carries:
                targets.append(Target(parent, token, number))
            node = children.get((parent, token))
            if node is None:
                node = children[parent, token] = len(ids)
                ids.append(token)
                parents.append(parent)
            parent = node
    if not ids or parents.count(-1) != 1 or any(target.position < 0 for target in targets):
        raise ValueError("the sequences of a tree must begin with the same token, and it must carry no loss")
    # leaves are predicted, but nothing attends to them
    has_child = set(parents)
    kept = [i for i in range(len(ids)) if i in has_child]
    index = {old: new for new, old in enumerate(kept)}
    return TokenTree(
        ids=tuple(ids[i] for i in kept),
        parents=tuple(index.get(parents[i], -1) for i in kept),
        targets=tuple(Target(index[t.position], t.token, t.sequence) for t in targets),
    )


def is_chain(tree: TokenTree) -> bool:
    """Whether a tree is one conversation: every token follows the one before it."""
    return all(parent == i - 1 for i, parent in enumerate(tree.parents))


@dataclass
class TreeBatch:
    """Trees, padded, or conversations packed into one row, (1, S).

    Attributes:
        input_ids: (B, L), packed (1, S).
        position_ids: of the same shape, depth in the tree.
        attention_mask: (B, 1, L, L) bool, true where a token attends to another; None for a packed batch.
        target_positions: (T,) into the flattened input_ids.
        target_ids: (T,).
        target_owners: (T, 2): tree in the batch, sequence in the tree.
        lengths: tokens of each conversation of a packed batch; empty where trees are padded.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    target_positions: Tensor
    target_ids: Tensor
    target_owners: Tensor
    lengths: tuple[int, ...] = ()

    def to(self, device: torch.device) -> TreeBatch:
        """The same on a device."""
        return TreeBatch(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()})


def collate(trees: Sequence[TokenTree], pad_id: int) -> TreeBatch:
    """Pad trees to one batch; padding attends to itself alone."""
    length = max(map(len, trees))
    input_ids = torch.full((len(trees), length), pad_id)
    position_ids = torch.zeros(len(trees), length, dtype=torch.long)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    for b, tree in enumerate(trees):
        input_ids[b, : len(tree)] = torch.tensor(tree.ids)
        attends, depth = mask[b], []
        for i, parent in enumerate(tree.parents):
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                attends[i] |= attends[parent]
        position_ids[b, : len(tree)] = torch.tensor(depth)
    return TreeBatch(input_ids, position_ids, mask.unsqueeze(1), *_targets(trees, [b * length for b in range(len(trees))]))


def pack(chains: Sequence[TokenTree]) -> TreeBatch:
    """Conversations one after the other in a single row, without padding.

    Raises:
        ValueError: one of them is a tree, which needs a mask.
    """
    if not all(map(is_chain, chains)):
        raise ValueError("only single conversations can be packed")
    lengths = tuple(map(len, chains))
    input_ids = torch.tensor([token for chain in chains for token in chain.ids])
    position_ids = torch.cat([torch.arange(length) for length in lengths])
    starts = [0, *itertools.accumulate(lengths)]
    return TreeBatch(input_ids[None], position_ids[None], None, *_targets(chains, starts), lengths)


def _targets(trees: Sequence[TokenTree], starts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, tokens and owners of all targets, where each tree begins at its place in the flattened batch."""
    positions = [start + t.position for start, tree in zip(starts, trees, strict=False) for t in tree.targets]
    tokens = [t.token for tree in trees for t in tree.targets]
    owners = [(b, t.sequence) for b, tree in enumerate(trees) for t in tree.targets]
    return torch.tensor(positions), torch.tensor(tokens), torch.tensor(owners).view(-1, 2)


def target_log_probs(
    model: LlavaForConditionalGeneration, batch: TreeBatch, image_features: Tensor | None, plain_causal: bool = False
) -> Tensor:
    """Log-probability of every target.

    Args:
        model: may contain PEFT's layers.
        batch: packed only where `plain_causal` and the LLM's attention is flash-attention.
        image_features: (images, N, width of the LLM), projected, in the order of the placeholders; None without images.
        plain_causal: every tree is one conversation (`is_chain`), so that the LLM's own causal mask is used, as flash-attention requires.

    Returns:
        (T,) float32.
    """
    embeds = model.get_input_embeddings()(batch.input_ids)
    if image_features is not None:
        placeholders = batch.input_ids == model.config.image_token_id
        if int(placeholders.sum()) != image_features.shape[0] * image_features.shape[1]:
            raise ValueError(
                f"{int(placeholders.sum())} image placeholders for {image_features.shape[0]} x {image_features.shape[1]} image tokens"
            )
        embeds = embeds.masked_scatter(placeholders.unsqueeze(-1), image_features.to(embeds.dtype))
    positions, mask, lengths = batch.position_ids, None, {}
    if not plain_causal:
        # additive rather than boolean: both plain and fused attention take it
        mask = embeds.new_full(batch.attention_mask.shape, torch.finfo(embeds.dtype).min).masked_fill(batch.attention_mask, 0)
    elif batch.lengths:
        lengths = _sequence_lengths(batch.lengths, embeds.device)
    else:
        # padding is last, where the causal mask hides it; positions go on, because a reset would be taken for a new packed sequence
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    out = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **lengths)
    states = out.last_hidden_state.flatten(0, 1)
    positions, index = batch.target_positions.unique(return_inverse=True)
    logits = model.lm_head(states[positions]).float()
    return F.log_softmax(logits, dim=-1)[index, batch.target_ids]


def _sequence_lengths(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """transformers' arguments for flash-attention on a packed row: cumulative and maximal lengths."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths)}
