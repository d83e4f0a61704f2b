"""An LLM's embeddings get a row for the image token, and its head is asked whether the stock LLaVA model can say what it says.

Shape legend: V rows of the embeddings, D width of the LLM.

Notable: no row that was there before changes. Some LLMs have more rows than tokens (Qwen, Phi); the image token then takes the first of
those, and nothing is resized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparse_vlm.errors import UserError
from sparse_vlm.hub.pretrained import model_errors
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, add_image_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_NEW = 1024  # tokens beyond twice a model's rows, which are more than anybody adds


@torch.no_grad()
def give_rows(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Add the image token to a tokenizer, and a row for it to input and output embeddings (V, D), tied or not.

    New rows, up to a multiple of 64, are the mean of the old ones, so that they are never the likeliest token.

    Returns:
        Ids that must never be said: the image token's, and those of rows that no token has.

    Raises:
        UserError: a tokenizer of far more tokens than the model has rows.
    """
    before = tokenizer.get_vocab()
    add_image_token(tokenizer)
    ids = set(tokenizer.get_vocab().values())
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    old = model.get_input_embeddings().weight.shape[0]
    if max(ids) > 2 * old + MOST_NEW:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer counts up to {max(ids):,}, and the model has {old:,} rows; take its own one"
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
    """Make sure that the LLM reads text alone and that its logits are its last states times a matrix; the stock LLaVA has room for no more.

    Raises:
        UserError: a model with modalities of its own, a bias, logits that are scaled or capped, or one that cannot be run.
    """
    if model.config.get_text_config() is not model.config:
        raise UserError(f"{name}: a {model.config.model_type} model has other modalities than text of its own; take a text-only one")
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(f"{name}: its output layer has a bias, which LlavaForConditionalGeneration has no place for; take another LLM")
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    with model_errors(name, "a language model that can be run"):
        own = model(input_ids=ids, use_cache=False).logits.float()
        plain = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
    if not bool(torch.isfinite(own).all() & torch.isfinite(plain).all()):
        raise UserError(f"{name}: its logits are not finite; its weights are damaged, or are not of this configuration")
    if not torch.allclose(own, plain, rtol=0, atol=0.01 * float(plain.abs().max())):
        raise UserError(
            f"{name}: its logits are scaled or capped after the output layer (up to {float(plain.abs().max()):.3g} become "
            f"{float(own.abs().max()):.3g}), which LlavaForConditionalGeneration leaves out; take another LLM"
        )
