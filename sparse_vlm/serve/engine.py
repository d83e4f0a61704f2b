"""One VLM for many clients: requests are answered one after the other, in the order in which they came.

Shape legend: n latent tokens, N tokens an image in the LLM, D width of the LLM.

Notable: everything that touches the model runs in one thread, a token at a time, so that an answer can be ended between two tokens. An
image that was encoded before, as in the next question of a conversation, is neither decoded nor encoded again.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparse_vlm.errors import UserError
from sparse_vlm.images.decode import draft_image
from sparse_vlm.images.preprocess import Preprocessor
from sparse_vlm.serve.fetch import read_url
from sparse_vlm.serve.metrics import Metrics
from sparse_vlm.serve.protocol import DEFAULT_MAX_TOKENS, ApiError, ChatRequest
from sparse_vlm.tower.visualize import seen_box
from sparse_vlm.vlm import VLM
from sparse_vlm.vlm.projectors import MLP
from sparse_vlm.vlm.stream import PrefixCache, Stream

KEPT_IMAGES = 32  # as the tower takes them, with their tokens
DECODERS = 2  # threads that fetch and decode images
LONGEST_TOKEN = 64  # characters; no text has longer ones throughout
TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        max_body: bytes of a request.
        max_images: images of a request.
        max_queue: requests that wait while one is answered.
        domains: hosts that images are fetched from.
        grace_seconds: that a running answer has to end when the server is stopped.
    """

    max_body: int = 20 << 20
    max_images: int = 8
    max_queue: int = 16
    domains: Collection[str] = ()
    grace_seconds: float = 5.0


@dataclass(frozen=True)
class Encoding:
    """What the tower makes of an image at one token budget: `features` (N, D), and RoIs (n, 4) where the tokens begin and end."""

    features: Tensor
    cells: list[list[float]]
    rois: list[list[float]]


@dataclass(eq=False)
class LoadedImage:
    """An image as the tower takes it, in the place of a PIL image in messages.

    Attributes:
        size: (width, height) in full.
        crop: what the tower is given of it: (x0, y0, x1, y1) in pixels.
        encodings: by token budget.
    """

    scaled: Image.Image = field(repr=False)
    size: tuple[int, int]
    crop: tuple[float, float, float, float]
    encodings: dict[int, Encoding] = field(default_factory=dict, repr=False)


class BudgetView:
    """A VLM as `Stream` sees it, at one token budget; weights are shared."""

    def __init__(self, vlm: VLM, num_tokens: int, tokens_per_image: int) -> None:
        self._vlm, self.num_tokens, self.tokens_per_image = vlm, num_tokens, tokens_per_image
        self.model, self.tokenizer, self.check_length = vlm.model, vlm.tokenizer, vlm.check_length
        self.renderer = copy.copy(vlm.renderer)
        self.renderer.tokens_per_image = tokens_per_image

    def image_features(self, images: list[LoadedImage]) -> Tensor:
        """(B, N, D) of images that `encode` has seen."""
        return torch.stack([image.encodings[self.num_tokens].features for image in images])

    @torch.no_grad()
    def encode(self, image: LoadedImage) -> None:
        """Run tower and projector, unless that was done before."""
        if self.num_tokens in image.encodings:
            return
        tower, projector = self._vlm.tower, self._vlm.projector
        inputs = Preprocessor.of(tower.config)(image.scaled).to(self.model.device)
        cells = tower.first_cells(*inputs, num_tokens=self.num_tokens)
        placed = cells if tower.focus is not None else None  # so that the focus does not run again
        out = tower(inputs.pixels, num_tokens=self.num_tokens, image_sizes=inputs.image_sizes, cells=placed)
        visual = tower.config.at_budget(self.num_tokens).visual_tokens
        features = projector(out.last_hidden_state[:, -visual:].to(projector.linear_1.weight.dtype))
        image.encodings[self.num_tokens] = Encoding(features[0], _rounded(cells[0]), _rounded(out.rois[0]))


