"""lmms-eval: `lmms-eval --model sparse_vlm --model_args pretrained=tiny-chat --tasks ...`; entry point `lmms_eval.models`.

Source: lmms-eval 0.7 (`api/model.py`, `api/task.py`, `models/registry_v2.py`). Its tasks come in two forms. The chat form hands over whole
conversations with images anywhere in them, and asks for answers in words alone. With `--force_simple` a task hands over a text and its
images, and may also ask how likely a continuation is.

Notable: lmms-eval names the number `loglikelihood` but takes the choice with the smallest, because LLaVA's adapters return the mean loss a
token; so does this one. Version 0.7.3 makes text of every answer that it does not know, a pair of numbers among them, and unwraps only its
own `GenerationResult`: a pair goes to it in one. Its modules are imported when it asks for the classes; this module needs nothing of it.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar

from PIL import Image

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import load_image
from sparse_vlm.utils.devices import own_device
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.prompts import IMAGE_TOKEN, Message

MODEL_ID = "sparse_vlm"
MAX_NEW_TOKENS = 1024  # where a task does not say
Key = tuple[tuple[str, str, int], str]  # (task, split, number of the document) and context


def manifest() -> Any:
    """What the entry point names: lmms-eval's `ModelManifest` of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, chat_class_path=f"{__name__}.SparseVLMChat", simple_class_path=f"{__name__}.SparseVLMSimple")


class _Adapter:
    """A VLM as lmms-eval asks it; stands before its `lmms` among the bases.

    Args:
        pretrained: a folder or zoo name.
        batch_size: conversations that are answered at once.
        device: own choice by default.
        num_tokens: tokens an image, for a tower that serves several budgets.

    Raises:
        UserError: no such model, a batch size that is no number, or several processes.
    """

    is_simple: ClassVar[bool]
    task_dict: dict[str, Any]  # documents by task and split, which lmms-eval fills

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, num_tokens: int | None = None) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("sparse_vlm answers lmms-eval in one process; start lmms-eval without a launcher")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}; it must be a number from 1 on")
        self.batch_size = int(batch_size)
        self.vlm = VLM.from_pretrained(pretrained, device=device or own_device(), num_tokens=num_tokens)

    @abstractmethod
    def _conversation(self, arguments: tuple[Any, ...]) -> list[Message]:
        """The conversation of a request for an answer."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer to each request; requests with equal settings are answered together.

        Raises:
            UserError: something other than images and text, or a conversation that cannot be rendered.
        """
        alike: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault(repr(sorted(_settings(request.args).items())), []).append(i)
        answers: dict[int, str] = {}
        bar = _bar(len(requests))
        for numbers in alike.values():
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                settings = _settings(requests[chosen[0]].args)
                found = self.vlm.generate([self._conversation(requests[i].args) for i in chosen], **_options(settings))
                answers.update(zip(chosen, (_cut(text, settings.get("until")) for text in found), strict=True))
                bar.update(len(chosen))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each request a `GenerationResult` of its continuation's mean loss a token, and whether the model would say just that.

        Continuations of one document and context are read in one pass.

        Raises:
            UserError: in the chat form.
        """
        raise UserError("this task compares likelihoods, for which lmms-eval has the simple form alone; add --force_simple")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: several rounds need a task's own code between them.

        Raises:
            UserError: always.
        """
        raise UserError("sparse_vlm does not answer lmms-eval's tasks of several rounds")


class _Chat(_Adapter):
    """The chat form: (context, document to messages, settings, document, task, split)."""

    is_simple = False

    def _conversation(self, arguments: tuple[Any, ...]) -> list[Message]:
        _, to_messages, _, number, task, split = arguments
        where = f"{task}, document {number}"
        messages = to_messages(self.task_dict[task][split][number])
        return [{"role": message["role"], "content": _content(message["content"], where)} for message in messages]


