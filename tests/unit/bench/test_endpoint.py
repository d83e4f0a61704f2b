"""Loading an OpenAI-compatible endpoint: what is sent, what is measured, and every way an endpoint fails."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from sparse_vlm.bench.endpoint import LoadConfig, load
from sparse_vlm.errors import UserError

FIRST_S, GAP_S, PIECES = 0.05, 0.02, 4


class Endpoint(ThreadingHTTPServer):
    """Answers after `FIRST_S` with `PIECES` pieces, `GAP_S` apart; each piece is two tokens."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.failing: set[int] = set()
        self.usage = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def log_message(self, *arguments: object) -> None:
        pass

    def _json(self, status: int, document: dict) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._json(200, {"data": [{"id": "the-model"}]}) if self.path == "/v1/models" else self._json(404, {})

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            server.keys.append(self.headers["Authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
        if number in server.failing:
            self._json(503, {"error": "full"})
        else:
            self.send_response(200)
            self.end_headers()
            for piece in range(PIECES):
                time.sleep(GAP_S if piece else FIRST_S)
                self._event({"choices": [{"delta": {"content": "word "}}]})
            if server.usage:
                self._event({"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 2 * PIECES}})
            self.wfile.write(b"data: [DONE]\n\n")
        with server.lock:
            server.running -= 1

    def _event(self, document: dict) -> None:
        self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
        self.wfile.flush()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    names = []
    for color in ("red", "blue"):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
        names.append(str(tmp_path / f"{color}.png"))
    return names


def test_times_tokens_and_throughput_are_those_of_the_endpoint(endpoint: Endpoint, images: list[str]) -> None:
    document = load(LoadConfig(endpoint.url, images, requests=6, concurrency=3, max_tokens=9, api_key="secret"))
    assert (document["completed"], document["failed"], document["model_id"]) == (6, 0, "the-model")
    assert document["total_input_tokens"] == 6 * 50 and document["total_output_tokens"] == 6 * 2 * PIECES
    assert 1000 * FIRST_S <= document["p50_ttft_ms"] <= 1000 * FIRST_S + 500
    assert 1000 * GAP_S <= document["median_itl_ms"] <= 1000 * GAP_S + 200
    assert len(document["itls"]) == 6 and all(len(gaps) == PIECES - 1 for gaps in document["itls"])
    tpots = [sum(gaps) / (2 * PIECES - 1) for gaps in document["itls"]]
    assert document["mean_tpot_ms"] == pytest.approx(1000 * statistics.fmean(tpots), abs=0.01)
    assert document["p50_ttft_ms"] <= document["p90_ttft_ms"] <= document["p99_ttft_ms"]
    assert document["request_throughput"] == pytest.approx(6 / document["duration"])
    assert endpoint.most <= 3 and endpoint.keys == ["Bearer secret"] * 6
    body = endpoint.bodies[0]
    assert body["max_tokens"] == 9 and body["stream"] and body["model"] == "the-model"
    urls = {body["messages"][0]["content"][0]["image_url"]["url"] for body in endpoint.bodies}
    assert len(urls) == 2 and all(url.startswith("data:image/png;base64,") for url in urls)


def test_goodput_counts_requests_within_every_bound(endpoint: Endpoint, images: list[str]) -> None:
    bounds = {"none": {"ttft": 1.0}, "all": {"ttft": 60_000.0, "e2el": 60_000.0}}
    documents = {name: load(LoadConfig(endpoint.url, images, requests=2, goals=goals)) for name, goals in bounds.items()}
    assert documents["none"]["request_goodput"] == 0
    assert documents["all"]["request_goodput"] == documents["all"]["request_throughput"]
    assert load(LoadConfig(endpoint.url, images, requests=1))["request_goodput"] is None


def test_requests_arrive_at_the_rate(endpoint: Endpoint, images: list[str]) -> None:
    at_once = load(LoadConfig(endpoint.url, images, requests=8))
    spread = load(LoadConfig(endpoint.url, images, requests=8, rate=10.0))
    assert (at_once["request_rate"], spread["request_rate"]) == ("inf", 10.0)
    assert spread["duration"] > at_once["duration"] + 0.2


def test_failed_requests_are_counted_apart(endpoint: Endpoint, images: list[str]) -> None:
    endpoint.failing, endpoint.usage = {1}, False
    document = load(LoadConfig(endpoint.url, images, requests=3, concurrency=1))
    assert (document["completed"], document["failed"]) == (2, 1)
    assert document["errors"][1].startswith("status 503") and document["errors"][0] == ""
    assert document["output_lens"] == [PIECES, 0, PIECES], "pieces are counted where the endpoint tells no usage"
    endpoint.failing = set(range(100))
    with pytest.raises(UserError, match="no request was answered; the first failed with status 503"):
        load(LoadConfig(endpoint.url, images, requests=2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"url": "localhost:8000"}, "--url localhost:8000: write http://HOST:PORT/v1"),
        ({"url": "http://127.0.0.1:9/v1"}, "no OpenAI-compatible endpoint"),
        ({"images": []}, "needs an image"),
        ({"images": ["nowhere.png"]}, "nowhere.png"),
        ({"requests": 0}, "must be above 0"),
        ({"rate": 0.0}, "must be above 0"),
        ({"goals": {"itl": 5.0}}, "--goodput itl:5"),
    ],
)
def test_mistakes_are_one_line(changes: dict, named: str, endpoint: Endpoint, images: list[str]) -> None:
    with pytest.raises(UserError, match=named):
        load(LoadConfig(**({"url": endpoint.url, "images": images} | changes)))
    with pytest.raises(UserError, match="/models: status 404"):
        load(LoadConfig(endpoint.url.replace("/v1", "/v2"), images))
