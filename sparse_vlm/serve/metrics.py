"""Counters of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The counters; names follow vLLM's where it has them."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("sparse_vlm_requests", "Chat completion requests by HTTP status.", ["status"], registry=registry)
        self.errors = Counter("sparse_vlm_errors", "Requests that ended in an error, by HTTP status.", ["status"], registry=registry)
        self.disconnects = Counter("sparse_vlm_disconnects", "Answers that ended because the client left.", registry=registry)
        self.prompt_tokens = Counter("sparse_vlm_prompt_tokens", "Tokens of prompts, images included.", registry=registry)
        self.answer_tokens = Counter("sparse_vlm_generation_tokens", "Tokens of answers.", registry=registry)
        self.images = Counter("sparse_vlm_images", "Images of answered requests.", registry=registry)
        self.running = Gauge("sparse_vlm_num_requests_running", "Requests that are being answered.", registry=registry)
        self.waiting = Gauge("sparse_vlm_num_requests_admitted", "Requests that are being answered or wait for it.", registry=registry)
        first = "Seconds from a request to its first token."
        self.first_token = Histogram("sparse_vlm_time_to_first_token_seconds", first, buckets=SECONDS, registry=registry)
        whole = "Seconds from a request to the end of its answer."
        self.latency = Histogram("sparse_vlm_e2e_request_latency_seconds", whole, buckets=SECONDS, registry=registry)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
