"""OpenAI's chat completions: what a request may hold, checked before the model sees it, and the form of errors.

Notable: a field that would change the answer and that we cannot honour is refused, not ignored. Decoding is greedy, so that `temperature`
must be 0, or absent.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

from sparse_vlm.errors import UserError, printable
from sparse_vlm.utils.documents import DECODER, ERRORS, json_problem

DEFAULT_MAX_TOKENS = 256
# Fields that change nothing in a greedy, stateless server: any value is accepted.
WITHOUT_EFFECT = {"user", "metadata", "seed", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls"}
# Fields with the values that ask for what the server does anyway, besides null.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "top_p": (1,),
    "top_k": (0, 1, -1),
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "ignore_eos": (False,),
}
WHY = {"temperature": "the model decodes greedily; leave temperature out, or set it to 0"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(UserError):
    """An error response in OpenAI's format.

    Attributes:
        status: of HTTP.
        code: of OpenAI, such as `model_not_found`; None where it has none.
        param: the field of the request that is wrong.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        messages: as `VLM.stream` takes them, but with a URL in the place of each image: `{"type": "image", "url": ..., "name": ...}`,
            where `name` is the place in the request, for errors.
        max_tokens: of the answer; None where the request leaves it to the server.
        stream: answer in server-sent events.
        include_usage: OpenAI's `stream_options.include_usage`.
        num_tokens: visual tokens an image; None for the model's own.
        model: the name that was asked for; None for whichever is served.
    """

    messages: list[dict[str, Any]]
    max_tokens: int | None
    stream: bool
    include_usage: bool
    num_tokens: int | None
    model: str | None


def parse_body(data: bytes) -> Any:
    """The JSON document of a body.

    Raises:
        ApiError: it is none.
    """
    try:
        return DECODER.decode(data.decode("utf-8"))
    except ERRORS as error:
        raise ApiError(400, f"the body is not JSON: {json_problem(error)[:200]}") from None


def parse_request(body: Any, max_images: int) -> ChatRequest:
    """Check a chat completion request.

    Args:
        max_images: that one request may hold.

    Raises:
        ApiError: naming the field that is wrong.
    """
    if not isinstance(body, dict):
        _wrong("", body, "the body", "an object")
    known = {"messages", "model", "max_tokens", "max_completion_tokens", "stream", "stream_options", "num_tokens"}
    for name, value in body.items():
        if name not in known and name not in WITHOUT_EFFECT and value is not None:
            _check_neutral(name, value)
    stream = _of_type(body, "stream", bool, "true or false") or False
    options = _of_type(body, "stream_options", dict, "an object") or {}
    if options and not stream:
        raise ApiError(400, "stream_options: only with stream true", param="stream_options")
    model = _of_type(body, "model", str, "a string")
    limits = {name: _count(body, name) for name in ("max_tokens", "max_completion_tokens")}
    given = {value for value in limits.values() if value is not None}
    if len(given) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    messages = _messages(body.get("messages"))
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    if images > max_images:
        raise ApiError(400, f"messages: {images} images, and this server takes {max_images} a request", param="messages")
    include = _of_type(options, "include_usage", bool, "true or false", "stream_options.") or False
    return ChatRequest(messages, given.pop() if given else None, stream, include, _count(body, "num_tokens"), model)


def _check_neutral(name: str, value: Any) -> None:
    shown = printable(name)[:80]
    if name not in NEUTRAL:
        raise ApiError(400, f"{shown}: no such field is supported by this server; leave it out", "unsupported_parameter", shown)
    # 1 == True in Python, not in JSON
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        given = json.dumps(value)
        given = given if len(given) <= 60 else f"{given[:57]}..."
        raise ApiError(400, f"{name}: {given} is not supported; {WHY.get(name, 'leave it out')}", "unsupported_value", name)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        _wrong("messages", messages, "messages", "a list")
    if not messages:
        raise ApiError(400, "messages: is empty; ask something", param="messages")
    checked = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if checked[-1]["role"] != "user":
        raise ApiError(400, f"messages: the last one is of role {checked[-1]['role']}; it must be the user's", param="messages")
    return checked


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        _wrong(where, message, where, "an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else _type_of(role)
        raise ApiError(400, f"{where}.role: {shown} is not one of {', '.join(ROLES)}", param=f"{where}.role")
    for name, value in message.items():  # fields that clients send back with an assistant's message are null or empty
        if name not in ("role", "content", "name") and value not in (None, [], {}, ""):
            raise ApiError(400, f"{where}.{printable(name)[:80]}: is not supported; leave it out", param=where)
    content = message.get("content")
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, list):
        parts = [_part(part, role, f"{where}.content[{number}]") for number, part in enumerate(content)]
    else:
        _wrong(f"{where}.content", content, f"{where}.content", "a string or a list of parts")
    if not any(part["type"] == "image" or part["text"].strip() for part in parts):
        raise ApiError(400, f"{where}.content: is empty", param=f"{where}.content")
    return {"role": ROLES[role], "content": parts}


def _part(part: Any, role: str, where: str) -> dict[str, Any]:
    if not isinstance(part, dict):
        _wrong(where, part, where, "an object")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            _wrong(where, part.get("text"), f"{where}.text", "a string")
        return {"type": "text", "text": part["text"]}
    if kind != "image_url":
        shown = repr(kind[:40]) if isinstance(kind, str) else _type_of(kind)
        raise ApiError(400, f"{where}.type: {shown} is not supported; text and image_url are", param=where)
    if role != "user":
        raise ApiError(400, f"{where}: an image in a message of role {role}; images go into the user's", param=where)
    url = part["image_url"].get("url") if isinstance(part.get("image_url"), dict) else None
    if not isinstance(url, str):
        raise ApiError(400, f'{where}.image_url: expected {{"url": "data:image/jpeg;base64,..."}}', param=where)
    return {"type": "image", "url": url, "name": f"{where}.image_url"}


def _of_type(body: dict[str, Any], name: str, kind: type, expected: str, prefix: str = "") -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        _wrong(prefix + name, value, prefix + name, expected)
    return value


def _count(body: dict[str, Any], name: str) -> int | None:
    """A whole number of at least 1, or None."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value != int(value) or value < 1:
        raise ApiError(400, f"{name}: expected a whole number of at least 1", param=name)
    return int(value)


def _wrong(param: str, value: Any, where: str, expected: str) -> NoReturn:
    raise ApiError(400, f"{where}: {_type_of(value)}, expected {expected}", param=param or None)


def _type_of(value: Any) -> str:
    names = {type(None): "is null or missing", bool: "is a boolean", str: "is a string", list: "is a list", dict: "is an object"}
    return names.get(type(value), "is a number")
