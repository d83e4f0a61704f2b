"""What a conversation becomes in a model, without starting it: a tokenizer and configurations, and no weights."""

from __future__ import annotations

from pathlib import Path

from sparse_vlm.errors import UserError
from sparse_vlm.hub import store
from sparse_vlm.tower.config import read_config
from sparse_vlm.vlm.described import read
from sparse_vlm.vlm.llm import load_tokenizer
from sparse_vlm.vlm.projectors import DEFAULT_TOKENS, MLP
from sparse_vlm.vlm.prompts import Renderer, add_image_token, extend_template


def renderer_of(tower: str | Path, llm: str | Path, num_tokens: int | None = None, projector: str = MLP) -> tuple[Renderer, int | None]:
    """The renderer of the VLM that `VLM.build` makes of the same parts, and how many tokens its LLM reads; None where that is not said.

    Args:
        num_tokens: latent tokens an image, for a tower that serves several budgets, or what a projector reduces the tower's to.
        projector: as of `VLM.build`.

    Raises:
        UserError: either cannot be found or read, or the tower was not made for that number of tokens.
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


def parts_of(vlm: str | Path) -> tuple[str, str, int | None, str]:
    """Tower, LLM, tokens where their number was chosen, and kind of projector that a VLM's folder names.

    Raises:
        UserError: no such folder or name, or not a VLM.
    """
    _, described = read(vlm)
    return described.tower, described.llm, described.num_tokens, described.kind
