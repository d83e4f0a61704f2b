"""Tokenize conversations as a VLM would, without loading its weights."""

from __future__ import annotations

from pathlib import Path

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.tower.config import read_config
from sparse_vlm.vlm.llm import load_tokenizer
from sparse_vlm.vlm.projectors import DEFAULT_TOKENS, MLP
from sparse_vlm.vlm.prompts import Renderer, add_image_token, extend_template


def load_renderer(tower: str | Path, llm: str | Path, num_tokens: int | None = None, projector: str = MLP) -> tuple[Renderer, int | None]:
    """The renderer of the VLM that `VLM.build` would make of these parts, and the LLM's context length (None if unlimited).

    Args:
        num_tokens: token budget of the tower, or the number of tokens that a projector reduces the tower's to.
        projector: as in `VLM.build`.

    Raises:
        UserError: either cannot be found or read, or the tower does not serve that token budget.
    """
    config = read_config(store.locate(tower), str(tower))
    if num_tokens is not None and projector == MLP:
        try:
            config = config.at_budget(num_tokens)
        except ValueError as error:
            raise UserError(f"{tower}: not such a tower ({error})") from error
    tokens = config.visual_tokens if projector == MLP else num_tokens or DEFAULT_TOKENS
    tokenizer, llm_config, spec = load_tokenizer(llm)
    add_image_token(tokenizer)
    renderer = Renderer(tokenizer, extend_template(tokenizer.chat_template, spec.system), tokens)
    return renderer, getattr(llm_config.get_text_config(), "max_position_embeddings", None)
