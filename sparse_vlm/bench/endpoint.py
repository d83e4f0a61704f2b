"""Load an OpenAI-compatible endpoint with requests about images, and measure latency, throughput and goodput.

The document has the field names of `vllm bench serve`, so that both can be read by the same tools. Times are of the client: TTFT is the
time to the first piece of the answer, ITL the time between pieces, TPOT the mean time per token after the first, E2EL the whole request.
"""

from __future__ import annotations

import base64
import http.client
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sparse_vlm.errors import UserError, first_line
from sparse_vlm.images.photos import photo_of

PERCENTILES = (50, 90, 99)
GOALS = ("ttft", "tpot", "e2el")  # latencies that goodput may bound
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class LoadConfig:
    """How to load an endpoint.

    Attributes:
        url: up to and including `/v1`, such as `http://127.0.0.1:8000/v1`.
        images: image files; requests take them in turn.
        model: its name at the endpoint; by default the first that the endpoint lists.
        question: text of each request.
        requests: their number.
        concurrency: most requests at a time; None for no limit.
        rate: mean requests a second, arriving as a Poisson process; infinite to send all at once.
        max_tokens: length of answers.
        goals: upper bounds in milliseconds, by names of `GOALS`; requests within all of them are goodput.
        api_key: sent as a bearer token.
        seed: of arrival times.
    """

    url: str
    images: Sequence[str]
    model: str | None = None
    question: str = "Describe the picture in a sentence."
    requests: int = 32
    concurrency: int | None = None
    rate: float = float("inf")
    max_tokens: int = 64
    goals: Mapping[str, float] = field(default_factory=dict)
    api_key: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Check the settings.

        Raises:
            UserError: names the setting to change.
        """
        if urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname:
            raise UserError(f"--url {self.url}: write http://HOST:PORT/v1")
        if not self.images:
            raise UserError("--url needs an image to ask about; name an --image")
        if self.requests < 1 or self.max_tokens < 1 or (self.concurrency or 1) < 1 or not self.rate > 0:
            raise UserError("numbers of requests and tokens, concurrency and rate must be above 0")
        for name, bound in self.goals.items():
            if name not in GOALS or not bound > 0:
                raise UserError(f"--goodput {name}:{bound:g}: write a positive bound in ms on one of {', '.join(GOALS)}")


@dataclass
class Call:
    """One request: times in seconds, tokens, and an error if it failed."""

    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    e2el: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 for an answer of one token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


def load(config: LoadConfig, on_progress: Callable[[int], None] = lambda calls: None) -> dict[str, Any]:
    """Send all requests and return the document.

    Raises:
        UserError: an invalid setting, an image that cannot be read, or an endpoint that does not answer.
    """
    config.check()
    for name in config.images:
        photo_of(Path(name)).draft(1)
    model = config.model or _served_model(config)
    contents = [_content(config, name) for name in config.images]
    calls = [Call() for _ in range(config.requests)]
    allowed = threading.Semaphore(config.concurrency or config.requests)
    arrivals = random.Random(config.seed)

    def run(number: int) -> None:
        with allowed:
            _send(config, model, contents[number % len(contents)], calls[number])
        on_progress(1)

    started = time.perf_counter()
    threads, due = [], 0.0
    for number in range(config.requests):
        due += arrivals.expovariate(config.rate) if config.rate != float("inf") else 0.0
        time.sleep(max(0.0, due - (time.perf_counter() - started)))
        threads.append(threading.Thread(target=run, args=(number,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return _document(config, model, calls, time.perf_counter() - started)


def _connect(config: LoadConfig) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection, the path of the API, and headers."""
    parts = urlsplit(config.url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {config.api_key}"} if config.api_key else {})
    return kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S), parts.path.rstrip("/"), headers


def _served_model(config: LoadConfig) -> str:
    connection, path, headers = _connect(config)
    try:
        connection.request("GET", f"{path}/models", headers=headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise UserError(f"{config.url}/models: status {response.status} ({body[:200].decode(errors='replace')})")
        return str(json.loads(body)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException) as error:
        raise UserError(f"{config.url}: no OpenAI-compatible endpoint ({first_line(error)})") from error
    finally:
        connection.close()


def _content(config: LoadConfig, name: str) -> list[dict[str, Any]]:
    data = base64.b64encode(Path(name).read_bytes()).decode()
    kind = {".png": "png", ".webp": "webp", ".gif": "gif"}.get(Path(name).suffix.lower(), "jpeg")
    return [{"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}, {"type": "text", "text": config.question}]


def _send(config: LoadConfig, model: str, content: list[dict[str, Any]], call: Call) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": config.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = before = time.perf_counter()
    pieces = 0
    try:
        connection, path, headers = _connect(config)
        connection.request("POST", f"{path}/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            call.error = f"status {response.status}: {response.read(300).decode(errors='replace')}"
            return
        for line in response:
            if not line.startswith(b"data:") or line.split(b":", 1)[1].strip() == b"[DONE]":
                continue
            event = json.loads(line.split(b":", 1)[1])
            now = time.perf_counter()
            if usage := event.get("usage"):
                call.input_tokens, call.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                if pieces == 0:
                    call.ttft = now - started
                else:
                    call.itl.append(now - before)
                pieces, before = pieces + 1, now
        call.e2el = before - started
        call.output_tokens = call.output_tokens or pieces
        if pieces == 0:
            call.error = "the answer was empty"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException) as error:
        call.error = first_line(error)
    finally:
        connection.close()


def _document(config: LoadConfig, model: str, calls: Sequence[Call], seconds: float) -> dict[str, Any]:
    done = [call for call in calls if not call.error]
    if not done:
        raise UserError(f"{config.url}: no request was answered; the first failed with {calls[0].error}")
    tokens_in, tokens_out = sum(call.input_tokens for call in done), sum(call.output_tokens for call in done)
    good = [call for call in done if all(1000 * getattr(call, name) <= bound for name, bound in config.goals.items())]
    document: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai-chat",
        "model_id": model,
        "num_prompts": config.requests,
        "request_rate": "inf" if config.rate == float("inf") else config.rate,
        "burstiness": 1.0,
        "max_concurrency": config.concurrency,
        "duration": seconds,
        "completed": len(done),
        "failed": len(calls) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / seconds,
        "request_goodput": len(good) / seconds if config.goals else None,
        "output_throughput": tokens_out / seconds,
        "total_token_throughput": (tokens_in + tokens_out) / seconds,
    }
    samples = {
        "ttft": [call.ttft for call in done],
        "tpot": [call.tpot for call in done if call.output_tokens > 1],
        "itl": [gap for call in done for gap in call.itl],
        "e2el": [call.e2el for call in done],
    }
    for name, values in samples.items():
        document |= {f"{statistic}_{name}_ms": round(value, 3) for statistic, value in _statistics(values).items()}
    return document | {
        "input_lens": [call.input_tokens for call in calls],
        "output_lens": [call.output_tokens for call in calls],
        "ttfts": [call.ttft for call in calls],
        "itls": [call.itl for call in calls],
        "errors": [call.error for call in calls],
    }


def _statistics(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, standard deviation and percentiles in milliseconds; zeros without values, as vLLM writes them."""
    ms = sorted(1000 * value for value in values) or [0.0]
    cuts = statistics.quantiles(ms, n=100, method="inclusive") if len(ms) > 1 else ms * 99
    percentiles = {f"p{percent}": cuts[percent - 1] for percent in PERCENTILES}
    return {"mean": statistics.fmean(ms), "median": statistics.median(ms), "std": statistics.pstdev(ms)} | percentiles
