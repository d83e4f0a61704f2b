"""An answer piece by piece, with what it took.

Notable: the LLM remembers what it has read. A next question in the same conversation costs its own tokens alone, and an image shown
earlier is not looked at again. The memory is matched token by token and image by image; whatever differs is read anew.
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
    """What an answer took.

    Attributes:
        tower_ms: pixels to image tokens in the LLM's width, for images not seen before.
        prefill_ms: the LLM reading what it had not read before, up to the first token's logits.
        first_token_ms: from the request to the first token.
        prompt_tokens: tokens of the whole prompt, images included.
        read_tokens: those of them that were not read before.
        answer_tokens: tokens of the answer so far.
        tokens_per_second: of the answer after its first token; 0 for an answer of one.
    """

    tower_ms: float = 0.0
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0
    prompt_tokens: int = 0
    read_tokens: int = 0
    answer_tokens: int = 0
    tokens_per_second: float = 0.0


@dataclass
class Memory:
    """What an LLM has read last: tokens, the images behind placeholders, and its keys and values."""

    ids: list[int] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    cache: DynamicCache | None = None

    def keep(self, ids: Sequence[int], images: Sequence[Image.Image], image_id: int, tokens_per_image: int) -> int:
        """Forget all but the common beginning with a new prompt; at least the prompt's last token is left to read.

        Returns:
            How many tokens of the prompt need not be read again.
        """
        common = 0
        limit = min(len(self.ids), len(ids) - 1)
        while common < limit and self.ids[common] == ids[common]:
            common += 1
        placeholders = [i for i, token in enumerate(ids) if token == image_id]
        for picture, image in enumerate(images):
            start, stop = placeholders[picture * tokens_per_image], placeholders[(picture + 1) * tokens_per_image - 1] + 1
            known = picture < len(self.images) and self.images[picture] is image
            if start < common and not (known and stop <= common):
                common = start
        if self.cache is None or common == 0:
            self.cache, common = DynamicCache(), 0
        elif (surplus := self.cache.get_seq_length() - common) > 0:
            self.cache.crop(-surplus)
        self.ids = list(ids[:common])
        self.images = [image for picture, image in enumerate(images) if placeholders[picture * tokens_per_image] < common]
        return common


class Stream:
    """An iterator over the pieces of an answer's text.

    Attributes:
        timings: filled as the answer goes on.

    Raises:
        UserError: at once, for a conversation whose placeholders and images do not match, or that is too long.
    """

    def __init__(self, vlm: VLM, messages: Sequence[Message], max_new_tokens: int, memory: Memory) -> None:
        self.timings = Timings()
        self._started = time.perf_counter()
        self._vlm, self._memory = vlm, memory
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
            if not text.endswith("\ufffd"):  # half of a character waits for its other half
                if text != shown:
                    yield text[len(shown) :]
                shown = text
            if len(answer) < max_new_tokens:
                logits = self._read([token], None)
        rest = self._vlm.tokenizer.decode(answer, skip_special_tokens=True)[len(shown) :]
        if rest:
            yield rest

    def _prefill(self) -> Tensor:
        vlm, timings, memory = self._vlm, self.timings, self._memory
        known = memory.keep(self._ids, self._images, vlm.renderer.image_id, vlm.tokens_per_image)
        new = self._images[len(memory.images) :]
        started = time.perf_counter()
        features = None
        if new:
            with torch.no_grad():
                features = vlm.image_features(new)
        looked = time.perf_counter()
        logits = self._read(self._ids[known:], features)
        timings.tower_ms = (looked - started) * 1000 if new else 0.0
        timings.prefill_ms = (time.perf_counter() - looked) * 1000
        timings.prompt_tokens, timings.read_tokens = len(self._ids), len(self._ids) - known
        memory.images = list(self._images)
        return logits

    @torch.no_grad()
    def _read(self, ids: list[int], features: Tensor | None) -> Tensor:
        """Let the LLM read tokens; the logits after the last, (vocabulary,)."""
        model, memory = self._vlm.model, self._memory
        input_ids = torch.tensor([ids], device=model.device)
        embeds = model.get_input_embeddings()(input_ids)
        if features is not None:
            embeds = embeds.masked_scatter((input_ids == self._vlm.renderer.image_id).unsqueeze(-1), features.to(embeds.dtype))
        try:
            out = model.model.language_model(inputs_embeds=embeds, past_key_values=memory.cache, use_cache=True)
        except BaseException:  # interrupted halfway, some layers have read more than others
            memory.ids, memory.images, memory.cache = [], [], None
            raise
        memory.ids += ids
        return model.lm_head(out.last_hidden_state[0, -1]).float()
