"""Prepare an LLM for LLaVA: add the image token to its embeddings, and check that LLaVA's head computes the same logits.

Shape legend: V rows of the embeddings, D width of the LLM.

Notable: existing rows do not change. Some LLMs have more rows than tokens (Qwen, Phi); the image token then takes the first unused row,
and nothing is resized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparse_vlm.errors import UserError
from sparse_vlm.hub.pretrained import model_errors
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, add_image_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_ROWS = 1024  # beyond twice a model's rows, a tokenizer belongs to another model


@torch.no_grad()
def add_image_row(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Add the image token to the tokenizer, and a row for it to input and output embeddings (V, D), tied or not.

    New rows, padded to a multiple of 64, are the mean of the old rows, so that they are never the likeliest token.

    Returns:
        Ids that must never be generated: the image token's, and those of unused rows.

    Raises:
        UserError: the tokenizer has far more tokens than the model has rows.
    """
    before = tokenizer.get_vocab()
    add_image_token(tokenizer)
    ids = set(tokenizer.get_vocab().values())
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    old = model.get_input_embeddings().weight.shape[0]
    if max(ids) > 2 * old + MAX_NEW_ROWS:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has ids up to {max(ids):,}, the model {old:,} rows; use the model's own tokenizer"
        )
    if max(ids) >= old:
        model.resize_token_embeddings(max(ids) + 1, pad_to_multiple_of=64, mean_resizing=False)
    new = range(old, model.get_input_embeddings().weight.shape[0])
    new = [*new, image_id] if IMAGE_TOKEN not in before and image_id < old else list(new)
    trained = min(old, max(before.values()) + 1)
    for layer in {id(layer): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        layer.weight[new] = layer.weight[:trained].float().mean(0).to(layer.weight.dtype)
    return sorted({image_id} | set(range(model.get_input_embeddings().weight.shape[0])) - ids)


@torch.no_grad()
def check_llm(model: PreTrainedModel, name: str) -> None:
    """Check that the LLM is text-only and that its logits are its last hidden states times a matrix, as in the stock LLaVA.

    Raises:
        UserError: a multimodal model, an output bias, logits that are scaled or capped, or a model that cannot be run.
    """
    if model.config.get_text_config() is not model.config:
        raise UserError(f"{name}: a {model.config.model_type} model is multimodal itself; take a text-only one")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{name}: its output layer has a bias, which LlavaForConditionalGeneration does not support; take another LLM")
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    with model_errors(name, "a language model that can be run"):
        own = model(input_ids=ids, use_cache=False).logits.float()
        plain = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not bool(torch.isfinite(own).all() & torch.isfinite(plain).all()):
        raise UserError(f"{name}: its logits are not finite; its weights are damaged or do not fit its configuration")
    if not torch.allclose(own, plain, rtol=0, atol=0.01 * float(plain.abs().max())):
        raise UserError(
            f"{name}: its logits are scaled or capped after the output layer (up to {float(plain.abs().max()):.3g} become "
            f"{float(own.abs().max()):.3g}), which LlavaForConditionalGeneration does not do; take another LLM"
        )