@dataclass
class Answer:
    """An answer on its way.

    Attributes:
        view, messages, max_tokens: what is asked of the model.
        images: in the order of the request.
        prompt_tokens, answer_tokens: so far.
        ms: milliseconds of `decode`, `queue`, `tower`, `prefill`, `first_token` and `total`, since the request came.
        finish_reason: `stop` or `length`; None while it goes on.
        stopped: whether the server was stopped before the answer ended.
    """

    view: BudgetView
    stream: Stream
    max_tokens: int
    images: list[LoadedImage]
    began: float
    prompt_tokens: int = 0
    answer_tokens: int = 0
    tokens_per_second: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    finish_reason: str | None = None
    stopped: bool = False

    def usage(self) -> dict[str, int]:
        """OpenAI's usage object."""
        total = self.prompt_tokens + self.answer_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens, "total_tokens": total}

    def shown(self) -> list[dict[str, Any]]:
        """What was looked at of each image; cells and RoIs are relative to `crop`."""
        found = []
        for image in self.images:
            encoding = image.encodings[self.view.num_tokens]
            crop = [round(side, 1) for side in image.crop]
            places = {"cells": encoding.cells, "rois": encoding.rois}
            found.append({"size": list(image.size), "crop": crop, "num_tokens": self.view.tokens_per_image, **places})
        return found

    def costs(self) -> dict[str, Any]:
        """Times and rate, and whether the server was stopped."""
        ms = {name: round(value, 1) for name, value in self.ms.items()}
        return {"ms": ms, "tokens_per_second": round(self.tokens_per_second, 1), **({"stopped": True} if self.stopped else {})}


