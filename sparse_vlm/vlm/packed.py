"""Attention over a packed row: sequences of a batch lie one after the other, without padding, and none sees another.

Shape legend: S tokens of the row, L of its longest sequence, l of one of them, H heads, H' of keys and values, d size of a head.
All of an LLM but attention treats each token by itself, and so does in a packed row what it does in a padded batch, without the padding.
Attention is computed for each sequence alone, as the model's own code computes it (`PACKED`, any mask), or by flash-attention, which takes
the places where sequences begin and plain causal attention only (`between`).

Notable: a mask over the whole row would do as well, but attention over it costs S * S instead of the sum of l * l.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

PACKED = "sparse_vlm_packed"  # how transformers knows it, and what `set_attn_implementation` takes
CAUSAL = {"full_attention", "sliding_attention"}  # layers of which no token is seen but through attention


def segments(lengths: Sequence[int]) -> dict[str, Any]:
    """What `PACKED` must be told, for the LLM's call; nothing where sequences are padded."""
    return {"segments": tuple(lengths)} if lengths else {}


def between(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What flash-attention must be told, for the LLM's call: where sequences begin and end, and how long they are at most."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def attend_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Sequence[int] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function; with `segments` for each of a row's sequences alone.

    Args:
        query, key, value: (1, H or H', S, d).
        attention_mask: (1, 1, S, L), added to the scores; columns are tokens of the row's own sequence.
        segments: the sequences' lengths; without it the batch is a padded one.
        options: the model's own, passed on.

    Returns:
        (1, S, H, d), and the weights where the batch is a padded one.
    """
    own = _own_attention(module)
    if segments is None:
        return own(module, query, key, value, attention_mask, **options)
    parts = zip(*(side.split(segments, dim=2) for side in (query, key, value, attention_mask)), strict=True)
    return torch.cat([own(module, q, k, v, mask[..., : q.shape[2]], **options)[0] for q, k, v, mask in parts], dim=1), None


def _own_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """How the code of a model computes attention plainly, with whatever its family does otherwise; None where it does not say."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def packable(language: PreTrainedModel) -> bool:
    """Whether all tokens of an LLM meet in attention alone, so that sequences can be kept apart there: no recurrences, no convolutions."""
    kinds = getattr(language.config, "layer_types", None) or CAUSAL
    return not language._is_stateful and set(kinds) <= CAUSAL


def packable_plainly(language: PreTrainedModel) -> bool:
    """Whether `PACKED` can be an LLM's attention."""
    return packable(language) and language._supports_attention_backend and _own_attention(language) is not None


AttentionInterface.register(PACKED, attend_apart)
AttentionMaskInterface.register(PACKED, eager_mask)  # of padded batches, and of talking
