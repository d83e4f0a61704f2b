"""Stream an answer piece by piece and time it.

Notable: keys and values of the last prompt are kept. The next question of a conversation costs its own tokens alone, and earlier images
are not encoded again. Prompts are matched token by token and image by image; what follows the common prefix is computed again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from sparse_vlm.vlm.prompts import Message, images_of

if TYPE_CHECKING:
    from sparse_vlm.vlm.model import VLM


@dataclass
class Timings:
    """Times and token counts of an answer.

    Attributes:
        tower_ms: encoding new images to tokens of the LLM's width.
        prefill_ms: prefill of the new tokens, up to the first token's logits.
        first_token_ms: from the request to the first token.
        prompt_tokens: tokens of the whole prompt, images included.
        read_tokens: those of them that were not in the cache.
        answer_tokens: tokens of the answer so far.
        tokens_per_second: after the first token; 0 for an answer of one token.
    """

    tower_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    prompt_tokens: int = 0
    read_tokens: int = 0
    answer_tokens: int = 0
    tokens_per_second: float = 0.0


@dataclass
class PrefixCache:
    """Keys and values of an LLM's last prompt and answer, with their tokens and images."""

    ids: list[int] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    tokens_per_image: int = 0
    keys_values: DynamicCache | None = None

    def keep(self, ids: Sequence[int], images: Sequence[Image.Image], image_id: int, tokens_per_image: int) -> int:
        """Drop all but the common prefix with a new prompt, and at least the prompt's last token.

        Returns:
            Number of the prompt's tokens in the cache.
        """
        if tokens_per_image != self.tokens_per_image:  # images were encoded at another token budget
            self.ids, self.images, self.tokens_per_image = [], [], tokens_per_image
        common = 0
        limit = min(len(self.ids), len(ids) - 1)
        while common < limit and self.ids[common] == ids[common]:
            common += 1
        placeholders = [i for i, token in enumerate(ids) if token == image_id]
        for i, image in enumerate(images):
            start, stop = placeholders[i * tokens_per_image], placeholders[(i + 1) * tokens_per_image - 1] + 1
            cached = i < len(self.images) and self.images[i] is image
            if start < common and not (cached and stop <= common):
                common = start
        if self.keys_values is None or common == 0:
            self.keys_values, common = DynamicCache(), 0
        elif (surplus := self.keys_values.get_seq_length() - common) > 0:
            self.keys_values.crop(-surplus)
        self.ids = list(ids[:common])
        self.images = [image for i, image in enumerate(images) if placeholders[i * tokens_per_image] < common]
        return common


class Stream:
    """An iterator over the pieces of an answer's text.

    Attributes:
        timings: filled as the answer goes on.

    Raises:
        UserError: at construction, if placeholders and images do not match or the conversation is too long.
    """

    def __init__(self, vlm: VLM, messages: Sequence[Message], max_new_tokens: int, cache: PrefixCache) -> None:
        self.timings = Timings()
        self._started = time.perf_counter()
        self._vlm, self._cache = vlm, cache
        self._images = images_of(messages)
        self._ids = vlm.renderer.tokens(vlm.renderer.text(messages, answer_next=True))
        vlm.renderer.check_count(self._ids, len(self._images), "the conversation")
        vlm.check_length(len(self._ids) + max_new_tokens)
        self._pieces = self._run(max_new_tokens)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()

    def _run(self, max_new_tokens: int) -> Iterator[str]:
        generation = self._vlm.model.generation_config
        timings = self.timings
        logits = self._prefill()
        answer: list[int] = []
        shown = ""
        first = None
        while len(answer) < max_new_tokens:
            logits[generation.suppress_tokens] = float("-inf")
            token = int(logits.argmax())
            now = time.perf_counter()
            if first is None:
                first = now
                timings.first_token_ms = (now - self._started) * 1000
            if token in generation.eos_token_id:
                break
            answer.append(token)
            timings.answer_tokens = len(answer)
            if len(answer) > 1:
                timings.tokens_per_second = (len(answer) - 1) / (now - first)
            text = self._vlm.tokenizer.decode(answer, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # wait for the rest of a multi-byte character
                if text != shown:
                    yield text[len(shown) :]
                shown = text
            if len(answer) < max_new_tokens:
                logits = self._read([token], None)
        rest = self._vlm.tokenizer.decode(answer, skip_special_tokens=True)[len(shown) :]
        if rest:
            yield rest

    def _prefill(self) -> Tensor:
        vlm, timings, cache = self._vlm, self.timings, self._cache
        cached = cache.keep(self._ids, self._images, vlm.renderer.image_id, vlm.tokens_per_image)
        new = self._images[len(cache.images) :]
        started = time.perf_counter()
        features = None
        if new:
            with torch.no_grad():
                features = vlm.image_features(new)
        encoded = time.perf_counter()
        logits = self._read(self._ids[cached:], features)
        timings.tower_ms = (encoded - started) * 1000 if new else 0.0
        timings.prefill_ms = (time.perf_counter() - encoded) * 1000
        timings.prompt_tokens, timings.read_tokens = len(self._ids), len(self._ids) - cached
        cache.images = list(self._images)
        return logits

    @torch.no_grad()
    def _read(self, ids: list[int], features: Tensor | None) -> Tensor:
        """Run the LLM on new tokens; the logits after the last, (vocabulary,)."""
        model, cache = self._vlm.model, self._cache
        input_ids = torch.tensor([ids], device=model.device)
        embeds = model.get_input_embeddings()(input_ids)
        if features is not None:
            embeds = embeds.masked_scatter((input_ids == self._vlm.renderer.image_id).unsqueeze(-1), features.to(embeds.dtype))
        try:
            out = model.model.language_model(inputs_embeds=embeds, past_key_values=cache.keys_values, use_cache=True)
        except BaseException:  # interrupted, some layers hold more tokens than others
            cache.ids, cache.images, cache.keys_values = [], [], None
            raise
        cache.ids += ids
        return model.lm_head(out.last_hidden_state[0, -1]).float()
