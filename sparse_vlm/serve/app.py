"""The HTTP side: OpenAI's chat completions and models, health, metrics, and the page.

Notable: transformers' own serving (`transformers.cli.serving`) cannot be mounted here, because its handlers load models by name, fetch any
URL that a message holds, decode images without our limits and let text become control tokens.

A browser lets any page send requests to localhost. So bodies must be declared as JSON, which a page of another origin may not do, and a
server on the loopback interface without a key answers to loopback names alone, which defeats names that are pointed at it (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from functools import partial
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparse_vlm.errors import UserError
from sparse_vlm.serve.engine import Answer, Engine
from sparse_vlm.serve.protocol import ApiError, ChatRequest, parse_body, parse_request

log = logging.getLogger("sparse_vlm.serve")
BODY_SECONDS = 30.0  # for a client to send its request
DRAINED = 4  # times the limit that is read of a larger body, so that its sender gets to read the answer
OPEN_PATHS = ("/", "/health")  # without a key
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}


def create_app(engine: Engine, api_key: str | None = None, hosts: frozenset[str] | None = None) -> Starlette:
    """The application.

    Args:
        api_key: that requests must carry as `Authorization: Bearer KEY`.
        hosts: names by which the server may be asked; any for None.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    def refuse(request: Request, error: Exception) -> Response:
        return error_response(_as_api_error(error))

    routes = [
        Route("/", partial(_page, _page_text())),
        Route("/health", partial(_health, engine)),
        Route("/metrics", partial(_metrics, engine)),
        Route("/v1/models", partial(_models, engine)),
        Route("/v1/models/{name:path}", partial(_model, engine)),
        Route("/v1/chat/completions", partial(_chat, engine), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, UserError, Exception), refuse)
    guard = Middleware(Guard, api_key=api_key, hosts=hosts)
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers, lifespan=lifespan)


class Guard:
    """Refuses strangers, and adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refused = self._refuse(scope["path"], Headers(scope=scope))
        await (self._app if refused is None else error_response(refused))(scope, receive, send_with_headers)

    def _refuse(self, path: str, headers: Headers) -> ApiError | None:
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if self._hosts is not None and host not in self._hosts:
            return ApiError(403, f"this server answers to {', '.join(sorted(self._hosts))} alone; start it with --host or --api-key")
        if self._expected is None or path in OPEN_PATHS:
            return None
        given = headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, self._expected):
            return ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")
        return None


class EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called however they end."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            async with aclosing(self.body_iterator):
                await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def error_response(error: ApiError) -> JSONResponse:
    """An error in OpenAI's form."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


def _as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail)
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed; its log says how", "internal_error")


async def _chat(engine: Engine, request: Request) -> Response:
    began = time.perf_counter()

    def count(status: int) -> None:
        engine.metrics.requests.labels(status).inc()
        if status >= 400:
            engine.metrics.errors.labels(status).inc()
        else:
            engine.metrics.latency.observe(time.perf_counter() - began)

    with ExitStack() as held:
        try:
            held.enter_context(engine.admit())
            chat = parse_request(parse_body(await _read_body(request, engine.limits.max_body)), engine.limits.max_images)
            answer = await engine.prepare(chat, began)
            if chat.stream:
                return EventStream(_events(engine, chat, answer, count), held.pop_all().close)
            text = await _unless_gone(_whole(engine, answer), request)
            count(200)
            return JSONResponse(_completion(engine, answer, text))
        except ClientDisconnect:
            engine.metrics.disconnects.inc()
            return Response(status_code=499)  # the client is gone
        except Exception as error:
            known = _as_api_error(error)
            if known.status == 500:
                log.exception("a request failed")
            count(known.status)
            return error_response(known)


async def _read_body(request: Request, limit: int) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send the request with Content-Type: application/json")
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else 0
    too_large = ApiError(413, f"the request has more than {limit:,} bytes; send smaller or fewer images", "request_too_large")
    if length > limit and (length > DRAINED * limit or "expect" in request.headers):
        raise too_large

    async def read() -> bytes:
        size, parts = 0, []
        async for part in request.stream():
            size += len(part)
            if size > DRAINED * limit:
                break
            if size <= limit:
                parts.append(part)
        if size > limit:
            raise too_large
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} seconds") from None


async def _whole(engine: Engine, answer: Answer) -> str:
    async with aclosing(engine.run(answer)) as pieces:
        return "".join([piece async for piece in pieces])


async def _unless_gone(work: Any, request: Request) -> Any:
    """What a coroutine returns; it is cancelled when the client leaves.

    Raises:
        ClientDisconnect: it left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _head(engine: Engine, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": engine.name}


def _completion(engine: Engine, answer: Answer, text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
    extension = {"images": answer.shown(), **answer.costs()}
    return {**_head(engine, "chat.completion"), "choices": [choice], "usage": answer.usage(), "sparse_vlm": extension}


async def _events(engine: Engine, chat: ChatRequest, answer: Answer, count: Callable[[int], None]) -> AsyncIterator[str]:
    head = _head(engine, "chat.completion.chunk") | ({"usage": None} if chat.include_usage else {})

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        return _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **more})

    ended = False
    try:
        yield chunk({"role": "assistant", "content": ""})
        async with aclosing(engine.run(answer)) as pieces:
            async for piece in pieces:
                yield chunk({"content": piece}) if piece else chunk({}, sparse_vlm={"images": answer.shown()})
        usage = {} if chat.include_usage else {"usage": answer.usage()}
        yield chunk({}, answer.finish_reason, sparse_vlm=answer.costs(), **usage)
        if chat.include_usage:
            yield _event({**head, "choices": [], "usage": answer.usage()})
        yield "data: [DONE]\n\n"
        ended = True
        count(200)
    except Exception as error:
        known = _as_api_error(error)
        if known.status == 500:
            log.exception("an answer failed")
        ended = True
        count(known.status)
        yield _event(known.body())
        yield "data: [DONE]\n\n"
    finally:
        if not ended:
            engine.metrics.disconnects.inc()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _health(engine: Engine, request: Request) -> Response:
    return JSONResponse({"status": "stopping"}, 503) if engine.stopping else JSONResponse({"status": "ok"})


async def _metrics(engine: Engine, request: Request) -> Response:
    return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _card(engine: Engine) -> dict[str, Any]:
    limits = {"max_images": engine.limits.max_images, "max_body": engine.limits.max_body}
    tokens = {"num_tokens": engine.vlm.tokens_per_image, "budgets": engine.budgets}
    card = {"id": engine.name, "object": "model", "created": engine.created, "owned_by": "sparse-vlm"}
    return {**card, "sparse_vlm": {**tokens, **limits}}


async def _models(engine: Engine, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_card(engine)]})


async def _model(engine: Engine, request: Request) -> Response:
    if (name := request.path_params["name"]) != engine.name:
        raise ApiError(404, f"model {name[:80]!r} is not served here; {engine.name!r} is", "model_not_found", "model")
    return JSONResponse(_card(engine))


def _page_text() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run, and nothing else."""
    text = files("sparse_vlm.serve").joinpath("page.html").read_text(encoding="utf-8")
    sources = []
    for tag in ("script", "style"):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    rest = "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, f"default-src 'none'; {'; '.join(sources)}; {rest}"


async def _page(page: tuple[str, str], request: Request) -> Response:
    return HTMLResponse(page[0], headers={"Content-Security-Policy": page[1], "Cache-Control": "no-cache"})
