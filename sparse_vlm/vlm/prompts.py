"""Render conversations with the LLM's chat template, extended to images, and derive which tokens carry loss.

A conversation is a list of `{"role": ..., "content": [{"type": "image"} | {"type": "text", "text": ...}]}`; content may be a plain string.

Notable: the content of a message is always text. If it spells a control token (`<|im_end|>`, `<image>`), a separator is inserted before
the template sees it, and the token is encoded as its characters, so that content cannot begin or end a turn. In training data such text
is taken for a mistake, and `render` refuses it by default.

No model's markup is hard-coded. A preamble flattens content lists into strings and passes them to the LLM's own template. The label mask
is derived by rendering prefixes of the conversation and is verified for every conversation: exactly the assistant's tokens after the
prompt, up to the token that ends the turn, carry loss; otherwise `render` raises. It compares token ids rather than character offsets,
because slow tokenizers have no offsets, and because a prompt whose last tokens merge with the answer's differs from the prompt that the
model is given at inference.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sparse_vlm.errors import UserError, first_line
from sparse_vlm.vlm.limits import LimitExceeded, bounded

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
BREAK = "\ue000"  # a private-use character; it is inserted into control tokens that a message spells
TEMPLATE_SECONDS = 5.0  # of CPU time; a conversation of a thousand turns takes less than 0.1
Message = dict[str, Any]

# Jinja: `messages` become strings (an image is the image token on a line of its own), with the default system message in front. Families
# that can reason before they answer (Qwen3, SmolLM3) are told not to, because training data have no reasoning.
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


_MARKED = """\
{%- macro rendered(messages, add_generation_prompt) -%}
TEMPLATE
{%- endmacro -%}
{%- set all = namespace(text=rendered(messages, add_generation_prompt), done=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- set prompt = rendered(messages[:loop.index0], true) -%}
{%- set turn = rendered(messages[:loop.index], false) -%}
{%- if turn.startswith(prompt) and all.text.startswith(turn) and prompt|length >= all.done -%}
{{- all.text[all.done:prompt|length] -}}
{%- set answer = turn[prompt|length:].rstrip() -%}
{%- generation -%}{{- answer -}}{%- endgeneration -%}
{%- set all.done = prompt|length + answer|length -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{{- all.text[all.done:] -}}
"""


def extend_template(template: str, system: str | None) -> str:
    """The chat template of an LLM, extended to images and a default system message (None: the template's own)."""
    return _PREAMBLE.replace("SYSTEM", "none" if system is None else _jinja_string(system)) + template


def mark_answers(template: str) -> str:
    """A chat template with `{% generation %}` around what the assistant says, as trainers need it that mask other tokens.

    The template becomes a macro, which renders the conversation's prefixes: an answer is what follows the prompt before it, up to the end
    of the turn, as in `Renderer.render`. Where the template does not repeat the prompt (`Renderer.keeps_history`), nothing is marked.
    """
    return _MARKED.replace("TEMPLATE", template)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Add `<image>` to a tokenizer's special tokens."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        ids: token ids, with N placeholders per image.
        supervised: whether each of them carries loss.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


class Renderer:
    """Turns conversations into tokens with one tokenizer.

    Args:
        tokenizer: fast or slow, with the image token.
        template: a chat template from `extend_template`.
        tokens_per_image: placeholders per image (N).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, tokens_per_image: int) -> None:
        self.tokenizer, self.template, self.tokens_per_image = tokenizer, template, tokens_per_image
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # without the line breaks that Gemma has among its added tokens
        special = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token.strip()}
        self._special = sorted(special, key=len, reverse=True)

    def text(self, conversation: Sequence[Message], answer_next: bool = False, sample: str | None = None) -> str:
        """Render the conversation, with one image token per image, and with the generation prompt if `answer_next`.

        Control tokens that a message spells have `BREAK` after their first character; `tokens` resolves them.

        Args:
            sample: its name in errors, if it has one.

        Raises:
            UserError: content that is not text, or the template refuses the conversation, fails, or exceeds its limits.
        """
        where = "" if sample is None else f"{sample}: "
        return self._apply([self._escaped(message, where) for message in conversation], answer_next, where)

    def _apply(self, conversation: list[Message], answer_next: bool, where: str) -> str:
        try:
            with bounded(TEMPLATE_SECONDS):
                return self.tokenizer.apply_chat_template(
                    conversation, chat_template=self.template, tokenize=False, add_generation_prompt=answer_next
                )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise UserError(f"{where}the LLM's chat template refuses a conversation of {roles}: {error}") from error
        except LimitExceeded as error:
            raise UserError(f"{where}the LLM's chat template does not finish: {error}; take another LLM, or correct the template") from None
        except Exception as error:  # a template is a program that can raise anything
            raise UserError(f"{where}the LLM's chat template fails: {type(error).__name__}: {first_line(error)}") from error

    def _escaped(self, message: Message, where: str) -> Message:
        """Insert `BREAK` into control tokens of a message. Adjacent texts are joined first, because two could spell one together."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        escaped: list[dict[str, Any]] = []
        for part in parts:
            if part["type"] != "text":
                escaped.append(part)
            elif escaped and escaped[-1]["type"] == "text":
                escaped[-1] = {"type": "text", "text": escaped[-1]["text"] + part["text"]}
            else:
                escaped.append({"type": "text", "text": part["text"]})
        for part in escaped:
            if part["type"] == "text":
                _check_text(part["text"], f"{where}a {message['role']} message")
                part["text"] = self._escape(part["text"])
        return {**message, "content": escaped[0]["text"] if isinstance(content, str) else escaped}

    def _escape(self, text: str) -> str:
        return self._as_control.sub(lambda found: _broken(found[0]), text)

    @cached_property
    def _control(self) -> tuple[str, ...]:
        """Control tokens, longest first: special tokens, and other added tokens that the template uses."""
        tokenizer = self.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
        try:
            marks = self._apply([user("a"), assistant("b"), user("c")], False, "")
        except UserError:  # raised again when a conversation is rendered
            marks = ""
        special |= {token for token in tokenizer.get_added_vocab() if token in marks}
        # without Gemma's line breaks
        return tuple(sorted((token for token in special if token.strip()), key=len, reverse=True))

    @cached_property
    def _as_control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control)) or r"(?!)")

    @cached_property
    def _as_text(self) -> re.Pattern[str]:
        """Control tokens after `_escape`."""
        return re.compile("|".join(re.escape(_broken(token)) for token in self._control) or r"(?!)")

    @cached_property
    def _speller(self) -> tuple[PreTrainedTokenizerBase, dict[int, list[int]]]:
        """A copy of the tokenizer to which escaped control tokens are added as tokens, so that they split text as control tokens do; and
        the ids of their characters."""
        return copy.deepcopy(self.tokenizer), {}

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text, with N placeholders per image."""
        return self._encode(self.expand(text))

    def _encode(self, text: str) -> list[int]:
        spelt = sorted({found[0] for found in self._as_text.finditer(text)}) if BREAK in text else []
        if not spelt:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        from transformers import AddedToken

        tokenizer, characters = self._speller
        if new := [token for token in spelt if token not in tokenizer.get_added_vocab()]:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
            characters.update({tokenizer.convert_tokens_to_ids(token): self._spell(token.replace(BREAK, "")) for token in new})
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [each for token in ids for each in characters.get(token, (token,))]

    def _spell(self, token: str) -> list[int]:
        """The ids of a control token's characters as ordinary text."""
        control = set(self.tokenizer.convert_tokens_to_ids(list(self._control)))
        plain = partial(self.tokenizer, add_special_tokens=False, split_special_tokens=True)
        before = plain("\n")["input_ids"]  # SentencePiece prepends a space to a text
        for pieces in ((token,), (token[0], token[1:]), tuple(token)):  # split_special_tokens does not split other added tokens
            spelt = [plain(f"\n{piece}")["input_ids"] for piece in pieces]
            ids = [each for found in spelt for each in found[len(before) :]]
            if all(found[: len(before)] == before for found in spelt) and not control & set(ids):
                return ids
        raise UserError(f"the LLM's tokenizer cannot encode {token!r} as text; leave it out")

    def expand(self, text: str) -> str:
        """Repeat every image token N times."""
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens_per_image)

    def check_count(self, ids: Sequence[int], images: int, sample: str) -> None:
        """Check that a sample has N placeholders per image.

        Raises:
            UserError: another number; names the sample and both numbers.
        """
        found = sum(token == self.image_id for token in ids)
        expected = images * self.tokens_per_image
        if found != expected:
            raise UserError(f"{sample}: {found} image placeholders, but {images} images give {expected} tokens")

    @cached_property
    def keeps_history(self) -> bool:
        """Whether later prompts repeat an assistant's turn unchanged. Qwen3's template does not: it removes the empty
        thought that answers begin with."""
        conversation = [user("a"), assistant("b"), user("c"), assistant("d")]
        return self.text(conversation).startswith(self.text(conversation[:1], answer_next=True))

    def render(
        self, conversation: Sequence[Message], sample: str = "conversation", last_only: bool = False, to_learn: bool = True
    ) -> Rendered:
        """Tokens and label mask of a conversation.

        Args:
            sample: its name in errors.
            last_only: only the assistant's last turn carries loss.
            to_learn: refuse messages that spell control tokens instead of encoding them as text.

        Raises:
            UserError: the mask cannot be verified (an empty answer; a template that changes the answer or the text before it, ends the turn
                without a special token, or refuses the conversation; a tokenizer that merges prompt and answer), or a message spells
                a control token.
        """
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        whole = self.expand(self.text(conversation, sample=sample))
        prompts, ends = [], []
        for turn in turns[-1:] if last_only else turns:
            prompts.append(self.expand(self.text(conversation[:turn], answer_next=True, sample=sample)))
            ends.append(self._end_of_answer(whole, prompts[-1], self._escape(text_of(conversation[turn])), turn, sample))
        if to_learn:
            self._refuse_control(conversation, {self.tokenizer.convert_ids_to_tokens(end) for end in ends}, sample)
        ids, *heads = map(self._encode, [whole, *prompts])
        supervised = [False] * len(ids)
        for prompt, head, end in zip(prompts, heads, ends, strict=True):
            start = len(head)
            if ids[:start] != head:
                raise UserError(
                    f"{sample}: the LLM's tokenizer merges the end of the prompt, {prompt[-20:]!r}, with the start of the answer; use a "
                    "chat template whose generation prompt ends before the space or line break"
                )
            if end not in ids[start + 1 :] or ids[start] == end:
                raise UserError(f"{sample}: no tokens between the prompt's end, {prompt[-20:]!r}, and the end of the assistant's turn")
            stop = ids.index(end, start) + 1
            supervised[start:stop] = [True] * (stop - start)
        contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
        images = sum(part["type"] == "image" for content in contents for part in content)
        self.check_count(ids, images, sample)
        return Rendered(tuple(ids), tuple(supervised))

    def _refuse_control(self, conversation: Sequence[Message], ends: set[str], sample: str) -> None:
        """Raise if a message spells a control token."""
        for turn, message in enumerate(conversation):
            found = self._as_control.search(text_of(message))
            if found is None:
                continue
            whose = f"the assistant's turn {turn}" if message["role"] == "assistant" else f"a {message['role']} message"
            why = "stands for an image" if found[0] == IMAGE_TOKEN else "ends a turn" if found[0] in ends else "is a control token"
            raise UserError(f"{sample}: {whose} contains the text {found[0]!r}, which {why}; leave it out")

    def renderings(self, conversation: Sequence[Message], sample: str = "conversation") -> list[Rendered]:
        """Renderings in which each assistant's turn carries loss exactly once, after the prompt that it has at inference.

        One rendering, or one per assistant's turn if the template does not keep the history.

        Raises:
            UserError: as `render`.
        """
        if self.keeps_history:
            return [self.render(conversation, sample)]
        turns = [turn for turn, message in enumerate(conversation) if message["role"] == "assistant"]
        return [self.render(conversation[: turn + 1], sample, last_only=True) for turn in turns]

    def _end_of_answer(self, whole: str, prompt: str, answer: str, turn: int, sample: str) -> int:
        """The token that ends an assistant's turn; checks that the text after the prompt is the answer, apart from white space.

        A space before the answer carries loss if the prompt does not end with it (Llama 2: `[/INST]` and ` A cat. </s>`).
        """
        if not answer.strip():
            raise UserError(f"{sample}: the assistant's turn {turn} is empty")
        if not whole.startswith(prompt):
            raise UserError(
                f"{sample}: the chat template changes the text before the assistant's turn {turn}, whose prompt ends with {prompt[-40:]!r}"
            )
        rest = whole[len(prompt) :].lstrip()
        if not rest.startswith(answer.strip()):
            raise UserError(
                f"{sample}: the chat template changes the assistant's turn {turn}: after the prompt, which ends with {prompt[-20:]!r}, "
                f"comes {rest[:40]!r}"
            )
        rest = rest[len(answer.strip()) :]
        end = next((token for token in self._special if rest.lstrip().startswith(token)), None)
        if end is None:
            raise UserError(
                f"{sample}: the chat template ends the assistant's turn {turn} with {rest[:12]!r}, which is not a special token"
            )
        return self.tokenizer.convert_tokens_to_ids(end)

    def end_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template has none.
        """
        rendered = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the chat template")
        return [token for token, carries in zip(rendered.ids, rendered.supervised, strict=True) if carries][-1]

    def describe(self, rendered: Rendered) -> str:
        """A sample as readable text: tokens with loss in [[double brackets]], each image as one mark."""
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


def _broken(token: str) -> str:
    return token[0] + BREAK + token[1:]


def _check_text(text: Any, whose: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{whose} must be text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # invalid UTF-8 on the command line becomes lone surrogates
        raise UserError(f"{whose} is not valid text at character {error.start + 1} ({text[error.start]!a}); write it in UTF-8") from None


def text_of(message: Message) -> str:
    """The text of a message, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def images_of(conversation: Sequence[Message]) -> list[Image.Image]:
    """The images of a conversation in order."""
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def user(text: str, images: int = 0) -> Message:
    """A user's message with this number of images before the text."""
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
