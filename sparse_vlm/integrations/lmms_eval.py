"""lmms-eval: `lmms-eval --model sparse_vlm --model_args pretrained=tiny-chat --tasks ...`; entry point `lmms_eval.models`.

Source: lmms-eval 0.7 (`api/model.py`, `api/task.py`, `models/registry_v2.py`). Tasks have two forms. The chat form passes whole
conversations with images anywhere in them and requests generated answers. With `--force_simple` a task passes a text and its images, and
may also request likelihoods of continuations.

Notable: lmms-eval's `loglikelihood` is the mean loss a token, of which it chooses the smallest, as in LLaVA's adapters. Version 0.7.3
converts unknown types of answers to text and unwraps only its own `GenerationResult`, so pairs of numbers are wrapped in one. lmms-eval's
modules are imported when it requests the classes; this module does not need it.
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
MAX_NEW_TOKENS = 1024  # where a task does not set it
Key = tuple[tuple[str, str, int], str]  # (task, split, number of the document) and context


def manifest() -> Any:
    """The entry point: lmms-eval's `ModelManifest` of this model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(MODEL_ID, chat_class_path=f"{__name__}.SparseVLMChat", simple_class_path=f"{__name__}.SparseVLMSimple")


class _Adapter:
    """A VLM with lmms-eval's interface; the base class before its `lmms`.

    Args:
        pretrained: a folder or zoo name.
        batch_size: conversations answered at once.
        device: chosen automatically by default.
        num_tokens: token budget, for a tower of several.

    Raises:
        UserError: no such model, an invalid batch size, or several processes.
    """

    is_simple: ClassVar[bool]
    task_dict: dict[str, Any]  # documents by task and split, which lmms-eval fills

    def __init__(self, pretrained: str, batch_size: int | str = 1, device: str | None = None, num_tokens: int | None = None) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("sparse_vlm answers lmms-eval in one process; start lmms-eval without a launcher")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}; it must be a positive integer")
        self.batch_size = int(batch_size)
        self.vlm = VLM.from_pretrained(pretrained, device=device or own_device(), num_tokens=num_tokens)

    @abstractmethod
    def _conversation(self, arguments: tuple[Any, ...]) -> list[Message]:
        """The conversation of a request for an answer."""

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request; requests with equal settings are batched.

        Raises:
            UserError: content other than images and text, or a conversation that cannot be rendered.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(_settings(request.args).items())), []).append(i)
        answers: dict[int, str] = {}
        bar = _bar(len(requests))
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size):
                chosen = numbers[start : start + self.batch_size]
                settings = _settings(requests[chosen[0]].args)
                texts = self.vlm.generate([self._conversation(requests[i].args) for i in chosen], **_options(settings))
                answers.update(zip(chosen, (_cut(text, settings.get("until")) for text in texts), strict=True))
                bar.update(len(chosen))
        bar.close()
        return [answers[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """For each request a `GenerationResult` of its continuation's mean loss a token, and whether greedy decoding gives it.

        Continuations of one document and context are scored in one pass.

        Raises:
            UserError: in the chat form.
        """
        raise UserError("this task compares likelihoods, which lmms-eval supports in the simple form only; add --force_simple")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: several rounds need a task's own code between them.

        Raises:
            UserError: always.
        """
        raise UserError("sparse_vlm does not support lmms-eval's tasks of several rounds")


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
        context, _, to_images, number, task, split = arguments
        urls = (to_images(self.task_dict[task][split][number]) if to_images else None) or []
        where = f"{task}, document {number}"
        images = [{"type": "image", "url": url} for url in urls]
        texts = [{"type": "text", "text": text} for text in context.split(IMAGE_TOKEN)]
        if len(texts) == 1:
            content = [*images, *texts]  # without marks images come first
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
            # the likelihood of a choice without its question has no document
            to_images, number, task, split = rest or (None, 0, "", "")
            key = ((task, split, number), context)
            if key not in conversations:
                conversations[key] = self._conversation((context, continuation, to_images, number, task, split))
            text = continuation(self.task_dict[task][split][number]) if callable(continuation) else continuation
            groups.setdefault(key, []).append((i, text.strip()))
        results: dict[int, tuple[float, bool]] = {}
        bar = _bar(len(requests))
        for key, candidates in groups.items():
            texts = [text for _, text in candidates]
            (scores,) = self.vlm.score([conversations[key]], [texts])
            longest = max(len(self.vlm.tokenizer(text)["input_ids"]) for text in texts)
            (greedy,) = self.vlm.generate([conversations[key]], max_new_tokens=longest + 1)
            results.update({i: (-score.mean, greedy == text) for (i, text), score in zip(candidates, scores, strict=True)})
            bar.update(len(candidates))
        bar.close()
        return [GenerationResult(text=results[i]) for i in range(len(requests))]


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
    """Generation settings of a request: the argument that is a dict, in either form."""
    return next(argument for argument in arguments if isinstance(argument, dict))


def _content(parts: Sequence[dict[str, Any]] | str, where: str) -> list[dict[str, Any]]:
    """Parts of a message in the form of `VLM`."""
    if isinstance(parts, str):
        return [{"type": "text", "text": parts}]
    return [_PARTS[part["type"]](part, where) if part["type"] in _PARTS else _unsupported(part, where) for part in parts]


def _image(part: dict[str, Any], where: str) -> dict[str, Any]:
    url = part["url"]
    if not isinstance(url, (Image.Image, str)):
        raise UserError(f"{where}: an image is a {type(url).__name__}, expected an image or a path")
    return {"type": "image", "image": url.convert("RGB") if isinstance(url, Image.Image) else load_image(url)}


_PARTS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "text": lambda part, where: {"type": "text", "text": part["text"]},
    "image": _image,
}


def _unsupported(part: dict[str, Any], where: str) -> dict[str, Any]:
    raise UserError(f"{where}: holds {part['type']}; sparse_vlm supports images and text")


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """The generation options among a task's settings."""
    options: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens", MAX_NEW_TOKENS))}
    if settings.get("num_beams", 1) > 1:
        options["num_beams"] = settings["num_beams"]
    if settings.get("do_sample", True) and settings.get("temperature"):
        options |= {"do_sample": True, "temperature": settings["temperature"]}
        options |= {"top_p": settings["top_p"]} if settings.get("top_p") else {}
    return options


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first stop string."""
    for mark in [until] if isinstance(until, str) else until or ():
        text = text.split(mark)[0] if mark else text
    return text.strip()
