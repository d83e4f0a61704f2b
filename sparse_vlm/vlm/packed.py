"""Attention over a packed row: sequences of a batch lie one after the other, without padding, and none sees another.

Shape legend: S tokens of the row, B sequences, L tokens of the longest, H heads, H' of keys and values, d size of a head.
All of an LLM but attention treats each token by itself, and so does in a packed row what it does in a padded batch, without the padding.
For attention alone sequences are laid apart again, padded, and computed as the model's own code computes it (`PACKED`, any mask); or
flash-attention is told where they begin, which takes plain causal attention only (`between`).

Notable: neither a mask over the whole row, which costs S * S, nor a call for each sequence pays on a processor: many small products with a
shape of their own each took longer than what padding costs (docs/attention.md).
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


def apart(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What `PACKED` must be told: of each token of the row its place in the padded batch, flattened, and the reverse."""
    longest = max(lengths)
    padded = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(lengths)])
    row = torch.zeros(len(lengths) * longest, dtype=torch.long)
    row[padded] = torch.arange(len(padded))
    return {"padded_places": padded.to(device), "row_places": row.to(device)}


def between(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What flash-attention must be told, for the LLM's call: where sequences begin and end, and how long they are at most."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths)}


class _Move(torch.autograd.Function):
    """Rows to other places and back, which is cheaper than torch's own gradient, that would add what comes from several places.

    In padding any row will do, there and in the gradient: it sees itself alone, and nothing that is read sees it.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, there: Tensor, back: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(back)
        return rows.index_select(0, there)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None  # type: ignore[attr-defined]


def attend_apart(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    padded_places: Tensor | None = None,
    row_places: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' interface of an attention function; with `padded_places` for each of a row's sequences alone.

    Args:
        query, key, value: (1, H or H', S, d).
        attention_mask: (B, 1, L, L) of the padded batch, added to the scores.
        padded_places, row_places: (S,) and (B * L,), from `apart`; without them the batch is a padded one.
        options: the model's own, passed on.

    Returns:
        (1, S, H, d), and the weights where the batch is a padded one.
    """
    own = _own_attention(module)
    if padded_places is None:
        return own(module, query, key, value, attention_mask, **options)
    batch, length = attention_mask.shape[0], attention_mask.shape[-1]
    laid = [_Move.apply(side[0].transpose(0, 1), row_places, padded_places) for side in (query, key, value)]
    sides = (side.unflatten(0, (batch, length)).transpose(1, 2) for side in laid)  # each (B, H or H', L, d)
    out, _ = own(module, *sides, attention_mask, **options)  # (B, L, H, d)
    return _Move.apply(out.flatten(0, 1), padded_places, row_places)[None], None


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