class _Simple(_Adapter):
    """The simple form: (context, settings or continuation, document to images, document, task, split)."""

    is_simple = True

    def _conversation(self, arguments: tuple[Any, ...]) -> list[Message]:
        context, _, to_pictures, number, task, split = arguments
        pictures = (to_pictures(self.task_dict[task][split][number]) if to_pictures else None) or []
        where = f"{task}, document {number}"
        images = [{"type": "image", "url": picture} for picture in pictures]
        texts = [{"type": "text", "text": text} for text in context.split(IMAGE_TOKEN)]
        if len(texts) == 1:
            content = [*images, *texts]  # no mark says where: images come first
        elif len(texts) == len(images) + 1:
            content = [part for pair in zip(texts, [*images, texts[-1]], strict=True) for part in pair][:-1]
        else:
            raise UserError(f"{where}: {len(texts) - 1} marks {IMAGE_TOKEN} in its text, but {len(images)} images")
        return [{"role": "user", "content": _content(content, where)}]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """As `_Adapter.loglikelihood`."""
        from lmms_eval.api.instance import GenerationResult

        groups: dict[Key, list[tuple[int, str]]] = {}
        conversations: dict[Key, list[Message]] = {}
        for i, request in enumerate(requests):
            context, continuation, *rest = request.args
            # what a choice is worth without its question comes without a document
            to_pictures, number, task, split = rest or (None, 0, "", "")
            key = ((task, split, number), context)
            if key not in conversations:
                conversations[key] = self._conversation((context, continuation, to_pictures, number, task, split))
            said = continuation(self.task_dict[task][split][number]) if callable(continuation) else continuation
            groups.setdefault(key, []).append((i, said.strip()))
        found: dict[int, tuple[float, bool]] = {}
        bar = _bar(len(requests))
        for key, candidates in groups.items():
            texts = [text for _, text in candidates]
            (scores,) = self.vlm.score([conversations[key]], [texts])
            longest = max(len(self.vlm.tokenizer(text)["input_ids"]) for text in texts)
            (greedy,) = self.vlm.generate([conversations[key]], max_new_tokens=longest + 1)
            found.update({i: (-score.mean, greedy == text) for (i, text), score in zip(candidates, scores, strict=True)})
            bar.update(len(candidates))
        bar.close()
        return [GenerationResult(text=found[i]) for i in range(len(requests))]


_FORMS: dict[str, type[_Adapter]] = {"SparseVLMChat": _Chat, "SparseVLMSimple": _Simple}


@cache
def _class(name: str) -> type:
    from lmms_eval.api.model import lmms

    return type(name, (_FORMS[name], lmms), {"__doc__": _FORMS[name].__doc__, "__module__": __name__})


def __getattr__(name: str) -> type:
    """The classes that `manifest` names."""
    if name in _FORMS:
        return _class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _bar(total: int) -> Any:
    from transformers.utils import logging

    return logging.tqdm(total=total, desc="sparse_vlm answers")


def _settings(arguments: tuple[Any, ...]) -> dict[str, Any]:
    """How a request for an answer is to be met: of its arguments the one that is a dict, in either form."""
    return next(argument for argument in arguments if isinstance(argument, dict))


def _content(parts: Sequence[dict[str, Any]] | str, where: str) -> list[dict[str, Any]]:
    """Parts of a message as `VLM` takes them."""
    if isinstance(parts, str):
        return [{"type": "text", "text": parts}]
    return [_PARTS[part["type"]](part, where) if part["type"] in _PARTS else _refused(part, where) for part in parts]


def _picture(part: dict[str, Any], where: str) -> dict[str, Any]:
    url = part["url"]
    if not isinstance(url, (Image.Image, str)):
        raise UserError(f"{where}: an image is a {type(url).__name__}, expected an image or a path")
    return {"type": "image", "image": url.convert("RGB") if isinstance(url, Image.Image) else load_image(url)}


_PARTS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "text": lambda part, where: {"type": "text", "text": part["text"]},
    "image": _picture,
}


def _refused(part: dict[str, Any], where: str) -> dict[str, Any]:
    raise UserError(f"{where}: holds {part['type']}; sparse_vlm takes images and text")


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """What of a task's settings concerns generation; the others are other models' own."""
    options: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens", MAX_NEW_TOKENS))}
    if settings.get("num_beams", 1) > 1:
        options["num_beams"] = settings["num_beams"]
    if settings.get("do_sample", True) and settings.get("temperature"):
        options |= {"do_sample": True, "temperature": settings["temperature"]}
        options |= {"top_p": settings["top_p"]} if settings.get("top_p") else {}
    return options


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The answer before the first of the marks that end it."""
    for mark in [until] if isinstance(until, str) else until or ():
        text = text.split(mark)[0] if mark else text
    return text.strip()
