"""Conversations to text and tokens: the LLM's own chat template, taught about pictures, and which tokens carry loss.

A conversation is a list of `{"role": ..., "content": [{"type": "image"} | {"type": "text", "text": ...}]}`; content may be a plain string.

Notable: nothing here knows any model's markup. The template is wrapped, never rewritten: a preamble turns lists into strings and hands
them to the LLM's own template. The label mask is derived by rendering prefixes of the conversation and is checked for every one: exactly
the assistant's words and the token that ends its turn carry loss, and a template for which that cannot be shown is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparse_vlm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
Message = dict[str, Any]

# Jinja: `messages` become strings (a picture is the image token on a line of its own), with the default system message in front.
_PREAMBLE = """\
{%- set turns = namespace(all=[]) -%}
{%- set default_system = SYSTEM -%}
{%- if default_system is not none and messages[0]['role'] != 'system' -%}
{%- set turns.all = [{'role': 'system', 'content': default_system}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set turns.all = turns.all + [message] -%}
{%- else -%}
{%- set flat = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- set flat.text = flat.text + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}
{%- endfor -%}
{%- set turns.all = turns.all + [{'role': message['role'], 'content': flat.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = turns.all -%}
"""


def extend_template(template: str, system: str | None) -> str:
    """The chat template of an LLM, extended to pictures and a default system message (None: the template's own)."""
    return _PREAMBLE.replace("SYSTEM", "none" if system is None else _jinja_string(system)) + template


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        ids: token ids, every picture already N placeholders.
        supervised: for each of them, whether it carries loss.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]

    def last_answer(self) -> int:
        """Where the last run of supervised tokens begins."""
        start = len(self.supervised) - self.supervised[::-1].index(True)
        while start > 0 and self.supervised[start - 1]:
            start -= 1
        return start


class Renderer:
    """Turns conversations into tokens with one tokenizer.

    Args:
        tokenizer: knows the image token; any fast tokenizer.
        template: a chat template from `extend_template`.
        tokens_per_image: placeholders a picture (N).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, tokens_per_image: int) -> None:
        self.tokenizer, self.template, self.tokens_per_image = tokenizer, template, tokens_per_image
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._special = sorted(set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab()), key=len, reverse=True)

    def text(self, conversation: Sequence[Message], answer_next: bool = False) -> str:
        """The conversation as the template renders it, one image token a picture; with the head of an answer if `answer_next`.

        Raises:
            UserError: text that contains the image token itself.
        """
        for message in conversation:
            parts = message["content"]
            texts = [parts] if isinstance(parts, str) else [part["text"] for part in parts if part["type"] == "text"]
            if any(IMAGE_TOKEN in text for text in texts):
                raise UserError(f"a {message['role']} message contains the text {IMAGE_TOKEN!r}, which stands for a picture; leave it out")
        return self.tokenizer.apply_chat_template(
            list(conversation), chat_template=self.template, tokenize=False, add_generation_prompt=answer_next
        )

    def tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of rendered text with every image token repeated N times, and the characters each came from."""
        encoded = self.tokenizer(self.expand(text), add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def expand(self, text: str) -> str:
        """Every image token N times."""
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens_per_image)

    def check_count(self, ids: Sequence[int], pictures: int, sample: str) -> None:
        """Make sure that a sample has N placeholders a picture.

        Raises:
            UserError: naming the sample and both counts.
        """
        found = sum(token == self.image_id for token in ids)
        expected = pictures * self.tokens_per_image
        if found != expected:
            raise UserError(f"{sample}: {found} image placeholders, but {pictures} pictures give {expected} tokens")

    def render(self, conversation: Sequence[Message], sample: str = "conversation") -> Rendered:
        """Tokens and label mask of a conversation.

        Args:
            sample: what to call it in errors.

        Raises:
            UserError: the mask cannot be shown to be right: an empty answer, a template that rewrites earlier turns or ends the
                assistant's turn with no special token, or a token that is half answer and half markup.
        """
        whole = self.expand(self.text(conversation))
        spans = []
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            answer = text_of(message)
            if not answer.strip():
                raise UserError(f"{sample}: the assistant's turn {turn} is empty")
            before = self.expand(self.text(conversation[:turn], answer_next=True))
            if not whole.startswith(before + answer):
                raise UserError(f"{sample}: the chat template changes the assistant's turn {turn} or what stands before it")
            start, stop = len(before), len(before) + len(answer)
            end = self._end_token(whole[stop:])
            if end is None:
                raise UserError(
                    f"{sample}: the chat template ends the assistant's turn {turn} with {whole[stop : stop + 12]!r}, no special token"
                )
            spans.append((start, stop + len(end)))
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        supervised = [False] * len(ids)
        for start, stop in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
            if not inside or offsets[inside[0]][0] < start or offsets[inside[-1]][1] > stop:
                raise UserError(f"{sample}: a token is half answer and half markup around {whole[start : start + 20]!r}")
            for i in inside:
                supervised[i] = True
        contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
        pictures = sum(part["type"] == "image" for content in contents for part in content)
        self.check_count(ids, pictures, sample)
        return Rendered(tuple(ids), tuple(supervised))

    def end_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template has none.
        """
        rendered = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the chat template")
        return [token for token, carries in zip(rendered.ids, rendered.supervised, strict=True) if carries][-1]

    def _end_token(self, rest: str) -> str | None:
        return next((token for token in self._special if rest.startswith(token)), None)

    def describe(self, rendered: Rendered) -> str:
        """A sample for people: what carries loss in [[double brackets]], pictures as one mark each."""
        parts, i = [], 0
        while i < len(rendered.ids):
            j = i
            while j < len(rendered.ids) and rendered.supervised[j] == rendered.supervised[i]:
                j += 1
            text = self.tokenizer.decode(rendered.ids[i:j], skip_special_tokens=False)
            parts.append(f"[[{text}]]" if rendered.supervised[i] else text)
            i = j
        run = f"(?:{re.escape(IMAGE_TOKEN)}\\s*){{{self.tokens_per_image}}}"
        return re.sub(run, f"<{self.tokens_per_image} image tokens>\n", "".join(parts))


def text_of(message: Message) -> str:
    """A message's words, without its pictures."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def images_of(conversation: Sequence[Message]) -> list[Image.Image]:
    """The pictures of a conversation in order."""
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def user(text: str, pictures: int = 0) -> Message:
    """A user's message with so many pictures before the text."""
    return {"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
