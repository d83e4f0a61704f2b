"""Conversations to text and tokens: the LLM's own chat template, taught about pictures, and which tokens carry loss.

A conversation is a list of `{"role": ..., "content": [{"type": "image"} | {"type": "text", "text": ...}]}`; content may be a plain string.

Notable: nothing here knows any model's markup. The template is wrapped, never rewritten: a preamble turns lists into strings and hands
them to the LLM's own template. The label mask is derived by rendering prefixes of the conversation and is checked for every one: exactly
what the assistant must say after a prompt as it is given later, up to the token that ends its turn, carries loss, and a template for which
that cannot be shown is an error. It is shown on tokens, the prompt's against the conversation's, because not every tokenizer can say which
characters its tokens came from, and because a prompt whose last tokens would merge with the answer's is not what the model will be given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sparse_vlm.errors import UserError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
Message = dict[str, Any]

# Jinja: `messages` become strings (a picture is the image token on a line of its own), with the default system message in front. Families
# that can reason before they answer (Qwen3, SmolLM3) are asked not to, because nobody wrote down the reasoning behind a caption.
_PREAMBLE = """\
{%- set enable_thinking = false -%}
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


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have a tokenizer take `<image>` as one special token; those that it knows stay."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)


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


class Renderer:
    """Turns conversations into tokens with one tokenizer.

    Args:
        tokenizer: knows the image token; fast or slow.
        template: a chat template from `extend_template`.
        tokens_per_image: placeholders a picture (N).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, tokens_per_image: int) -> None:
        self.tokenizer, self.template, self.tokens_per_image = tokenizer, template, tokens_per_image
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # Gemma's vocabulary has line breaks among its added tokens, and they end no turn
        special = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token.strip()}
        self._special = sorted(special, key=len, reverse=True)

    def text(self, conversation: Sequence[Message], answer_next: bool = False, sample: str | None = None) -> str:
        """The conversation as the template renders it, one image token a picture; with the head of an answer if `answer_next`.

        Args:
            sample: what to call it in errors, if anything.

        Raises:
            UserError: text that contains the image token itself, or a conversation that the template refuses.
        """
        where = "" if sample is None else f"{sample}: "
        for message in conversation:
            parts = message["content"]
            texts = [parts] if isinstance(parts, str) else [part["text"] for part in parts if part["type"] == "text"]
            if any(IMAGE_TOKEN in text for text in texts):
                raise UserError(
                    f"{where}a {message['role']} message contains the text {IMAGE_TOKEN!r}, which stands for a picture; leave it out"
                )
        try:
            return self.tokenizer.apply_chat_template(
                list(conversation), chat_template=self.template, tokenize=False, add_generation_prompt=answer_next
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise UserError(f"{where}the LLM's chat template refuses a conversation of {roles}: {error}") from error

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text with every image token repeated N times."""
        return self.tokenizer(self.expand(text), add_special_tokens=False)["input_ids"]

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

    @cached_property
    def keeps_history(self) -> bool:
        """Whether a turn of the assistant stands in later turns' prompts as it stood after its own; not so where the template has an answer
        begin with an empty thought and leaves the thought out of the history, as Qwen3's does."""
        conversation = [user("a"), assistant("b"), user("c"), assistant("d")]
        return self.text(conversation).startswith(self.text(conversation[:1], answer_next=True))

    def render(self, conversation: Sequence[Message], sample: str = "conversation", last_only: bool = False) -> Rendered:
        """Tokens and label mask of a conversation.

        Args:
            sample: what to call it in errors.
            last_only: of the assistant's turns only the last carries loss.

        Raises:
            UserError: the mask cannot be shown to be right: an empty answer, a template that changes the answer or what stands before it,
                ends the assistant's turn with no special token or refuses the conversation, or a tokenizer that joins prompt and answer.
        """
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        whole = self.expand(self.text(conversation, sample=sample))
        prompts, ends = [], []
        for turn in turns[-1:] if last_only else turns:
            prompts.append(self.expand(self.text(conversation[:turn], answer_next=True, sample=sample)))
            ends.append(self._end_of_answer(whole, prompts[-1], text_of(conversation[turn]), turn, sample))
        ids, *heads = self.tokenizer([whole, *prompts], add_special_tokens=False)["input_ids"]
        supervised = [False] * len(ids)
        for prompt, head, end in zip(prompts, heads, ends, strict=True):
            start = len(head)
            if ids[:start] != head:
                raise UserError(
                    f"{sample}: the LLM's tokenizer joins the end of the prompt, {prompt[-20:]!r}, with the answer after it, so that no "
                    "token begins the answer; a chat template whose prompts end before the space or line break would do"
                )
            if end not in ids[start + 1 :] or ids[start] == end:
                raise UserError(f"{sample}: no tokens between the prompt's end, {prompt[-20:]!r}, and the end of the assistant's turn")
            stop = ids.index(end, start) + 1
            supervised[start:stop] = [True] * (stop - start)
        contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
        pictures = sum(part["type"] == "image" for content in contents for part in content)
        self.check_count(ids, pictures, sample)
        return Rendered(tuple(ids), tuple(supervised))

    def renderings(self, conversation: Sequence[Message], sample: str = "conversation") -> list[Rendered]:
        """The conversation such that each of the assistant's turns carries loss in exactly one, after the prompt that it will be given.

        One rendering, or one for every turn of the assistant where the template does not keep the history.

        Raises:
            UserError: as `render`.
        """
        if self.keeps_history:
            return [self.render(conversation, sample)]
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        return [self.render(conversation[: turn + 1], sample, last_only=True) for turn in turns]

    def _end_of_answer(self, whole: str, prompt: str, answer: str, turn: int, sample: str) -> int:
        """The token that ends a turn which stands in the whole after its prompt, with nothing but blanks around the answer.

        A blank before the answer is the model's to say if the prompt does not end with it (Llama 2: `[/INST]` and ` A cat. </s>`).
        """
        if not answer.strip():
            raise UserError(f"{sample}: the assistant's turn {turn} is empty")
        if not whole.startswith(prompt):
            raise UserError(
                f"{sample}: the chat template changes what stands before the assistant's turn {turn}, whose prompt ends {prompt[-40:]!r}"
            )
        rest = whole[len(prompt) :].lstrip()
        if not rest.startswith(answer.strip()):
            raise UserError(
                f"{sample}: the chat template changes the assistant's turn {turn}: after the prompt, which ends with {prompt[-20:]!r}, "
                f"stands {rest[:40]!r}"
            )
        rest = rest[len(answer.strip()) :]
        end = next((token for token in self._special if rest.lstrip().startswith(token)), None)
        if end is None:
            raise UserError(f"{sample}: the chat template ends the assistant's turn {turn} with {rest[:12]!r}, no special token")
        if end in answer:
            raise UserError(f"{sample}: the assistant's turn {turn} contains the text {end!r}, which ends a turn; leave it out")
        return self.tokenizer.convert_tokens_to_ids(end)

    def end_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template has none.
        """
        rendered = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the chat template")
        return [token for token, carries in zip(rendered.ids, rendered.supervised, strict=True) if carries][-1]

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
