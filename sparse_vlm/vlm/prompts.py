"""Conversations to text and tokens: the LLM's own chat template, taught about images, and which tokens carry loss.

A conversation is a list of `{"role": ..., "content": [{"type": "image"} | {"type": "text", "text": ...}]}`; content may be a plain string.

Notable: what a message says is text, whatever it says. Where it spells a control token (`<|im_end|>`, `<image>`), the spelling is broken
before the template sees it and tokenised as the characters that it is of, so that nobody's words begin or end a turn; all other text is
tokenised as ever. To learn from such text would be to learn from a mistake in the data, so that `render` refuses it unless told otherwise.

Nothing here knows any model's markup. The template is wrapped, never rewritten: a preamble turns lists into strings and hands
them to the LLM's own template. The label mask is derived by rendering prefixes of the conversation and is checked for every one: exactly
what the assistant must say after a prompt as it is given later, up to the token that ends its turn, carries loss, and a template for which
that cannot be shown is an error. It is shown on tokens, the prompt's against the conversation's, because not every tokenizer can say which
characters its tokens came from, and because a prompt whose last tokens would merge with the answer's is not what the model will be given.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from sparse_vlm.errors import UserError
from sparse_vlm.vlm.limits import TooMuch, bounded

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
BREAK = "\ue000"  # of Unicode's private use; stands in a control token that is spelt in a message, so that it is none
TEMPLATE_SECONDS = 5.0  # of computing; a conversation of a thousand turns takes less than a tenth of one
Message = dict[str, Any]

# Jinja: `messages` become strings (an image is the image token on a line of its own), with the default system message in front. Families
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
    """The chat template of an LLM, extended to images and a default system message (None: the template's own)."""
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
        ids: token ids, every image already N placeholders.
        supervised: for each of them, whether it carries loss.
    """

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


class Renderer:
    """Turns conversations into tokens with one tokenizer.

    Args:
        tokenizer: knows the image token; fast or slow.
        template: a chat template from `extend_template`.
        tokens_per_image: placeholders an image (N).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, tokens_per_image: int) -> None:
        self.tokenizer, self.template, self.tokens_per_image = tokenizer, template, tokens_per_image
        self.image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # Gemma's vocabulary has line breaks among its added tokens, and they end no turn
        special = {token for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if token.strip()}
        self._special = sorted(special, key=len, reverse=True)

    def text(self, conversation: Sequence[Message], answer_next: bool = False, sample: str | None = None) -> str:
        """The conversation as the template renders it, one image token an image; with the head of an answer if `answer_next`.

        Control tokens that a message spells stand in it with `BREAK` after their first character; `tokens` knows them.

        Args:
            sample: what to call it in errors, if anything.

        Raises:
            UserError: a message that is no text, or a conversation that the template refuses or does not come to an end with.
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
        except TooMuch as error:
            raise UserError(f"{where}the LLM's chat template does not come to an end: {error}; take another LLM, or mend it") from None
        except Exception as error:  # a template is a program, and may fail in any way
            raise UserError(f"{where}the LLM's chat template fails: {type(error).__name__}: {first_line(error)}") from error

    def _escaped(self, message: Message, where: str) -> Message:
        """A message in which no control token is spelt: adjacent texts are one, because two could spell one together."""
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
        """Control tokens, longest first: those that the tokenizer calls special, and any other of its added tokens that marks turns."""
        tokenizer = self.tokenizer
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
        try:
            marks = self._apply([user("a"), assistant("b"), user("c")], False, "")
        except UserError:  # which whoever renders something will be told
            marks = ""
        special |= {token for token in tokenizer.get_added_vocab() if token in marks}
        # Gemma has line breaks among its added tokens
        return tuple(sorted((token for token in special if token.strip()), key=len, reverse=True))

    @cached_property
    def _as_control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._control)) or r"(?!)")

    @cached_property
    def _as_text(self) -> re.Pattern[str]:
        """What `_escape` makes of them."""
        return re.compile("|".join(re.escape(_broken(token)) for token in self._control) or r"(?!)")

    @cached_property
    def _speller(self) -> tuple[PreTrainedTokenizerBase, dict[int, list[int]]]:
        """A tokenizer that learns broken spellings as tokens, where they separate what stands around them as the control tokens do; and
        the characters' own ids of each."""
        return copy.deepcopy(self.tokenizer), {}

    def tokens(self, text: str) -> list[int]:
        """Token ids of rendered text with every image token repeated N times."""
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
        """The ids of a control token's characters, as ordinary text inside a line."""
        control = set(self.tokenizer.convert_tokens_to_ids(list(self._control)))
        plain = partial(self.tokenizer, add_special_tokens=False, split_special_tokens=True)
        before = plain("\n")["input_ids"]  # SentencePiece puts a blank in front of a text
        for pieces in ((token,), (token[0], token[1:]), tuple(token)):  # tokens that are not special are never split
            spelt = [plain(f"\n{piece}")["input_ids"] for piece in pieces]
            ids = [each for found in spelt for each in found[len(before) :]]
            if all(found[: len(before)] == before for found in spelt) and not control & set(ids):
                return ids
        raise UserError(f"the LLM's tokenizer has no way to spell {token!r} as text; leave it out")

    def expand(self, text: str) -> str:
        """Every image token N times."""
        return text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.tokens_per_image)

    def check_count(self, ids: Sequence[int], images: int, sample: str) -> None:
        """Make sure that a sample has N placeholders an image.

        Raises:
            UserError: naming the sample and both counts.
        """
        found = sum(token == self.image_id for token in ids)
        expected = images * self.tokens_per_image
        if found != expected:
            raise UserError(f"{sample}: {found} image placeholders, but {images} images give {expected} tokens")

    @cached_property
    def keeps_history(self) -> bool:
        """Whether a turn of the assistant stands in later turns' prompts as it stood after its own; not so where the template has an answer
        begin with an empty thought and leaves the thought out of the history, as Qwen3's does."""
        conversation = [user("a"), assistant("b"), user("c"), assistant("d")]
        return self.text(conversation).startswith(self.text(conversation[:1], answer_next=True))

    def render(
        self, conversation: Sequence[Message], sample: str = "conversation", last_only: bool = False, to_learn: bool = True
    ) -> Rendered:
        """Tokens and label mask of a conversation.

        Args:
            sample: what to call it in errors.
            last_only: of the assistant's turns only the last carries loss.
            to_learn: refuse messages that spell control tokens; else these are text.

        Raises:
            UserError: the mask cannot be shown to be right: an empty answer, a template that changes the answer or what stands before it,
                ends the assistant's turn with no special token or refuses the conversation, or a tokenizer that joins prompt and answer;
                or a control token that is spelt.
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
                    f"{sample}: the LLM's tokenizer joins the end of the prompt, {prompt[-20:]!r}, with the answer after it, so that no "
                    "token begins the answer; a chat template whose prompts end before the space or line break would do"
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
        """A mark of an image, or of a turn, in words is taken for a mistake of the data."""
        for turn, message in enumerate(conversation):
            found = self._as_control.search(text_of(message))
            if found is None:
                continue
            whose = f"the assistant's turn {turn}" if message["role"] == "assistant" else f"a {message['role']} message"
            why = "stands for an image" if found[0] == IMAGE_TOKEN else "ends a turn" if found[0] in ends else "is a control token"
            raise UserError(f"{sample}: {whose} contains the text {found[0]!r}, which {why}; leave it out")

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
        return self.tokenizer.convert_tokens_to_ids(end)

    def end_id(self) -> int:
        """The token that ends an assistant's turn.

        Raises:
            UserError: the template has none.
        """
        rendered = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the chat template")
        return [token for token, carries in zip(rendered.ids, rendered.supervised, strict=True) if carries][-1]

    def describe(self, rendered: Rendered) -> str:
        """A sample for people: what carries loss in [[double brackets]], images as one mark each."""
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


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _broken(token: str) -> str:
    return token[0] + BREAK + token[1:]


def _check_text(text: Any, whose: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{whose} is no text but a {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # a byte that is no UTF-8 arrives from the command line as half a character
        raise UserError(f"{whose} is no text at its character {error.start + 1} ({text[error.start]!a}); write it in UTF-8") from None


def text_of(message: Message) -> str:
    """A message's words, without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")


def images_of(conversation: Sequence[Message]) -> list[Image.Image]:
    """The images of a conversation in order."""
    contents = [message["content"] for message in conversation if not isinstance(message["content"], str)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def user(text: str, images: int = 0) -> Message:
    """A user's message with so many images before the text."""
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def assistant(text: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