class Engine:
    """Answers chat requests with one VLM.

    Args:
        name: what the model is called by clients.
    """

    def __init__(self, vlm: VLM, name: str, limits: Limits) -> None:
        self.vlm, self.name, self.limits = vlm, name, limits
        self.metrics = Metrics()
        self.created = int(time.time())
        self._model_thread = ThreadPoolExecutor(1, "model")
        self._decoders = ThreadPoolExecutor(DECODERS, "decoder")
        self._turn = asyncio.Lock()
        self._admitted = 0
        self._stop_at: float | None = None
        self._images: OrderedDict[bytes, LoadedImage] = OrderedDict()
        self._prefix_cache = PrefixCache()
        # the renderer learns once what is a control token, which its copies share
        vlm.renderer.tokens(vlm.renderer.text([{"role": "user", "content": "<image>"}], answer_next=True))

    @property
    def budgets(self) -> tuple[int, int] | None:
        """Minimum and maximum token budget that a request may ask for; None if it is fixed."""
        return self.vlm.tower.config.budgets if self.vlm.projector_kind == MLP else None

    @property
    def stopping(self) -> bool:
        """Whether the server is being stopped."""
        return self._stop_at is not None

    def stop(self) -> None:
        """Take no more requests; running answers have `grace_seconds` to end. May be called by a signal handler."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self.limits.grace_seconds

    def close(self) -> None:
        """End the threads, once what they do at the moment is done."""
        self._model_thread.shutdown()
        self._decoders.shutdown()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A place in the queue.

        Raises:
            ApiError: there is none, or the server is being stopped.
        """
        self._refuse_when_stopping()
        if self._admitted > self.limits.max_queue:
            raise ApiError(429, f"{self._admitted} requests are waiting; try again later", "queue_full")
        self._admitted += 1
        self.metrics.waiting.set(self._admitted)
        try:
            yield
        finally:
            self._admitted -= 1
            self.metrics.waiting.set(self._admitted)

    def _refuse_when_stopping(self) -> None:
        if self.stopping:
            raise ApiError(503, "the server is being stopped", "stopping")

    async def prepare(self, request: ChatRequest, began: float) -> Answer:
        """Decode the images and render the prompt; the model has not begun.

        Raises:
            ApiError: another model, an image that cannot be read, a budget that the tower does not serve, or too long a conversation.
        """
        if request.model not in (None, self.name):
            raise ApiError(404, f"model {request.model[:80]!r} is not served here; {self.name!r} is", "model_not_found", "model")
        view = self._view(request.num_tokens)
        decoding = time.perf_counter()
        messages, images = [], []
        for message in request.messages:
            content = []
            for part in message["content"]:
                if part["type"] == "image":
                    image = await self._in(self._decoders, self._load, part["url"], part["name"])
                    images.append(image)
                    part = {"type": "image", "image": image}
                content.append(part)
            messages.append({"role": message["role"], "content": content})
        decoded = time.perf_counter()
        answer = await self._in(self._model_thread, self._answer, view, messages, images, request.max_tokens, began)
        answer.ms["decode"] = (decoded - decoding) * 1000
        return answer

    def _view(self, num_tokens: int | None) -> BudgetView:
        config = self.vlm.tower.config
        own = config.num_latent_tokens
        if num_tokens is None or (self.budgets is not None and num_tokens == own):
            return BudgetView(self.vlm, own, self.vlm.tokens_per_image)
        if self.budgets is None:
            why = f"{self.name} has {self.vlm.tokens_per_image} tokens an image, and no other number; leave it out"
            raise ApiError(400, f"num_tokens: {why}", param="num_tokens")
        fewest, most = self.budgets
        if not fewest <= num_tokens <= most:
            raise ApiError(400, f"num_tokens: {num_tokens}; {self.name} takes {fewest} to {most}", param="num_tokens")
        return BudgetView(self.vlm, num_tokens, config.at_budget(num_tokens).visual_tokens)

    def _load(self, url: str, name: str) -> LoadedImage:
        data = read_url(url, name, self.limits.domains, self.limits.max_body)
        digest = hashlib.sha256(data).digest()
        if (known := self._images.get(digest)) is not None:
            return known
        prepare = Preprocessor.of(self.vlm.tower.config)
        draft = draft_image(data, name, *prepare.at_least)
        crop = seen_box(self.vlm.tower.config, draft.size)
        self._images[digest] = image = LoadedImage(prepare.scale_draft(draft), draft.size, crop)
        while len(self._images) > KEPT_IMAGES:
            self._images.popitem(last=False)
        return image

    def _answer(
        self, view: BudgetView, messages: list[dict[str, Any]], images: list[LoadedImage], max_tokens: int | None, began: float
    ) -> Answer:
        context = getattr(self.vlm.model.config.text_config, "max_position_embeddings", None)
        characters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if context is not None and characters > LONGEST_TOKEN * context:  # before it is tokenised, which takes seconds for megabytes
            raise ApiError(400, f"the messages have {characters:,} characters, the model reads {context:,} tokens", TOO_LONG, "messages")
        prompt = len(view.renderer.tokens(view.renderer.text(messages, answer_next=True)))
        left = DEFAULT_MAX_TOKENS if context is None else context - prompt
        limit = max_tokens or max(1, min(DEFAULT_MAX_TOKENS, left))
        try:
            view.check_length(prompt + limit)
        except UserError as error:
            raise ApiError(400, str(error), TOO_LONG, "messages") from None
        return Answer(view, Stream(view, messages, limit, self._prefix_cache), limit, images, began)

    async def run(self, answer: Answer) -> AsyncIterator[str]:
        """The pieces of an answer's text, after an empty one as soon as its images are encoded.

        Blanks before and after the answer are left out.

        Raises:
            ApiError: the server is being stopped, and the answer had not begun.
        """
        arrived = time.perf_counter()
        async with self._turn:
            self._refuse_when_stopping()
            encoding = time.perf_counter()
            answer.ms["queue"] = (encoding - arrived) * 1000
            self.metrics.running.set(1)
            try:
                await self._in(self._model_thread, self._begin, answer)
                answer.ms["tower"] = (time.perf_counter() - encoding) * 1000
                yield ""
                begun, blanks = False, ""
                while (piece := await self._in(self._model_thread, self._step, answer)) is not None:
                    piece = blanks + piece if begun else piece.lstrip()
                    text = piece.rstrip()
                    blanks = piece[len(text) :]
                    if text:
                        begun = True
                        yield text
                    if self._stop_at is not None and time.monotonic() > self._stop_at:
                        answer.stopped = True
                        break
            finally:
                self._model_thread.submit(answer.stream.close)  # after the step that it may be in
                self.metrics.running.set(0)
                self.metrics.images.inc(len(answer.images))
                self.metrics.prompt_tokens.inc(answer.prompt_tokens)
                self.metrics.answer_tokens.inc(answer.answer_tokens)
        answer.finish_reason = "length" if answer.stopped or answer.answer_tokens == answer.max_tokens else "stop"
        answer.ms["total"] = (time.perf_counter() - answer.began) * 1000

    def _begin(self, answer: Answer) -> None:
        for image in answer.images:
            answer.view.encode(image)

    def _step(self, answer: Answer) -> str | None:
        piece = next(answer.stream, None)
        timings = answer.stream.timings
        if "first_token" not in answer.ms:
            answer.ms["prefill"] = timings.prefill_ms
            answer.ms["first_token"] = (time.perf_counter() - answer.began) * 1000
            self.metrics.first_token.observe(answer.ms["first_token"] / 1000)
        answer.prompt_tokens, answer.answer_tokens = timings.prompt_tokens, timings.answer_tokens
        answer.tokens_per_second = timings.tokens_per_second
        return piece

    async def _in(self, pool: ThreadPoolExecutor, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


def _rounded(rois: Tensor) -> list[list[float]]:
    return [[round(side, 4) for side in roi] for roi in rois.float().tolist()]
